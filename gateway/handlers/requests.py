"""A request by its id: its state, its stream once more, and its end."""

from typing import Any

from aiohttp import web

from common.errors import RequestNotFound, ValidationError
from common.messages import GenerationRequest
from common.request_store import RequestStatus
from gateway.access import holder_of, paying, require_own
from gateway.handlers.generate import relay_stream
from gateway.presentation import format_as_before
from gateway.record import RECORD
from gateway.resumption import EventId, last_event_of
from gateway.services import SERVICES


async def status(request: web.Request) -> web.Response:
    """State, attempts, tokens so far and times of a request; known until ten minutes after its end.

    One with `n` or `best_of` above 1 is several sequences, each with a state of its own.
    """
    finder, request_id = request.app[SERVICES].finder, _id_in(request)
    rows = [
        _status_body(await finder.status(require_own(sequence, request).id))
        for sequence in await finder.sequences(request_id)
    ]
    return web.json_response(_body_of(request_id, rows))


async def stream(request: web.Request) -> web.StreamResponse:
    """The events of a request from the first on, or behind `Last-Event-ID`; 204 when there are no more.

    Any number of readers may follow one request. It ends ten seconds after the last one left. One with `n` or
    `best_of` above 1 has a stream for each of its sequences, under the ids that `GET /requests/{request_id}` shows.
    """
    services, record = request.app[SERVICES], request[RECORD]
    last_event = _last_event(request)
    with services.admission.permit(holder=holder_of(request)):
        known = require_own(await _single(request), request)
        record.model, record.known = known.model, known
        if last_event and await _is_last(request, last_event):
            return web.Response(status=204)  # tells an EventSource to come back no more
        async with paying(request, is_reading=True):
            return await relay_stream(
                request,
                services.generator.attach(known, last_event=last_event),
                format_as_before,
                last_event=last_event,
            )


async def cancel(request: web.Request) -> web.Response:
    """End a request; its readers get an error as the last event. Harmless when it has ended already."""
    services, request_id = request.app[SERVICES], _id_in(request)
    rows = []
    for known in await services.finder.sequences(request_id):
        was_live = await services.generator.cancel(require_own(known, request))
        found = await services.finder.status(known.id)
        rows.append({"cancelled": was_live, **_status_body(found)})
    return web.json_response(_body_of(request_id, rows))


def _id_in(request: web.Request) -> str:
    request_id = request.match_info["request_id"]
    if not (request_id.isascii() and request_id.isprintable()):  # it becomes a header of the answer
        raise RequestNotFound()
    request[RECORD].id = request_id
    return request_id


async def _single(request: web.Request) -> GenerationRequest:
    """The request, if it is one sequence. Raises RequestNotFound, which names the streams of several."""
    request_id = _id_in(request)
    sequences = await request.app[SERVICES].finder.sequences(request_id)
    if [known.id for known in sequences] == [request_id]:
        return sequences[0]
    for known in sequences:
        require_own(known, request)
    paths = ", ".join(f"/requests/{known.id}/stream" for known in sequences)
    raise RequestNotFound(f"This request has a stream for each of its sequences: {paths}")


def _last_event(request: web.Request) -> EventId | None:
    event, request_id = last_event_of(request), request.match_info["request_id"]
    if event is not None and event.request_id != request_id:
        raise ValidationError(
            "Input validation error: `Last-Event-ID` must be of the request in the path. "
            f"Given: {event.request_id}"
        )
    return event


async def _is_last(request: web.Request, event: EventId) -> bool:
    found = await request.app[SERVICES].finder.status(event.request_id)
    return found.has_ended and found.finish is not None and event.index == found.num_frames - 1


def _body_of(request_id: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The request's own row, or those of its sequences."""
    is_single = len(rows) == 1 and rows[0]["id"] == request_id
    return rows[0] if is_single else {"id": request_id, "sequences": rows}


def _status_body(status: RequestStatus) -> dict[str, Any]:
    request, finish, failure = status.request, status.finish, status.failure
    return {
        "id": request.id,
        "model": request.model,
        "state": status.state.value,
        "attempts": status.attempts,
        "prompt_tokens": len(request.prompt_tokens),
        "generated_tokens": status.num_tokens,
        "max_new_tokens": request.stopping.max_new_tokens,
        "priority": request.priority,
        "on_disconnect": request.on_disconnect.value,
        "created_at": status.created_at,
        "deadline_at": status.deadline_at,
        "finish_reason": finish.reason.value if finish else None,
        "error": failure.message if failure else None,
        "error_type": failure.kind if failure else None,
    }
