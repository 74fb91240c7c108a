"""The table of routes: what the application serves and what /openapi.json describes, in one place."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web
from pydantic import BaseModel

from gateway.handlers import docs, generate, system
from gateway.schemas.native import (
    CompatBody,
    ErrorAnswer,
    GenerateAnswer,
    GenerateBody,
    ModelList,
    StreamEvent,
    TokenSpan,
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

GENERATION, TOKENS, SYSTEM = "Generation", "Tokens", "System"


@dataclass(frozen=True, slots=True)
class Route:
    """One route. Those without a tag are left out of the API's description."""

    method: str
    path: str
    handler: Handler
    tag: str = ""
    summary: str = ""
    body: type[BaseModel] | None = None
    answer: type[BaseModel] | None = None
    event: type[BaseModel] | None = None  # of a stream
    is_array: bool = False  # the answer is an array of `answer`
    needs_key: bool = False
    errors: tuple[int, ...] = ()

    @property
    def description(self) -> str:
        return (self.handler.__doc__ or "").strip()


_GENERATION_ERRORS = (400, 401, 404, 413, 415, 422, 424, 429, 503)
ERROR_ANSWER = ErrorAnswer


def route_table() -> tuple[Route, ...]:
    """Every route of a gateway."""
    return (
        Route(
            "POST",
            "/generate",
            generate.generate,
            GENERATION,
            "Generate an answer",
            body=GenerateBody,
            answer=GenerateAnswer,
            needs_key=True,
            errors=_GENERATION_ERRORS,
        ),
        Route(
            "POST",
            "/generate_stream",
            generate.generate_stream,
            GENERATION,
            "Generate a stream of tokens",
            body=GenerateBody,
            event=StreamEvent,
            needs_key=True,
            errors=_GENERATION_ERRORS,
        ),
        Route(
            "POST",
            "/",
            generate.compat_generate,
            GENERATION,
            "Generate an answer, or a stream",
            body=CompatBody,
            answer=GenerateAnswer,
            event=StreamEvent,
            is_array=True,
            needs_key=True,
            errors=_GENERATION_ERRORS,
        ),
        Route(
            "POST",
            "/tokenize",
            generate.tokenize,
            TOKENS,
            "Show the tokens of a prompt",
            body=GenerateBody,
            answer=TokenSpan,
            is_array=True,
            needs_key=True,
            errors=(400, 401, 404, 413, 415, 422, 503),
        ),
        Route(
            "GET", "/v1/models", system.models, SYSTEM, "Which models are served", answer=ModelList
        ),
        Route("GET", "/info", system.info, SYSTEM, "Limits, models and workers"),
        Route("GET", "/health", system.health, SYSTEM, "Can requests be served", errors=(503,)),
        Route("GET", "/health/ready", system.health, SYSTEM, "The same, for probes", errors=(503,)),
        Route("GET", "/health/live", system.live, SYSTEM, "Does this process run"),
        Route("GET", "/metrics", system.metrics, SYSTEM, "Metrics as Prometheus text"),
        Route("GET", "/openapi.json", docs.openapi, SYSTEM, "This description"),
        Route("GET", "/api-doc/openapi.json", docs.openapi),
        Route("GET", "/", system.health),
        Route("GET", "/ping", system.health),
        Route("GET", "/ready", system.health),
        Route("GET", "/docs", docs.static_file("docs.html")),
        Route("GET", "/docs/docs.css", docs.static_file("docs.css")),
        Route("GET", "/docs/docs.js", docs.static_file("docs.js")),
    )
