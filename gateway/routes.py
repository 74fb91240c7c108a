"""The table of routes: what the application serves and what /openapi.json describes, in one place."""

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

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
        return self.body is not None and 424 in self.errors

    @property
    def shown_path(self) -> str:
        """The path without the patterns of its parts."""
        return re.sub(r":[^}]+}", "}", self.path)


_PROMPT_ERRORS = (400, 401, 404, 408, 413, 415, 422, 429, 503)
_GENERATION_ERRORS = (400, 401, 404, 408, 409, 413, 415, 422, 424, 429, 503)
_generating = partial(Route, "POST", tag=GENERATION, needs_key=True, errors=_GENERATION_ERRORS)


def route_table() -> tuple[Route, ...]:
    """Every route of a gateway, in the order of the API's description."""
    return (
        *_native(),
        *_openai(),
        *_platforms(),
        *_tokens(),
        *_requests(),
        *_system(),
        *_docs_page(),
    )


def _native() -> tuple[Route, ...]:
    return (
        _generating(
            "/generate",
            generate.generate,
            summary="Generate an answer",
            body=GenerateBody,
            answer=GenerateAnswer,
        ),
        _generating(
            "/generate_stream",
            generate.generate_stream,
            summary="Generate a stream of tokens",
            body=GenerateBody,
            event=StreamEvent,
        ),
        _generating(
            "/",
            generate.compat_generate,
            summary="Generate an answer, or a stream",
            body=CompatBody,
            answer=GenerateAnswer,
            event=StreamEvent,
            is_array=True,
        ),
    )


def _openai() -> tuple[Route, ...]:
    generating = partial(_generating, tag=OPENAI, error=OpenAIErrorAnswer)
    return (
        generating(
            "/v1/completions",
            openai.completions,
            summary="Continue a prompt",
            body=CompletionBody,
            answer=CompletionAnswer,
            event=CompletionAnswer,
        ),
        generating(
            "/v1/chat/completions",
            openai.chat_completions,
            summary="Answer a conversation",
            body=ChatBody,
            answer=ChatAnswer,
            event=ChatChunk,
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
    )


def _platforms() -> tuple[Route, ...]:
    return (
        _generating(
            "/invocations",
            platforms.invocations,
            summary="Generate, as SageMaker asks",
            body=InvocationBody,
            answer=InvocationAnswer,
            event=InvocationEvent,
        ),
        _generating(
            "/vertex",
            platforms.vertex,
            summary="Generate, as Vertex AI asks",
            body=VertexBody,
            answer=VertexAnswer,
        ),
    )


def _tokens() -> tuple[Route, ...]:
    tokenizing = partial(Route, "POST", tag=TOKENS, needs_key=True, errors=_PROMPT_ERRORS)
    return (
        tokenizing(
            "/chat_tokenize",
            platforms.chat_tokenize,
            summary="Show the prompt of a conversation and its tokens",
            body=ChatBody,
            answer=ChatTokens,
        ),
        tokenizing(
            "/tokenize",
            generate.tokenize,
            summary="Show the tokens of a prompt",
            body=GenerateBody,
            answer=TokenSpan,
            is_array=True,
        ),
    )


def _requests() -> tuple[Route, ...]:
    route = partial(Route, tag=REQUESTS, needs_key=True, errors=(401, 404, 503))
    state = partial(route, path="/requests/{request_id}", answer=RequestStateAnswer)
    return (
        state("GET", handler=requests.status, summary="What became of a request"),
        route(
            "GET",
            "/requests/{request_id}/stream",
            requests.stream,
            summary="Read a stream again, or go on with it",
            event=StreamEvent,
            no_content="`Last-Event-ID` is the last event",
            errors=(401, 404, 409, 422, 429, 503),
        ),
        state("DELETE", handler=requests.cancel, summary="End a request"),
    )


def _system() -> tuple[Route, ...]:
    get = partial(Route, "GET")
    health = partial(get, handler=system.health, tag=SYSTEM, errors=(503,))
    return (
        get("/v1/models", system.models, OPENAI, "Which models are served", answer=ModelList),
        get("/info", system.info, SYSTEM, "Limits, models and workers", answer=Info),
        health("/health", summary="Can requests be served"),
        health("/health/ready", summary="Health, for probes"),
        get("/health/live", system.live, SYSTEM, "Does this process run"),
        get("/metrics", system.metrics, SYSTEM, "Metrics as Prometheus text", media="text/plain"),
        get("/openapi.json", docs.openapi, SYSTEM, "This description"),
        get("/api-doc/openapi.json", docs.openapi),
        health("/", summary="Health, as TGI has it"),
        health("/ping", summary="Health, for SageMaker"),
        get("/ready", system.health),
    )


def _docs_page() -> tuple[Route, ...]:
    return (
        Route("GET", "/docs", docs.static_file("docs.html")),
        Route("GET", "/docs/docs.css", docs.static_file("docs.css")),
        Route("GET", "/docs/docs.js", docs.static_file("docs.js")),
    )
