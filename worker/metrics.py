"""Every metric of a worker. Names are TGI's where the meaning is the same."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from common.messages import Frame
from worker.engine.plan import KvCacheLayout, StepPlan
from worker.engine.scheduler import Scheduler

_STEP_BUCKETS = tuple(0.0001 * 1.5**power for power in range(1, 36))
_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class WorkerMetrics:
    """The worker's own registry, served on its own port."""

    def __init__(self, layout: KvCacheLayout) -> None:
        self._layout = layout
        self.registry = registry = CollectorRegistry()
        self._batch_size = Gauge(
            "tgi_batch_current_size", "Sequences that ran in the last step", registry=registry
        )
        self._batch_tokens = Gauge(
            "tgi_batch_current_max_tokens", "Tokens of KV cache in use", registry=registry
        )
        self._forward_s = Histogram(
            "tgi_batch_forward_duration",
            "Time of one step in seconds",
            ["method"],
            buckets=_STEP_BUCKETS,
            registry=registry,
        )
        self._next_size = Histogram(
            "tgi_batch_next_size", "Sequences in a step", buckets=_SIZE_BUCKETS, registry=registry
        )
        self._tokens = Counter(
            "tokenfleet_worker_tokens", "Tokens run by kind", ["kind"], registry=registry
        )
        self._kv_used = Gauge(
            "tokenfleet_worker_kv_cache_used_ratio", "Share of KV blocks in use", registry=registry
        )
        self._waiting = Gauge(
            "tokenfleet_worker_waiting", "Requests leased but not yet started", registry=registry
        )
        self._preemptions = Gauge(
            "tokenfleet_worker_preemptions", "Sequences preempted so far", registry=registry
        )
        self._prefix_tokens = Gauge(
            "tokenfleet_worker_prefix_tokens",
            "Prompt tokens looked up in the prefix cache, and found there",
            ["result"],
            registry=registry,
        )
        self._leases = Gauge("tokenfleet_worker_leases", "Requests held now", registry=registry)
        self._ended = Counter(
            "tokenfleet_worker_requests", "Requests ended by reason", ["reason"], registry=registry
        )
        self._queue_s = Histogram(
            "tokenfleet_worker_queue_wait_seconds",
            "Time from enqueueing to lease",
            buckets=_STEP_BUCKETS,
            registry=registry,
        )

    def serve(self, port: int) -> None:
        """Answer Prometheus on a port, in a thread of its own."""
        start_http_server(port, registry=self.registry)

    def observe_step(self, plan: StepPlan, step_s: float, scheduler: Scheduler) -> None:
        num_decoding = sum(len(chunk.tokens) == 1 and chunk.is_sampled for chunk in plan.chunks)
        num_prefill = plan.num_tokens - num_decoding
        self._forward_s.labels("prefill" if num_prefill else "decode").observe(step_s)
        self._batch_size.set(len(plan.chunks))
        self._next_size.observe(len(plan.chunks))
        self._tokens.labels("decode").inc(num_decoding)
        self._tokens.labels("prefill").inc(num_prefill)
        self._kv_used.set(scheduler.num_used_blocks / self._layout.num_blocks)
        self._batch_tokens.set(scheduler.num_used_blocks * self._layout.block_size)
        self._waiting.set(scheduler.num_waiting)
        self._preemptions.set(scheduler.num_preemptions)
        self._prefix_tokens.labels("queried").set(scheduler.num_prefix_query_tokens)
        self._prefix_tokens.labels("hit").set(scheduler.num_prefix_hit_tokens)

    def observe_leases(self, num_live: int) -> None:
        self._leases.set(num_live)

    def observe_end(self, frame: Frame) -> None:
        if frame.finish:
            self._ended.labels(frame.finish.reason.value).inc()
            self._queue_s.observe(frame.finish.queue_s)
        elif frame.failure:
            self._ended.labels(frame.failure.kind).inc()
