"""What became of a generation: into the metrics, into the record of its HTTP request, and into its last event."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from common.errors import FleetError, Unavailable
from common.messages import Finish, Frame, GenerationRequest
from gateway.generation import FrameStream
from gateway.record import RequestRecord
from gateway.resumption import EventId
from gateway.services import Services


@asynccontextmanager
async def observed(services: Services, record: RequestRecord) -> AsyncIterator[list[BaseException]]:
    """Count what becomes of a generation; a stream that failed after its headers says so in the list."""
    late: list[BaseException] = []
    services.metrics.request_count.inc()
    try:
        yield late
    except BaseException as error:
        services.metrics.observe_failure(error)
        raise
    if late:
        services.metrics.observe_failure(late[0])
        record.error_type = late[0].kind if isinstance(late[0], FleetError) else "internal"
    else:
        services.metrics.observe_success(duration_s=record.elapsed_s)


def record_start(record: RequestRecord, requests: Sequence[GenerationRequest]) -> None:
    record.max_new_tokens = sum(request.stopping.max_new_tokens for request in requests)
    record.on_disconnect = requests[0].on_disconnect


def noting_seen(
    record: RequestRecord, format: Callable[[int, Frame], bytes], last_event: EventId | None
) -> Callable[[int, Frame], bytes]:
    """`format`, which now notes how many tokens a client has read that goes on behind `last_event`.

    That it has read them is known once the event's frame comes: the reader has compared its hash.
    """
    if last_event is None:
        return format
    num_seen = 0

    def noted(index: int, frame: Frame) -> bytes:
        nonlocal num_seen
        if index <= last_event.index:
            num_seen += len(frame.tokens)
            record.seen_tokens = num_seen if index == last_event.index else 0
        return format(index, frame)

    return noted


def record_stream(record: RequestRecord, frames: FrameStream, *, validated_s: float) -> None:
    record.generated_tokens = frames.num_tokens
    record.is_left = not frames.is_ended
    if frames.first_token_s is not None:
        record.first_token_s = validated_s + frames.first_token_s
    if frames.finish is not None:
        record_finish(record, frames.finish, first_token_s=record.first_token_s)


def record_finish(record: RequestRecord, finish: Finish, *, first_token_s: float | None) -> None:
    record.generated_tokens = finish.generated_tokens
    record.finish_reason = finish.reason.value
    record.queue_s = finish.queue_s
    record.first_token_s = first_token_s


def with_way_back(error: FleetError, frames: FrameStream) -> FleetError:
    """Tell how to go on with a stream that only this gateway could not hold any longer."""
    if not frames.is_held_up:
        return error
    path = f"/requests/{frames.request.id}/stream"
    return Unavailable(f"{error}. Go on with GET {path} and the Last-Event-ID of the last event")
