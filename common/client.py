"""A client of the gateways that outlives them: a broken stream goes on behind the last whole event, at another one.

The one file of `common` that knows aiohttp; nothing on the serving side imports it. Each attempt is a client span of
OpenTelemetry, and its `traceparent` goes with the request.
"""

import asyncio
import json
import random
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, Self

import aiohttp
from opentelemetry.instrumentation.aiohttp_client import create_trace_config

from common.errors import FleetError, Unavailable, error_of_kind
from common.event_stream import Event, EventSplitter

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0
_CONNECT_TIMEOUT_S = 2.0
_RETRY_STATUSES = frozenset({429, 502, 503, 504})


class _Broken(Exception):
    """An attempt failed in a way that another one may not; the server may say when."""

    def __init__(self, reason: object, *, retry_after_s: float = 0.0) -> None:
        super().__init__(str(reason))
        self.retry_after_s = retry_after_s


class FleetClient:
    """Use as `async with FleetClient("http://one:8080", "http://two:8080") as client`. Any gateway can serve any stream."""

    def __init__(
        self,
        *urls: str,
        api_key: str | None = None,
        patience_s: float = 60.0,
        silence_s: float = 40.0,
    ) -> None:
        """
        Args:
            urls: gateways; the next one is asked when one fails.
            patience_s: how long no progress may be made before a call fails.
            silence_s: longest time without a byte before a connection counts as broken; above the keep-alive.
        """
        if not urls:
            raise ValueError("a client needs the URL of at least one gateway")
        self._urls = [url.rstrip("/") for url in urls]
        self._turn = 0
        self._patience_s = patience_s
        self._silence_s = silence_s
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=self._silence_s
        )
        self._session = aiohttp.ClientSession(
            timeout=timeout, headers=self._headers, trace_configs=[create_trace_config()]
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def stream(
        self,
        inputs: str,
        *,
        parameters: dict[str, Any] | None = None,
        model: str | None = None,
        idempotency_key: str | None = None,
        on_disconnect: str = "grace",
    ) -> AsyncIterator[dict[str, Any]]:
        """The events of /generate_stream, each once and in order, whatever becomes of the gateways.

        Raises the FleetError that the service names, and Unavailable after `patience_s` without progress.
        """
        body = _body(inputs, parameters, model)
        headers = _headers(idempotency_key, on_disconnect)
        patience = _Patience(self._patience_s)
        while True:
            try:
                async for event in self._attempt("/generate_stream", body, headers):
                    patience.renew()
                    if event.id:
                        headers["last-event-id"] = event.id
                    data = json.loads(event.data)
                    yield data
                    if data["generated_text"] is not None:
                        return
                raise _Broken("the stream ended before its last event")
            except _Broken as error:
                await self._try_elsewhere(error, patience)

    async def generate(
        self,
        inputs: str,
        *,
        parameters: dict[str, Any] | None = None,
        model: str | None = None,
        idempotency_key: str | None = None,
        on_disconnect: str = "grace",
    ) -> dict[str, Any]:
        """The answer of /generate; repeated attempts attach to one generation. Raises as `stream` does."""
        body = _body(inputs, parameters, model)
        headers = _headers(idempotency_key, on_disconnect)
        patience = _Patience(self._patience_s)
        while True:
            try:
                async with self._post("/generate", body, headers) as response:
                    return await response.json()
            except _Broken as error:
                await self._try_elsewhere(error, patience)
            except (aiohttp.ClientError, TimeoutError) as error:
                await self._try_elsewhere(_Broken(error), patience)

    async def _attempt(
        self, path: str, body: dict[str, Any], headers: dict[str, str]
    ) -> AsyncIterator[Event]:
        """The whole events of one connection. Raises _Broken when another one may go on."""
        splitter = EventSplitter()
        try:
            async with self._post(path, body, headers) as response:
                async for chunk in response.content.iter_any():
                    for event in splitter.feed(chunk):
                        if event.invites_to_come_back:
                            raise _Broken(event.data)
                        if event.error:
                            raise _error_of(event.error)
                        yield event
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            raise _Broken(error) from error

    def _post(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> "_Post":
        assert self._session is not None, "use the client as `async with`"
        url = self._urls[self._turn % len(self._urls)] + path
        return _Post(self._session.post(url, json=body, headers=headers))

    async def _try_elsewhere(self, error: _Broken, patience: "_Patience") -> None:
        """Turn to the next gateway; the first change costs no time. Raises Unavailable when patience ends."""
        self._turn += 1
        pause_s = patience.next_pause_s(error)
        if pause_s > 0:
            await asyncio.sleep(pause_s)


class _Post:
    """A response with status 200, or the error that it stands for."""

    def __init__(self, request: Any) -> None:
        self._request = request

    async def __aenter__(self) -> aiohttp.ClientResponse:
        response: aiohttp.ClientResponse = await self._request.__aenter__()
        if response.status == 200:
            return response
        try:
            raise await _refusal(response)
        finally:
            await self._request.__aexit__(None, None, None)

    async def __aexit__(self, *exc: object) -> None:
        await self._request.__aexit__(*exc)


class _Patience:
    """How long to wait before the next attempt, and whether there is one."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self.renew()

    def renew(self) -> None:
        """There was progress."""
        self._ends_at_s = asyncio.get_running_loop().time() + self._limit_s
        self._num_failures = 0

    def next_pause_s(self, error: _Broken) -> float:
        """Raises Unavailable when the pause would take too long."""
        longest_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**self._num_failures)
        pause_s = 0.0 if self._num_failures == 0 else random.uniform(0, longest_s)
        self._num_failures += 1
        pause_s = max(pause_s, error.retry_after_s)
        if asyncio.get_running_loop().time() + pause_s > self._ends_at_s:
            raise Unavailable(f"no gateway could go on within {self._limit_s:.0f} s: {error}")
        return pause_s


def _body(inputs: str, parameters: dict[str, Any] | None, model: str | None) -> dict[str, Any]:
    named = {} if model is None else {"model": model}
    return {"inputs": inputs, "parameters": parameters or {}, **named}


def _headers(idempotency_key: str | None, on_disconnect: str) -> dict[str, str]:
    key = idempotency_key or uuid.uuid4().hex
    return {"idempotency-key": key, "x-on-disconnect": on_disconnect}


async def _refusal(response: aiohttp.ClientResponse) -> Exception:
    """What a status other than 200 means: try again, or the service's error."""
    text = await response.text()
    if response.status in _RETRY_STATUSES:
        after = response.headers.get("retry-after", "0")
        return _Broken(text, retry_after_s=float(after) if after.isdigit() else 1.0)
    try:
        return _error_of(json.loads(text), status=response.status)
    except (ValueError, KeyError, TypeError):
        return FleetError(f"the gateway answered {response.status}: {text[:200]}")


def _error_of(body: dict[str, Any], *, status: int = 424) -> FleetError:
    error = error_of_kind(body["error_type"], body["error"])
    error.kind, error.http_status = body["error_type"], status
    return error


def texts_of(events: Sequence[dict[str, Any]]) -> str:
    """The generated text that events tell."""
    tokens = (event["token"] for event in events)
    return "".join(token["text"] for token in tokens if not token["special"])
