"""The story of a worker: plan, step, advance, commit, publish."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from worker.engine.loaded import Engine
from worker.engine.plan import StepPlan, StepResult
from worker.engine.scheduler import Scheduler
from worker.metrics import WorkerMetrics
from worker.service.intake import Intake
from worker.service.output import OutputProcessor
from worker.service.publisher import Publisher


class DecodeLoop:
    """Runs steps while there is work. The engine has a thread of its own; publishing overlaps the next step."""

    def __init__(
        self,
        scheduler: Scheduler,
        engine: Engine,
        processor: OutputProcessor,
        intake: Intake,
        publisher: Publisher,
        *,
        executor: ThreadPoolExecutor,
        metrics: WorkerMetrics,
    ) -> None:
        self._scheduler = scheduler
        self._engine = engine
        self._processor = processor
        self._intake = intake
        self._publisher = publisher
        self._executor = executor
        self._metrics = metrics
        self._is_stopping = False
        self.busy_since_s: float | None = None  # start of the step that runs now; None when idle
        self.mean_step_s = 0.0

    async def run(self) -> None:
        """Decode until `stop` was called; a step that has begun is finished and published."""
        while not self._is_stopping:
            await self._intake.wait_for_work()
            plan = self._scheduler.plan()
            outputs = []
            if plan is not None:
                result = await self._step(plan)
                outputs = self._processor.advance(plan, result, self._scheduler.sequence_at)
                self._scheduler.commit(plan, outputs)
            await self._publisher.publish(outputs)
            self._drop_lost()
            self._intake.step_done()
            if plan is None:
                await self._publisher.flush()
        await self._publisher.flush()

    def stop(self) -> None:
        """End `run` after the step that runs now."""
        self._is_stopping = True
        self._intake.close()

    async def _step(self, plan: StepPlan) -> StepResult:
        self.busy_since_s = started_s = time.monotonic()
        loop = asyncio.get_running_loop()
        result = await loop.run_in_executor(self._executor, self._engine.step, plan)
        self.busy_since_s = None
        step_s = time.monotonic() - started_s
        self.mean_step_s += (step_s - self.mean_step_s) * 0.1
        self._metrics.observe_step(plan, step_s, self._scheduler)
        return result

    def _drop_lost(self) -> None:
        for sequence in self._publisher.take_lost():
            self._scheduler.drop(sequence)
        for lease in self._publisher.take_overtaken():
            self._intake.add(lease)
