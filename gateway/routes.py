"""The table of routes: what the application serves and what /openapi.json describes, in one place."""

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web
from pydantic import BaseModel

from gateway.handlers import docs, generate, openai, platforms, requests, system
from gateway.schemas.native import CompatBody, GenerateBody
from gateway.schemas.native_answers import (
    ErrorAnswer,
    GenerateAnswer,
    RequestStateAnswer,
    StreamEvent,
    TokenSpan,
)
from gateway.schemas.openai import ChatBody, CompletionBody
from gateway.schemas.openai_answers import (
    ChatAnswer,
    ChatChunk,
    CompletionAnswer,
    OpenAIErrorAnswer,
)
from gateway.schemas.platforms import (
    ChatTokens,
    InvocationAnswer,
    InvocationBody,
    InvocationEvent,
    VertexAnswer,
    VertexBody,
)
from gateway.schemas.system import Info, ModelEntry, ModelList

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

GENERATION, OPENAI, TOKENS = "Generation", "OpenAI", "Tokens"
REQUESTS, SYSTEM = "Requests", "System"


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
    media: str = ""  # the type of an answer that is no JSON
    no_content: str = ""  # when the answer is 204
    needs_key: bool = False
    errors: tuple[int, ...] = ()
    error: type[BaseModel] = ErrorAnswer

    @property
    def description(self) -> str:
        return (self.handler.__doc__ or "").strip()

    @property
    def generates(self) -> bool:
        """Whether it puts a generation on the queue."""
        return self.body is not None and 429 in self.errors

    @property
    def shown_path(self) -> str:
        """The path without the patterns of its parts."""
        return re.sub(r":[^}]+}", "}", self.path)


_GENERATION_ERRORS = (400, 401, 404, 408, 409, 413, 415, 422, 424, 429, 503)


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
            "/v1/completions",
            openai.completions,
            OPENAI,
            "Continue a prompt",
            body=CompletionBody,
            answer=CompletionAnswer,
            event=CompletionAnswer,
            needs_key=True,
            errors=_GENERATION_ERRORS,
            error=OpenAIErrorAnswer,
        ),
        Route(
            "POST",
            "/v1/chat/completions",
            openai.chat_completions,
            OPENAI,
            "Answer a conversation",
            body=ChatBody,
            answer=ChatAnswer,
            event=ChatChunk,
            needs_key=True,
            errors=_GENERATION_ERRORS,
            error=OpenAIErrorAnswer,
        ),
        Route(
            "GET",
            "/v1/models/{model:.+}",
            openai.model,
            OPENAI,
            "Is a model served",
            answer=ModelEntry,
            errors=(404, 503),
            error=OpenAIErrorAnswer,
        ),
        Route(
            "POST",
            "/invocations",
            platforms.invocations,
            GENERATION,
            "Generate, as SageMaker asks",
            body=InvocationBody,
            answer=InvocationAnswer,
            event=InvocationEvent,
            needs_key=True,
            errors=_GENERATION_ERRORS,
        ),
        Route(
            "POST",
            "/vertex",
            platforms.vertex,
            GENERATION,
            "Generate, as Vertex AI asks",
            body=VertexBody,
            answer=VertexAnswer,
            needs_key=True,
            errors=_GENERATION_ERRORS,
        ),
        Route(
            "POST",
            "/chat_tokenize",
            platforms.chat_tokenize,
            TOKENS,
            "Show the prompt of a conversation and its tokens",
            body=ChatBody,
            answer=ChatTokens,
            needs_key=True,
            errors=(400, 401, 404, 408, 413, 415, 422, 503),
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
            errors=(400, 401, 404, 408, 413, 415, 422, 503),
        ),
        Route(
            "GET",
            "/requests/{request_id}",
            requests.status,
            REQUESTS,
            "What became of a request",
            answer=RequestStateAnswer,
            needs_key=True,
            errors=(401, 404, 503),
        ),
        Route(
            "GET",
            "/requests/{request_id}/stream",
            requests.stream,
            REQUESTS,
            "Read a stream again, or go on with it",
            event=StreamEvent,
            no_content="`Last-Event-ID` is the last event",
            needs_key=True,
            errors=(401, 404, 409, 422, 429, 503),
        ),
        Route(
            "DELETE",
            "/requests/{request_id}",
            requests.cancel,
            REQUESTS,
            "End a request",
            answer=RequestStateAnswer,
            needs_key=True,
            errors=(401, 404, 503),
        ),
        Route(
            "GET", "/v1/models", system.models, OPENAI, "Which models are served", answer=ModelList
        ),
        Route("GET", "/info", system.info, SYSTEM, "Limits, models and workers", answer=Info),
        Route("GET", "/health", system.health, SYSTEM, "Can requests be served", errors=(503,)),
        Route("GET", "/health/ready", system.health, SYSTEM, "Health, for probes", errors=(503,)),
        Route("GET", "/health/live", system.live, SYSTEM, "Does this process run"),
        Route(
            "GET",
            "/metrics",
            system.metrics,
            SYSTEM,
            "Metrics as Prometheus text",
            media="text/plain",
        ),
        Route("GET", "/openapi.json", docs.openapi, SYSTEM, "This description"),
        Route("GET", "/api-doc/openapi.json", docs.openapi),
        Route("GET", "/", system.health, SYSTEM, "Health, as TGI has it", errors=(503,)),
        Route("GET", "/ping", system.health, SYSTEM, "Health, for SageMaker", errors=(503,)),
        Route("GET", "/ready", system.health),
        Route("GET", "/docs", docs.static_file("docs.html")),
        Route("GET", "/docs/docs.css", docs.static_file("docs.css")),
        Route("GET", "/docs/docs.js", docs.static_file("docs.js")),
    )
