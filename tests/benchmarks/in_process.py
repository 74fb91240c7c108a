"""A worker's scheduler, engine and text, called without queue, gateway, HTTP or threads.

It is what `queue_price.py` subtracts: the shortest way from a prompt to its tokens.
"""

import heapq
import itertools
import time

from tokenizers import Tokenizer

from common.messages import GenerationRequest, Sampling, Stopping
from tests.benchmarks.client import RequestRecord
from tests.benchmarks.load import Load
from tests.benchmarks.report import Level, summarize
from worker.engine.build import load_model
from worker.engine.scheduler import Scheduler
from worker.engine.sequence import Sequence
from worker.service.output import Output, OutputProcessor
from worker.settings import WorkerSettings


def measure_in_process(num_users: int, load: Load, *, step_ms: float) -> Level:
    """A closed loop of `num_users` on the echo model; a request a user warms up, uncounted."""
    engine = InProcessWorker(WorkerSettings(model_id="echo", echo_delay_ms=step_ms))
    indices = itertools.count()
    try:
        engine.run(num_users, num_users, load, indices)
        cpu_start, start = time.process_time(), time.perf_counter()
        records = engine.run(num_users, load.num_requests, load, indices)
        wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
    finally:
        engine.close()
    return summarize(records, unit="users", value=num_users, wall_s=wall_s, client_cpu_s=cpu_s)


class InProcessWorker:
    """Plans, steps, advances and commits as `worker.service.loop` does, in one thread."""

    def __init__(self, settings: WorkerSettings) -> None:
        loaded = load_model(settings)
        self._num_begun = 0
        self._engine = loaded.engine
        self._tokenizer = Tokenizer.from_str(loaded.tokenizer_json)
        self._scheduler = Scheduler(
            loaded.layout,
            max_step_tokens=max(settings.max_batch_prefill_tokens, loaded.layout.num_slots),
            prefix_caching=settings.prefix_caching,
        )
        self._processor = OutputProcessor(
            self._tokenizer, eos_tokens=frozenset(loaded.eos_tokens), special_tokens=frozenset()
        )

    def close(self) -> None:
        self._engine.close()

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def begin(self, prompt: str, num_tokens: int) -> Sequence:
        """A sequence that the next step takes up: greedy, of exactly `num_tokens` tokens."""
        self._num_begun += 1
        sequence = Sequence(
            GenerationRequest(
                id=f"direct-{self._num_begun}",
                model="echo",
                prompt_tokens=tuple(self._tokenizer.encode(prompt).ids),
                sampling=Sampling(),
                stopping=Stopping(num_tokens, ignore_eos=True),
            )
        )
        self._processor.start(sequence)
        self._scheduler.add(sequence)
        return sequence

    def step(self) -> list[Output]:
        """One step; nothing when there is nothing to do."""
        plan = self._scheduler.plan()
        if plan is None:
            return []
        result = self._engine.step(plan)
        outputs = self._processor.advance(plan, result, self._scheduler.sequence_at)
        self._scheduler.commit(plan, outputs)
        return outputs

    def run(
        self, num_users: int, num_requests: int, load: Load, indices: itertools.count
    ) -> list[RequestRecord]:
        """`num_requests` requests, `num_users` at a time: one that ends makes room for the next.

        One that arrives within a step waits for its end, and the wait counts.
        """
        records: dict[Sequence, RequestRecord] = {}
        arrivals: list[tuple[float, int]] = []  # a heap of times and numbers of requests
        numbers = iter(range(num_requests))

        def expect(now: float) -> None:
            if (number := next(numbers, None)) is not None:
                heapq.heappush(arrivals, (now + load.pause_s(number), number))

        def admit() -> None:
            while arrivals and arrivals[0][0] <= time.perf_counter():
                at, number = heapq.heappop(arrivals)
                num_tokens = load.tokens_of(number, num_users)
                sequence = self.begin(load.prompt(next(indices)), num_tokens)
                records[sequence] = RequestRecord(at, at)

        for _ in range(num_users):
            expect(time.perf_counter())
        while arrivals or self.has_work:
            admit()
            if not self.has_work:
                time.sleep(max(0.0, arrivals[0][0] - time.perf_counter()))
                continue
            outputs = self.step()
            now = time.perf_counter()
            for output in outputs:
                record = records[output.sequence]
                record.token_times.append(now)
                record.ended_at = now
                if output.frame.is_terminal:
                    expect(now)
        return list(records.values())
