"""What became of a generation: into the metrics, into the record of its HTTP request, and into its last event."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from common.errors import FleetError, Unavailable
from common.messages import Finish, GenerationRequest
from gateway.generation import FrameStream
from gateway.record import RequestRecord
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


def record_stream(record: RequestRecord, frames: FrameStream, *, validated_s: float) -> None:
    record.generated_tokens = frames.num_tokens
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
