"""What one HTTP request came to: filled in by its handler, read once at its end by the access log and its span."""

import time
from dataclasses import dataclass, field

from aiohttp import web

from common.messages import GenerationRequest, OnDisconnect


@dataclass(slots=True)
class RequestRecord:
    """Ids, counts and times of a request. Never text: prompts and answers do not belong into logs."""

    id: str
    started_at: float = field(default_factory=time.perf_counter)
    created_at: float = field(default_factory=time.time)  # Unix time, for people
    key: str | None = None  # the name of the API key
    model: str | None = None
    max_new_tokens: int | None = None
    on_disconnect: OnDisconnect = OnDisconnect.CANCEL
    known: GenerationRequest | None = None  # which another HTTP request has queued
    is_left: bool = False  # before its end was seen
    prompt_tokens: int | None = None
    generated_tokens: int | None = None
    seen_tokens: int = 0  # of these, what the client had read before
    finish_reason: str | None = None
    first_token_s: float | None = None  # after the arrival
    queue_s: float | None = None
    error_type: str | None = None

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.started_at

    @property
    def new_prompt_tokens(self) -> int:
        return 0 if self.known else self.prompt_tokens or 0

    @property
    def new_tokens(self) -> int:
        """Generated tokens that the client had not read before."""
        return max(0, (self.generated_tokens or 0) - self.seen_tokens)

    def fields(self) -> dict[str, str | int | float]:
        """Everything that is known, for the log."""
        names = (
            *("key", "model", "prompt_tokens", "generated_tokens", "finish_reason"),
            *("first_token_s", "queue_s", "error_type"),
        )
        known = {name: getattr(self, name) for name in names}
        return {
            name: round(value, 6) if isinstance(value, float) else value
            for name, value in known.items()
            if value is not None
        }


RECORD = web.RequestKey("record", RequestRecord)
