"""TGI's own routes: an answer in one piece, or as a stream of events."""

import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, ExitStack
from dataclasses import replace

from aiohttp import web

from common.errors import FleetError, IdempotencyConflict, Unavailable, ValidationError
from common.messages import GenerationRequest, ModelCard, OnDisconnect
from common.telemetry import inject
from gateway.access import holder_of, tenant_of, with_owner
from gateway.generation import FrameStream
from gateway.handlers.body import read_body
from gateway.handlers.headers import compute_headers, time_headers
from gateway.handlers.outcome import (
    noting_seen,
    observed,
    record_finish,
    record_start,
    record_stream,
    with_way_back,
)
from gateway.handlers.routing import header_of, model_of
from gateway.native_format import StreamFormat, answer_json
from gateway.presentation import presentation_of
from gateway.record import RECORD
from gateway.relay import relay
from gateway.resumption import (
    EventId,
    Terms,
    fingerprint_of,
    last_event_of,
    seed_of,
    terms_of,
)
from gateway.schemas.native import CompatBody, GenerateBody
from gateway.services import SERVICES
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
    model = await model_of(request, body.model)
    with request.app[SERVICES].admission.permit(holder=holder_of(request)):
        rows = await model.tokenizer.spans_json(body.inputs, last=body.parameters.truncate)
    return web.Response(body=rows, content_type="application/json", charset="utf-8")


async def _answer(
    request: web.Request, body: GenerateBody, *, is_compat: bool = False
) -> web.Response:
    services, record = request.app[SERVICES], request[RECORD]
    async with observed(services, record):
        with ExitStack() as permits:
            valid, card = await _validate(request, body, permits, is_compat=is_compat)
            validated_s = record.elapsed_s
            answers = await services.generator.complete_all(
                valid.requests, keeps_special_tokens=valid.keeps_special_tokens
            )
        finish = answers[0].finish
        record_finish(record, finish, first_token_s=validated_s + answers[0].first_token_s)
        record.generated_tokens = sum(answer.finish.generated_tokens for answer in answers)
        text = answer_json(valid, answers)
        headers = compute_headers(services.settings, card, num_characters=valid.num_characters)
        headers |= time_headers(
            record,
            [finish],
            num_prompt_tokens=valid.num_prompt_tokens,
            validation_s=validated_s,
        )
        return web.Response(
            text=f"[{text}]" if is_compat else text,
            content_type="application/json",
            headers=headers,
        )


async def _stream(
    request: web.Request, body: GenerateBody, *, is_compat: bool = False
) -> web.StreamResponse:
    services, record = request.app[SERVICES], request[RECORD]
    last_event = last_event_of(request)
    async with observed(services, record) as outcome:
        with ExitStack() as permits:
            valid, card = await _validate(
                request, body, permits, is_compat=is_compat, is_stream=True
            )
            return await relay_stream(
                request,
                services.generator.stream(valid.request, last_event=last_event),
                lambda known: StreamFormat(replace(valid, requests=(known,))),
                last_event=last_event,
                headers=compute_headers(
                    services.settings, card, num_characters=valid.num_characters
                ),
                outcome=outcome,
            )


async def relay_stream(
    request: web.Request,
    following: AbstractAsyncContextManager[FrameStream],
    format_of: Callable[[GenerationRequest], StreamFormat],
    *,
    last_event: EventId | None,
    headers: dict[str, str] | None = None,
    outcome: list[BaseException] | None = None,
) -> web.StreamResponse:
    """Write the frames of `following` as the events of `format_of` the request, those behind `last_event`.

    Errors before the first byte have a real status; later ones become the last event, and go to `outcome`.
    """
    services, record = request.app[SERVICES], request[RECORD]
    outcome = [] if outcome is None else outcome
    started_s, keep_alive_s = record.elapsed_s, services.settings.keep_alive_s
    async with (
        following as frames,
        EventStream(request, services.outbox, keep_alive_s=keep_alive_s, headers=headers) as events,
    ):
        frames.call_while_held(events.say_wait)
        format = format_of(frames.request)
        try:
            make = noting_seen(record, format.events, last_event)
            await relay(frames, events, make, last_event=last_event)
            if frames.is_stopped:
                _part(frames, events)
        except FleetError as error:
            outcome.append(error)
            await events.write(format.error(with_way_back(error, frames)))
        except ConnectionError:
            raise
        except Exception as error:
            logger.exception("stream failed", extra={"request_id": record.id})
            outcome.append(error)
            await events.write(format.error(FleetError("Internal error")))
        finally:
            record_stream(record, frames, validated_s=started_s)
    return events.response


def _part(frames: FrameStream, events: EventStream) -> None:
    """Let a client go whose stream this gateway stopped. Raises Unavailable when it cannot come back to it."""
    if frames.on_leave is OnDisconnect.CANCEL:
        raise Unavailable("This gateway is stopping")
    events.cut()


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
    permits.enter_context(services.admission.permit(holder=holder_of(request)))
    terms = terms_of(request, tenant=tenant_of(request))
    services.broker.check()
    model = await model_of(request, body.model)
    record.model, record.id = model.name, terms.request_id or record.id
    valid = await validate(
        body,
        model,
        services.settings,
        request_id=record.id,
        is_stream=is_stream,
        returns_full_text=is_compat and not model.card.is_encoder_decoder,
        created_at=record.created_at,
        traceparent=inject(),
    )
    valid = _on_terms(request, valid, terms, body)
    if terms.request_id:
        known = await services.finder.lookup(valid.request.id)
        if known and known.fingerprint != valid.request.fingerprint:
            raise IdempotencyConflict()
        record.known = known
    num_more = len(valid.requests) - 1
    permits.enter_context(services.admission.permit(num_more, holder=holder_of(request)))
    record.prompt_tokens = valid.num_prompt_tokens
    record_start(record, valid.requests)
    services.metrics.observe_start(valid.request, validation_s=record.elapsed_s)
    return valid, model.card


def _on_terms(
    http: web.Request, valid: ValidGeneration, terms: Terms, body: GenerateBody
) -> ValidGeneration:
    """Note in the requests whose they are, and what a retry must find again."""

    def noted(request: GenerationRequest) -> GenerationRequest:
        sampling = request.sampling
        if terms.request_id and sampling.do_sample and body.parameters.seed is None:
            sampling = replace(sampling, seed=seed_of(request.id))
        return replace(
            with_owner(request, http, asked_priority=body.priority),
            sampling=sampling,
            on_disconnect=terms.on_disconnect,
            fingerprint=fingerprint,
            presentation=presentation,
        )

    fingerprint = fingerprint_of(body, tenant_of(http), header_of(http))
    presentation = presentation_of(valid)
    return replace(valid, requests=tuple(noted(request) for request in valid.requests))
