"""The worker's spans of a request, written when it has ended: queue wait, prefill and decode under one span.

They continue the trace that began with the HTTP request; its context came inside the request.
"""

import time

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Status, StatusCode, Tracer

from common.messages import Finish, Frame, GenerationRequest
from common.telemetry import extract

_NS = 1_000_000_000


class RequestSpans:
    """Writes the spans of the requests of one worker."""

    def __init__(self, tracer: Tracer, worker_id: str) -> None:
        self._tracer = tracer
        self._worker_id = worker_id

    def record(self, request: GenerationRequest, frame: Frame) -> None:
        """Spans of a request whose last frame is `frame` and has just been written."""
        if not request.traceparent:
            return
        finish, end_s = frame.finish, time.time()
        span = self._tracer.start_span(
            "generate",
            context=extract(request.traceparent),
            start_time=int((end_s - _total_s(finish)) * _NS),
            attributes={
                "tokenfleet.request_id": request.id,
                "tokenfleet.worker": self._worker_id,
                "gen_ai.request.model": request.model,
                "gen_ai.usage.input_tokens": len(request.prompt_tokens),
                "gen_ai.usage.output_tokens": finish.generated_tokens if finish else 0,
            },
        )
        if finish:
            self._record_phases(finish, end_s, trace.set_span_in_context(span, Context()))
        elif frame.failure:
            span.set_status(Status(StatusCode.ERROR, frame.failure.message))
        span.end(int(end_s * _NS))

    def _record_phases(self, finish: Finish, end_s: float, context: Context) -> None:
        start_s = end_s - _total_s(finish)
        phases = (
            ("queue", finish.queue_s),
            ("prefill", finish.prefill_s),
            ("decode", finish.decode_s),
        )
        for name, duration_s in phases:
            span = self._tracer.start_span(name, context=context, start_time=int(start_s * _NS))
            start_s += duration_s
            span.end(int(start_s * _NS))


def _total_s(finish: Finish | None) -> float:
    return finish.queue_s + finish.prefill_s + finish.decode_s if finish else 0.0
