"""What a client says of coming back: headers of a request, and the id of an event. Knows neither queue nor journal.

Idempotency-Key: <any text>                retries and duplicates attach to the one generation
Last-Event-ID: <request id>:<index>-<hash> go on behind this event
X-On-Disconnect: cancel | grace | run      what becomes of the generation when nobody reads it
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Self

from aiohttp import web
from pydantic import BaseModel

from common.errors import ValidationError
from common.messages import OnDisconnect

GRACE_S = 10.0
LONGEST_KEY = 255
# An id goes into headers of answers, so it has no space and no control character.
EVENT_ID = r"([!-9;-~]{1,255}):([0-9]{1,9})-((?:[0-9a-f]{2})*)"


@dataclass(frozen=True, slots=True)
class EventId:
    """Names a frame of a request's journal; `chain` is the hash of everything up to it."""

    request_id: str
    index: int
    chain: bytes

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValidationError for what no gateway has written."""
        match = re.fullmatch(EVENT_ID, text.strip())
        if match is None:
            raise ValidationError(
                "Input validation error: `Last-Event-ID` must be the id of an event of this API, "
                f"`<request id>:<index>-<hash>`. Given: {text[:100]}"
            )
        return cls(match[1], int(match[2]), bytes.fromhex(match[3]))


@dataclass(frozen=True, slots=True)
class Terms:
    """How a client wants to be served when connections break."""

    request_id: str | None  # None: a new one
    last_event: EventId | None
    on_disconnect: OnDisconnect


def terms_of(request: web.Request, *, tenant: str = "") -> Terms:
    """The terms of a POST. Raises ValidationError."""
    key = request.headers.get("idempotency-key")
    last_event = last_event_of(request)
    request_id = None if key is None else _id_of_key(key, tenant)
    if last_event is not None:
        if request_id not in (None, last_event.request_id):
            raise ValidationError(
                "Input validation error: `Last-Event-ID` is of another request than the one of "
                "this `Idempotency-Key`; leave out one of them"
            )
        request_id = last_event.request_id
    default = OnDisconnect.CANCEL if request_id is None else OnDisconnect.GRACE
    return Terms(request_id, last_event, _policy_of(request) or default)


def last_event_of(request: web.Request) -> EventId | None:
    """The event behind which the client goes on. Raises ValidationError."""
    text = request.headers.get("last-event-id", "")
    return EventId.parse(text) if text else None


def fingerprint_of(body: BaseModel, *context: str) -> str:
    """Two bodies with the same fingerprint ask for the same generation; `context` is what headers say of it."""
    text = "\0".join((body.model_dump_json(), *filter(None, context)))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def seed_of(request_id: str) -> int:
    """The seed of a retryable request that names none: should it have to begin anew, it tells the same."""
    return int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest(), "little")


def _id_of_key(key: str, tenant: str) -> str:
    if not 0 < len(key) <= LONGEST_KEY:
        raise ValidationError(
            f"Input validation error: `Idempotency-Key` must have 1 to {LONGEST_KEY} characters. "
            f"Given: {len(key)}"
        )
    text = f"{tenant}\0{key}".encode("utf-8", "surrogateescape")
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def _policy_of(request: web.Request) -> OnDisconnect | None:
    text = request.headers.get("x-on-disconnect")
    if text is None:
        return None
    try:
        return OnDisconnect(text.strip().lower())
    except ValueError:
        raise ValidationError(
            "Input validation error: `X-On-Disconnect` must be `cancel`, `grace` or `run`. "
            f"Given: {text[:100]}"
        ) from None
