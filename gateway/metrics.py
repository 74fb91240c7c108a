"""Every metric of a gateway. The tgi_* names, kinds and duration buckets are TGI's, so that its dashboards keep working."""

import asyncio

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from common.errors import FleetError
from common.messages import Finish, GenerationRequest
from gateway.latency_histogram import LatencyHistogram

DURATION_BUCKETS = tuple(0.0001 * 1.5**step for step in range(1, 36))  # TGI's: 150 us to 146 s
LATENCY_BUCKETS = (
    *(0.0005, 0.001, 0.002, 0.004, 0.008, 0.012, 0.016, 0.024, 0.032, 0.048, 0.064, 0.1),
    *(0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
# TGI cuts its model's limit into a hundred steps; a gateway serves many models, so these grow by factors instead
TOKEN_BUCKETS = tuple(
    count * scale for scale in (1, 10, 100, 1000, 10_000, 100_000) for count in (1, 2, 3, 5, 7)
)

_FAILURE_LABELS = {
    "deadline": "generation",
    "stream_diverged": "incomplete",
    "cancelled": "dropped",
}


class GatewayMetrics:
    """The instruments of one process. A counter named tgi_* is exposed without `_total`, as TGI does."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.request_count = self._counter("tgi_request_count", "Generation requests received")
        self.request_success = self._counter("tgi_request_success", "Generation requests answered")
        self.request_failure = self._counter(
            "tgi_request_failure", "Generation requests that failed, by reason", "err"
        )
        duration = self._duration
        self.request_duration = duration("tgi_request_duration", "From arrival to the last token")
        self.validation_duration = duration(
            "tgi_request_validation_duration", "From arrival to the queue"
        )
        self.queue_duration = duration("tgi_request_queue_duration", "From the queue to a worker")
        self.inference_duration = duration(
            "tgi_request_inference_duration", "From a worker's start to the last token"
        )
        self.mean_time_per_token = duration(
            "tgi_request_mean_time_per_token_duration", "Inference time by generated tokens"
        )
        self.generated_tokens = self._tokens("tgi_request_generated_tokens", "Tokens of an answer")
        self.input_length = self._tokens("tgi_request_input_length", "Tokens of a prompt")
        self.max_new_tokens = self._tokens(
            "tgi_request_max_new_tokens", "Longest answer that was allowed"
        )
        self.time_to_first_token = self._latency(
            "tokenfleet_time_to_first_token_seconds", "From the queue to the first token"
        )
        self.inter_token_latency = LatencyHistogram(
            "tokenfleet_inter_token_latency_seconds",
            "Between two frames of a stream, in seconds",
            registry=self.registry,
            bounds=LATENCY_BUCKETS,
        )
        self.queue_wait = self._latency(
            "tokenfleet_queue_wait_seconds", "From the queue to a worker, by the broker's clock"
        )
        self.tokens = self._counter(
            "tokenfleet_tokens", "Tokens, by model and kind", "model", "kind"
        )
        self.restored = self._counter(
            "tokenfleet_restored_requests",
            "Times that a broker was given back a request or frames that it had lost",
            "model",
        )
        self.open_requests = Gauge(
            "tokenfleet_open_requests", "Generations held open", registry=self.registry
        )

        self.key_tokens = self._counter(
            "tokenfleet_key_tokens", "Tokens, by the API key's name and kind", "key", "kind"
        )
        self.key_requests = self._counter(
            "tokenfleet_key_requests", "Generation requests, by the API key's name", "key"
        )
        self.key_refusals = self._counter(
            "tokenfleet_key_refusals", "Requests over a limit of their API key", "key"
        )

    def observe_key(
        self, name: str, prompt_tokens: int | None, generated_tokens: int | None
    ) -> None:
        """A generation request of an API key has ended."""
        self.key_requests.labels(name).inc()
        self.key_tokens.labels(name, "prompt").inc(prompt_tokens or 0)
        self.key_tokens.labels(name, "generated").inc(generated_tokens or 0)

    def observe_start(self, request: GenerationRequest, *, validation_s: float) -> None:
        """A request has passed validation."""
        self.validation_duration.observe(validation_s)
        self.input_length.observe(len(request.prompt_tokens))
        self.max_new_tokens.observe(request.stopping.max_new_tokens)

    def observe_finish(self, request: GenerationRequest, finish: Finish) -> None:
        """A sequence has ended well."""
        inference_s = finish.prefill_s + finish.decode_s
        self.queue_duration.observe(finish.queue_s)
        self.queue_wait.labels(request.model).observe(finish.queue_s)
        self.inference_duration.observe(inference_s)
        self.mean_time_per_token.observe(inference_s / max(1, finish.generated_tokens))
        self.generated_tokens.observe(finish.generated_tokens)
        tokens = self.tokens.labels
        tokens(request.model, "prompt").inc(len(request.prompt_tokens))
        tokens(request.model, "cached").inc(finish.cached_tokens)
        tokens(request.model, "generated").inc(finish.generated_tokens)

    def observe_success(self, *, duration_s: float) -> None:
        """A request was answered completely."""
        self.request_success.inc()
        self.request_duration.observe(duration_s)

    def observe_failure(self, error: BaseException) -> None:
        """A request was not answered completely."""
        self.request_failure.labels(failure_label(error)).inc()

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(name, help, labels, registry=self.registry)

    def _duration(self, name: str, help: str) -> Histogram:
        return Histogram(
            name, f"{help}, in seconds", registry=self.registry, buckets=DURATION_BUCKETS
        )

    def _tokens(self, name: str, help: str) -> Histogram:
        return Histogram(name, help, registry=self.registry, buckets=TOKEN_BUCKETS)

    def _latency(self, name: str, help: str) -> Histogram:
        return Histogram(
            name, f"{help}, in seconds", ["model"], registry=self.registry, buckets=LATENCY_BUCKETS
        )


def failure_label(error: BaseException) -> str:
    """TGI's word for a failure; `dropped` when the client went away, `internal` for a defect of ours."""
    if isinstance(error, FleetError):
        return _FAILURE_LABELS.get(error.kind, error.kind)
    is_dropped = isinstance(error, ConnectionError | asyncio.CancelledError)
    return "dropped" if is_dropped else "internal"
