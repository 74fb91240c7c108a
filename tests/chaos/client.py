"""A client that reads a stream to its end whatever breaks, and notes what it saw and how long it waited.

A plain client has one connection. A resuming one comes back, to any gateway, with its key and the last event's id: as the
same POST again, or as a GET of the stream.
"""

import asyncio
import json
import random
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field

import aiohttp

from common.messages import (
    Finish,
    FinishReason,
    Frame,
    GenerationRequest,
    Sampling,
    Stopping,
    Token,
)
from tests.simulation.streams import SeenStream

END_AFTER_S = 60.0
_LOST = (aiohttp.ClientError, ConnectionError, asyncio.TimeoutError)


@dataclass(slots=True)
class Observation:
    """A stream and its timing."""

    seen: SeenStream
    is_resuming: bool
    longest_gap_s: float = 0.0
    refusals: int = 0  # 429 and 503 before the stream began
    text: str | None = None  # as the terminal event tells it
    message: str = ""  # of the error that ended it
    key: str = ""  # its Idempotency-Key, if it has one
    last_id: str = ""
    url: str = ""  # of the gateway that serves it now
    slow_s: float = 0.0  # what its client does between two events
    connection: aiohttp.ClientResponse | None = None
    events: list[dict] = field(default_factory=list)  # as they were sent, less errors
    began: asyncio.Event = field(default_factory=asyncio.Event)
    _last_at: float = 0.0

    @property
    def problems(self) -> list[str]:
        said = "".join(
            token.text
            for _, frame in self.seen.frames
            for token in frame.tokens
            if not token.is_special
        )
        if self.text is not None and self.text != said:
            return [f"changed: the end tells {self.text!r}, the tokens were {said!r}"]
        return []

    def leave(self) -> None:
        """Go away in the middle, as a closed browser does."""
        self.seen.is_left = True
        if self.connection is not None:
            self.connection.close()

    def note(self) -> None:
        now = time.monotonic()
        if self._last_at:
            self.longest_gap_s = max(self.longest_gap_s, now - self._last_at)
        self._last_at = now


class ChaosClient:
    """Sends one request to a fleet whose gateways come and go."""

    def __init__(self, urls: list[str], draw: random.Random, **parameters: object) -> None:
        self._urls = urls  # shared with the arena, which replaces them
        self._draw = draw
        self._parameters = parameters  # of every request, besides `max_new_tokens`
        self.end_after_s = END_AFTER_S

    async def run(
        self,
        prompt: str,
        *,
        max_new_tokens: int,
        is_resuming: bool,
        leave_after: int | None = None,
        observation: Observation | None = None,
    ) -> Observation:
        """Read until the end, or for `end_after_s`."""
        seen = observation or new_observation(prompt, max_new_tokens, is_resuming=is_resuming)
        headers = {"idempotency-key": seen.key} if seen.key else {}
        body = {"inputs": prompt, "parameters": {"max_new_tokens": max_new_tokens}}
        body["parameters"] |= self._parameters
        with suppress(TimeoutError):  # `violations` says that it is stuck
            async with asyncio.timeout(self.end_after_s):
                await self._read(seen, headers, body, leave_after)
        return seen

    async def _read(self, seen: Observation, headers, body, leave_after) -> None:
        """Come back until there is an end."""
        timeout = aiohttp.ClientTimeout(sock_connect=2, sock_read=25)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while not seen.seen.is_ended:
                seen.seen.num_attachments += 1
                try:
                    await self._attach(session, seen, headers, body, leave_after)
                except _LOST as error:
                    if not (seen.is_resuming or seen.seen.is_left) and seen.began.is_set():
                        seen.seen.error = f"connection lost: {type(error).__name__}"
                if not seen.seen.is_ended:
                    await asyncio.sleep(self._draw.uniform(0.02, 0.2))

    async def _attach(self, session, seen: Observation, headers, body, leave_after) -> None:
        if not self._urls:
            return
        url, headers = self._draw.choice(self._urls), dict(headers)
        seen.url = url
        if seen.last_id:
            headers["last-event-id"] = seen.last_id
        if seen.last_id and self._draw.random() < 0.5:
            path = f"{url}/requests/{seen.seen.request.id}/stream"
            context = session.get(path, headers={"last-event-id": seen.last_id})
        else:
            context = session.post(f"{url}/generate_stream", json=body, headers=headers)
        async with context as answer:
            if answer.status != 200:
                await self._refused(answer, seen)
                return
            seen.seen.request = _named(seen.seen.request, answer.headers["x-request-id"])
            seen.connection = answer
            seen.began.set()
            event_id = ""
            async for line in answer.content:
                if line.startswith(b"id:"):
                    event_id = line[3:].strip().decode()
                elif line.startswith(b"data:"):
                    self._take(seen, event_id, json.loads(line[5:]))
                    await asyncio.sleep(seen.slow_s)
                    if leave_after is not None and len(seen.seen.frames) > leave_after:
                        seen.leave()
                    if seen.seen.is_left:
                        return
            if not seen.is_resuming and not seen.seen.is_ended:
                seen.seen.error = "closed without an end"

    async def _refused(self, answer: aiohttp.ClientResponse, seen: Observation) -> None:
        if answer.status in (429, 500, 502, 503):
            seen.refusals += 1
            if answer.status == 500:
                seen.seen.error = f"status 500: {await answer.text()}"
            await asyncio.sleep(0.2)
        else:
            told = await answer.json(content_type=None)
            seen.seen.error = told.get("error_type") or f"status {answer.status}"
            seen.message = str(told.get("error"))

    def _take(self, seen: Observation, event_id: str, event: dict) -> None:
        seen.note()
        if "error" in event:
            is_passing = event.get("error_type") in ("unavailable", "backend_unavailable")
            if not (seen.is_resuming and is_passing):
                seen.seen.error = event.get("error_type", "error")
                seen.message = event["error"]
            return
        seen.events.append(event)
        request_id, _, place = event_id.rpartition(":")
        index, _, chain = place.partition("-")
        if request_id:
            seen.last_id = event_id
        row = event["token"]
        token = Token(row["id"], row["text"], row["logprob"], row["special"])
        is_end = event["generated_text"] is not None
        # a worker that took over after the last token only adds the end, which is told with an empty token
        tokens = () if is_end and token.is_special and not token.text else (token,)
        finish = None
        if is_end:
            seen.text = event["generated_text"]
            num_tokens = sum(len(frame.tokens) for _, frame in seen.seen.frames) + len(tokens)
            finish = Finish(FinishReason.LENGTH, num_tokens)
        seen.seen.frames.append(
            (int(index), Frame(tokens=tokens, chain=bytes.fromhex(chain), finish=finish))
        )


def new_observation(prompt: str, max_new_tokens: int, *, is_resuming: bool) -> Observation:
    request = GenerationRequest(
        id="",
        model="echo",
        prompt_tokens=tuple(prompt.encode()),
        sampling=Sampling(),
        stopping=Stopping(max_new_tokens=max_new_tokens),
    )
    key = uuid.uuid4().hex if is_resuming else ""
    return Observation(SeenStream(request), is_resuming, key=key)


def _named(request: GenerationRequest, request_id: str) -> GenerationRequest:
    return GenerationRequest(
        id=request_id,
        model=request.model,
        prompt_tokens=request.prompt_tokens,
        sampling=request.sampling,
        stopping=request.stopping,
    )
