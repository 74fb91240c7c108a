"""TGI's own routes: an answer in one piece, or as a stream of events."""

import json
import logging
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

from aiohttp import web

from common.errors import FleetError, ValidationError
from common.messages import Finish, ModelCard
from common.telemetry import inject
from gateway.generation import FrameStream
from gateway.handlers.body import read_body
from gateway.native_format import StreamFormat, answer_json, error_event
from gateway.record import RECORD, RequestRecord
from gateway.schemas.native import CompatBody, GenerateBody
from gateway.services import SERVICES, Services
from gateway.sse import EventStream
from gateway.validation import ValidGeneration, validate

logger = logging.getLogger(__name__)


async def generate(request: web.Request) -> web.StreamResponse:
    """The whole answer as one JSON object."""
    return await _answer(request, await read_body(request, GenerateBody))


async def generate_stream(request: web.Request) -> web.StreamResponse:
    """An event for every token."""
    return await _stream(request, await read_body(request, GenerateBody))


async def compat_generate(request: web.Request) -> web.StreamResponse:
    """An array of one object, or a stream when the body says so."""
    body = await read_body(request, CompatBody)
    if body.stream:
        return await _stream(request, body, is_compat=True)
    return await _answer(request, body, is_compat=True)


async def tokenize(request: web.Request) -> web.Response:
    """The prompt's tokens and where they stand in it."""
    body = await read_body(request, GenerateBody)
    if not body.inputs:
        raise ValidationError("Input validation error: `inputs` cannot be empty")
    model = await request.app[SERVICES].directory.find(body.model)
    spans = await model.tokenizer.spans(body.inputs)
    kept = spans[-body.parameters.truncate :] if body.parameters.truncate else spans
    rows = [
        {"id": span.id, "text": span.text, "start": span.start, "stop": span.stop} for span in kept
    ]
    return web.json_response(text=json.dumps(rows, ensure_ascii=False))


async def _answer(
    request: web.Request, body: GenerateBody, *, is_compat: bool = False
) -> web.Response:
    services, record = request.app[SERVICES], request[RECORD]
    async with _observed(services, record):
        with ExitStack() as permits:
            valid, card = await _validate(request, body, permits, is_compat=is_compat)
            validated_s = record.elapsed_s
            answers = await services.generator.complete_all(valid.requests)
        finish = answers[0].finish
        _record_finish(record, finish, first_token_s=validated_s + answers[0].first_token_s)
        text = answer_json(valid, answers)
        headers = _compute_headers(services, valid, card)
        headers |= _time_headers(record, valid, finish, validation_s=validated_s)
        return web.Response(
            text=f"[{text}]" if is_compat else text,
            content_type="application/json",
            headers=headers,
        )


async def _stream(
    request: web.Request, body: GenerateBody, *, is_compat: bool = False
) -> web.StreamResponse:
    """Errors before the first byte have a real status; later ones become the last event."""
    services, record = request.app[SERVICES], request[RECORD]
    async with _observed(services, record) as outcome:
        with ExitStack() as permits:
            valid, card = await _validate(
                request, body, permits, is_compat=is_compat, is_stream=True
            )
            validated_s = record.elapsed_s
            async with (
                services.generator.stream(valid.request) as frames,
                EventStream(
                    request,
                    keep_alive_s=services.settings.keep_alive_s,
                    headers=_compute_headers(services, valid, card),
                ) as events,
            ):
                try:
                    await _relay(frames, events, StreamFormat(valid))
                except FleetError as error:
                    outcome.append(error)
                    await events.write(error_event(error))
                except ConnectionError:
                    raise
                except Exception as error:
                    logger.exception("stream failed", extra={"request_id": record.id})
                    outcome.append(error)
                    await events.write(error_event(FleetError("Internal error")))
                finally:
                    _record_stream(record, frames, validated_s=validated_s)
            return events.response


async def _relay(frames: FrameStream, events: EventStream, format: StreamFormat) -> None:
    async for index, frame in frames:
        await events.write(format.events(index, frame))


async def _validate(
    request: web.Request,
    body: GenerateBody,
    permits: ExitStack,
    *,
    is_compat: bool,
    is_stream: bool = False,
) -> tuple[ValidGeneration, ModelCard]:
    """Admit and check a request; its permits live as long as `permits`."""
    services, record = request.app[SERVICES], request[RECORD]
    permits.enter_context(services.admission.permit())
    model = await services.directory.find(body.model)
    record.model = model.name
    valid = await validate(
        body,
        model,
        services.settings,
        request_id=record.id,
        is_stream=is_stream,
        returns_full_text=is_compat and not is_encoder_decoder(model.card),
        created_at=record.created_at,
        traceparent=inject(),
    )
    permits.enter_context(services.admission.permit(len(valid.requests) - 1))
    record.prompt_tokens = valid.num_prompt_tokens
    services.metrics.observe_start(valid.request, validation_s=record.elapsed_s)
    return valid, model.card


def is_encoder_decoder(card: ModelCard) -> bool:
    """Such a model's answer does not continue the prompt, so the prompt is no part of the full text."""
    return card.architecture.endswith("ForConditionalGeneration")


@asynccontextmanager
async def _observed(
    services: Services, record: RequestRecord
) -> AsyncIterator[list[BaseException]]:
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


def _record_stream(record: RequestRecord, frames: FrameStream, *, validated_s: float) -> None:
    record.generated_tokens = frames.num_tokens
    if frames.first_token_s is not None:
        record.first_token_s = validated_s + frames.first_token_s
    if frames.finish is not None:
        _record_finish(record, frames.finish, first_token_s=record.first_token_s)


def _record_finish(record: RequestRecord, finish: Finish, *, first_token_s: float | None) -> None:
    record.generated_tokens = finish.generated_tokens
    record.finish_reason = finish.reason.value
    record.queue_s = finish.queue_s
    record.first_token_s = first_token_s


def _compute_headers(services: Services, valid: ValidGeneration, card: ModelCard) -> dict[str, str]:
    kind = services.settings.compute_type or f"{card.device or 'gpu'}+optimized"
    return {"x-compute-type": kind, "x-compute-characters": str(valid.num_characters)}


def _time_headers(
    record: RequestRecord, valid: ValidGeneration, finish: Finish, *, validation_s: float
) -> dict[str, str]:
    """TGI's: whole milliseconds, but x-compute-time is in seconds."""
    inference_s = finish.prefill_s + finish.decode_s
    times = {
        "x-total-time": record.elapsed_s,
        "x-validation-time": validation_s,
        "x-queue-time": finish.queue_s,
        "x-inference-time": inference_s,
        "x-time-per-token": inference_s / max(1, finish.generated_tokens),
    }
    return {
        "x-compute-time": f"{record.elapsed_s:.6f}",
        **{name: str(round(value * 1000)) for name, value in times.items()},
        "x-prompt-tokens": str(valid.num_prompt_tokens),
        "x-generated-tokens": str(finish.generated_tokens),
    }
