"""What one HTTP request came to: filled in by its handler, read once at its end by the access log and its span."""

import time
from dataclasses import dataclass, field

from aiohttp import web

from common.messages import OnDisconnect


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
    is_left: bool = False  # by its client, before the end
    prompt_tokens: int | None = None
    generated_tokens: int | None = None
    finish_reason: str | None = None
    first_token_s: float | None = None  # after the arrival
    queue_s: float | None = None
    error_type: str | None = None

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.started_at

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
