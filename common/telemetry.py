"""Logs and traces of a process, and the trace context that travels inside a request.

Prompts and generated text are never logged: lines carry ids, counts and times.
"""

import json
import logging
import sys
import time
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def configure_logging(level: str, json_output: bool) -> None:
    """Send the process's log to stderr, as text for people or as one JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if json_output else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("aiohttp.access", "httpx", "filelock"):
        logging.getLogger(name).setLevel(logging.WARNING)


class TextFormatter(logging.Formatter):
    """`12:30:01.204 INFO  worker.service.loop: message  key=value ...`"""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{clock}.{int(record.msecs):03d} {record.levelname:<7} {record.name}: {record.getMessage()}"
        extras = "  ".join(f"{name}={value}" for name, value in extra_fields(record).items())
        text = f"{line}  {extras}" if extras else line
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class JsonFormatter(logging.Formatter):
    """One JSON object a line; what a log call passes as `extra` becomes fields."""

    def format(self, record: logging.LogRecord) -> str:
        body: dict[str, Any] = {
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "target": record.name,
            "message": record.getMessage(),
            **extra_fields(record),
        }
        if record.exc_info:
            body["exception"] = self.formatException(record.exc_info)
        return json.dumps(body, default=str)


def extra_fields(record: logging.LogRecord) -> dict[str, Any]:
    """What the log call passed as `extra`."""
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


def configure_tracing(endpoint: str | None, service_name: str) -> Tracer:
    """A tracer that exports to an OTLP/gRPC endpoint; without one its spans cost next to nothing."""
    if endpoint is None:
        return trace.NoOpTracer()
    # imported here: gRPC takes a third of a second and most processes do without
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    provider = TracerProvider(resource=Resource.create({"service.name": service_name}))
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https"))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider.get_tracer("tokenfleet")


def inject(context: Context | None = None) -> str:
    """The W3C `traceparent` of the current span, or of `context`; empty outside a trace."""
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, context)
    return carrier.get("traceparent", "")


def extract(traceparent: str) -> Context:
    """The context that `inject` wrote."""
    return TraceContextTextMapPropagator().extract({"traceparent": traceparent})
