"""One worker process from start to end: load the model, announce it, decode, drain."""

import asyncio
import gc
import hashlib
import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import uvloop
from tokenizers import Tokenizer

from common.errors import FleetError, Unavailable
from common.faults import open_request_queue
from common.lua import until_answered
from common.messages import Frame, ModelCard
from common.redis_client import open_redis, wait_for_redis
from common.redis_keys import ModelKeys
from common.request_store import RequestStore
from common.telemetry import configure_logging, configure_tracing
from common.worker_registry import WorkerRegistry, WorkerStatus
from worker.engine.build import load_model
from worker.engine.loaded import LoadedModel
from worker.engine.request_limits import RequestLimits
from worker.engine.scheduler import Scheduler
from worker.engine.sequence import Sequence
from worker.metrics import WorkerMetrics
from worker.service.intake import Intake
from worker.service.lease import Heartbeat, Reaper
from worker.service.loop import DecodeLoop
from worker.service.orphans import OrphanWatch
from worker.service.output import OutputProcessor
from worker.service.publisher import Publisher
from worker.service.spans import RequestSpans
from worker.settings import WorkerSettings

logger = logging.getLogger(__name__)

_BROKER_TIMEOUT_S = 30.0
_CANCEL_AGAIN_S = 0.1
# The engine gives Python's lock up with every kernel, and publishing takes it. By default it would be
# 5 ms until the engine may ask for it back, several times a step.
_SWITCH_S = 0.0001
_ENGINE = "engine"
_LAST_STEP_S = 2.0  # for the step that runs when all else has ended
_RETIRE_S = 1.0  # what a stopping worker may spend on a broker that does not answer


def run(settings: WorkerSettings) -> int:
    """Serve until SIGTERM or SIGINT; the exit code."""
    configure_logging(settings.log_level, settings.json_output)
    sys.setswitchinterval(_SWITCH_S)
    executor = ThreadPoolExecutor(1, thread_name_prefix=_ENGINE)
    try:
        code = uvloop.run(_serve(settings, executor))
    except FleetError as error:
        logger.error("%s", error)
        code = 1
    executor.shutdown(wait=False, cancel_futures=True)
    _leave_hanging_step(code)
    return code


def _leave_hanging_step(code: int) -> None:
    """End the process if a step does not end by itself: Python would wait for its thread for ever."""
    for thread in threading.enumerate():
        if thread.name.startswith(_ENGINE):
            thread.join(_LAST_STEP_S)
            if thread.is_alive():
                logger.warning("the process ends in the middle of a step")
                logging.shutdown()
                os._exit(code)


async def _serve(settings: WorkerSettings, executor: ThreadPoolExecutor) -> int:
    started_s = time.monotonic()
    loading = asyncio.get_running_loop().run_in_executor(executor, load_model, settings)
    redis = open_redis(settings.redis_url)
    try:
        await wait_for_redis(redis, timeout_s=_BROKER_TIMEOUT_S)
        loaded = await loading
        gc.freeze()  # libraries and model are here to stay: a full collection need not walk through them
        logger.info(
            "model loaded",
            extra={
                "model": settings.model_name,
                "served_by": loaded.served_by,
                "kv_tokens": loaded.layout.num_tokens,
                "load_s": round(time.monotonic() - started_s, 2),
            },
        )
        return await Worker(settings, loaded, redis, executor).serve()
    finally:
        await redis.aclose()


class Worker:
    """A loaded model and everything that runs around it."""

    def __init__(self, settings: WorkerSettings, loaded: LoadedModel, redis, executor) -> None:
        self._settings = settings
        self._loaded = loaded
        self._id = f"worker-{uuid.uuid4().hex[:12]}"
        self._state = "ready"
        self._card = card = _card(settings, loaded)
        self._metrics = WorkerMetrics(loaded.layout)
        self._queue = open_request_queue(redis, ModelKeys(card.model), fault_at=settings.fault_at)
        self._scheduler = Scheduler(
            loaded.layout,
            max_step_tokens=max(settings.max_batch_prefill_tokens, loaded.layout.num_slots),
            limits=RequestLimits(card.max_total_tokens, card.vocab_size),
            prefix_caching=settings.prefix_caching and loaded.has_paged_cache,
            salt=f"{card.model}:{card.revision}:{card.dtype}:{card.quantization}",
            has_spare_memory=loaded.has_spare_memory,
        )
        tokenizer = Tokenizer.from_str(loaded.tokenizer_json)
        processor = OutputProcessor(
            tokenizer,
            eos_tokens=frozenset(loaded.eos_tokens),
            special_tokens=_special_tokens(tokenizer),
            continues_prompt=not loaded.is_encoder_decoder,
        )
        tracer = configure_tracing(settings.otlp_endpoint, settings.otlp_service_name)
        self._spans = RequestSpans(tracer, self._id)
        self._publisher = Publisher(self._queue, on_end=self._on_end)
        self._intake = Intake(
            self._queue,
            self._id,
            self._scheduler,
            processor,
            self._publisher,
            decoder_start_token=loaded.decoder_start_token,
        )
        self._loop = DecodeLoop(
            self._scheduler,
            loaded.engine,
            processor,
            self._intake,
            self._publisher,
            executor=executor,
            metrics=self._metrics,
        )
        self._registry = WorkerRegistry(redis)
        self._heartbeat = Heartbeat(
            self._registry,
            card,
            loaded.tokenizer_json.encode(),
            lease_s=settings.lease_s,
            step_timeout_s=settings.step_timeout_s,
            status=self._status,
            busy_since_s=lambda: self._loop.busy_since_s,
        )
        self._reaper = Reaper(self._queue, lease_s=settings.lease_s)
        store = RequestStore(redis, ModelKeys(card.model))
        self._orphans = OrphanWatch(store)

    async def serve(self) -> int:
        """Decode until a signal comes or a task fails; then hand back what is left."""
        stopping = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stopping.set)
        if self._settings.metrics_port:
            self._metrics.serve(self._settings.metrics_port)
        await until_answered(self._queue.create_group, patience_s=_BROKER_TIMEOUT_S)
        await until_answered(self._heartbeat.announce, patience_s=_BROKER_TIMEOUT_S)
        logger.info("ready", extra={"worker": self._id, "model": self._card.model})
        tasks = {
            name: asyncio.create_task(coroutine, name=name)
            for name, coroutine in (
                ("decode", self._loop.run()),
                ("intake", self._intake.run()),
                ("heartbeat", self._heartbeat.run()),
                ("reaper", self._reaper.run()),
                ("orphans", self._orphans.run()),
                ("stop", stopping.wait()),
            )
        }
        done, _ = await asyncio.wait(tasks.values(), return_when=asyncio.FIRST_COMPLETED)
        failed = [task for task in done if task.get_name() != "stop"]
        await self._drain(tasks, has_failed=bool(failed))
        return _report(failed)

    async def _drain(self, tasks: dict[str, asyncio.Task], *, has_failed: bool) -> None:
        """Take nothing new, finish or hand back what runs, and leave the registry."""
        self._state = "draining"
        await _cancel([tasks["intake"]])
        if not has_failed and not await self._has_peers():
            await self._finish_running(tasks["decode"])
        self._loop.stop()
        if not has_failed:
            await asyncio.wait([tasks["decode"]], timeout=self._settings.lease_s)
            num_released = await self._publisher.release_all()
            logger.info("drained", extra={"worker": self._id, "handed_back": num_released})
        await _cancel(tasks.values())
        self._loaded.engine.close()
        try:
            await until_answered(self._heartbeat.retire, patience_s=_RETIRE_S)
        except Unavailable as error:
            logger.warning("not taken out of the registry, it will expire: %s", error)

    async def _finish_running(self, decode: asyncio.Task) -> None:
        """Nobody else could go on with what runs here: let it end, for a while."""
        give_up_at = time.monotonic() + self._settings.drain_s
        while self._publisher.num_live and time.monotonic() < give_up_at and not decode.done():
            await asyncio.sleep(0.02)

    async def _has_peers(self) -> bool:
        """Whether another worker of this model is there to go on."""

        async def ask() -> list[WorkerStatus]:
            return await self._registry.workers(self._card.model)

        try:
            statuses = await until_answered(ask, patience_s=_RETIRE_S)
        except Unavailable as error:
            logger.warning("cannot see whether other workers are there: %s", error)
            return False
        return any(
            status.id != self._id
            and status.state == "ready"
            and status.seen_s < self._settings.lease_s
            for status in statuses
        )

    def _on_end(self, sequence: Sequence, frame: Frame) -> None:
        self._metrics.observe_end(frame)
        self._metrics.observe_leases(self._publisher.num_live)
        self._spans.record(sequence.request, frame)

    def _status(self) -> WorkerStatus:
        scheduler, step_s = self._scheduler, self._loop.mean_step_s
        return WorkerStatus(
            id=self._id,
            model=self._card.model,
            state=self._state,
            slots=self._loaded.layout.num_slots,
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            kv_used=round(scheduler.num_used_blocks / self._loaded.layout.num_blocks, 4),
            step_s=round(step_s, 6),
            tokens_per_s=round(scheduler.num_running / step_s, 1) if step_s else 0.0,
            shards=self._settings.num_shard,
            version=self._card.version,
        )


def _card(settings: WorkerSettings, loaded: LoadedModel) -> ModelCard:
    max_total_tokens = min(
        settings.max_total_tokens or loaded.max_total_tokens, loaded.layout.num_tokens
    )
    return ModelCard(
        model=settings.model_name,
        max_input_tokens=min(
            settings.max_input_tokens or max_total_tokens - 1, max_total_tokens - 1
        ),
        max_total_tokens=max_total_tokens,
        vocab_size=loaded.vocab_size,
        tokenizer_digest=hashlib.sha256(loaded.tokenizer_json.encode()).hexdigest()[:16],
        revision=loaded.revision,
        architecture=loaded.architecture,
        is_encoder_decoder=loaded.is_encoder_decoder,
        served_by=loaded.served_by,
        dtype=loaded.dtype,
        device=loaded.device,
        quantization=loaded.quantization,
        eos_tokens=loaded.eos_tokens,
        bos_token=loaded.bos_token,
        eos_token=loaded.eos_token,
        chat_template=loaded.chat_template,
        prompt_style=loaded.prompt_style,
        keeps_special_tokens=loaded.keeps_special_tokens,
        max_batch_total_tokens=loaded.layout.num_tokens,
        version=version("tokenfleet"),
    )


def _special_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(number for number, token in added.items() if token.special)


async def _cancel(tasks: Iterable[asyncio.Task]) -> None:
    """End tasks, however often they must be told: `asyncio.wait_for` of Python 3.11, which the Redis client uses,
    forgets a cancellation that comes in the moment when what it waits for is done."""
    tasks = list(tasks)
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_CANCEL_AGAIN_S)
    await asyncio.gather(*tasks, return_exceptions=True)


def _report(failed: list[asyncio.Task]) -> int:
    """Log what ended the worker, if anything did; the exit code."""
    for task in failed:
        error = task.exception()
        if isinstance(error, FleetError):  # its message says it all
            logger.error("%s task failed, the worker ends: %s", task.get_name(), error)
        else:
            logger.error("%s task failed, the worker ends", task.get_name(), exc_info=error)
    return 1 if failed else 0
