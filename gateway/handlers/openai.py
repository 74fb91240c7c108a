"""OpenAI's routes: completions, chats, models. Every choice is a request of its own; their streams run side by side."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from functools import partial

from aiohttp import web

from common.errors import FleetError, IdempotencyConflict, Unavailable, ValidationError
from common.messages import Frame, GenerationRequest, ModelCard, OnDisconnect
from common.telemetry import inject
from gateway.access import holder_of, tenant_of, with_owner
from gateway.generation import Completion, FrameStream
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
from gateway.handlers.system import model_entry, package_version
from gateway.openai_errors import openai_error_event
from gateway.openai_format import Envelope, answer_json, envelope_of
from gateway.openai_stream import StreamFormat
from gateway.openai_validation import ValidCall, validate_chat, validate_completion
from gateway.presentation import presentation_of
from gateway.record import RECORD, RequestRecord
from gateway.relay import relay
from gateway.resumption import (
    EventId,
    Terms,
    fingerprint_of,
    last_event_of,
    seed_of,
    terms_of,
)
from gateway.schemas.openai import ChatBody, CommonBody, CompletionBody
from gateway.services import SERVICES
from gateway.sse import EventStream
from gateway.validation import ValidGeneration

logger = logging.getLogger(__name__)

Validate = Callable[..., Awaitable[ValidCall]]


async def completions(request: web.Request) -> web.StreamResponse:
    """Continues prompts: `n` choices for each, as one JSON object or as chunks that end with `data: [DONE]`."""
    body = await read_body(request, CompletionBody)
    return await answer_call(request, body, validate_completion)


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answers a conversation through the model's chat template; may call tools, or follow a JSON schema."""
    body = await read_body(request, ChatBody)
    return await answer_call(request, body, validate_chat)


async def model(request: web.Request) -> web.Response:
    """One of the models that are served."""
    found = await request.app[SERVICES].directory.find(request.match_info["model"])
    return web.json_response(model_entry(found.name))


async def answer_call(
    request: web.Request, body: CommonBody, validate: Validate
) -> web.StreamResponse:
    """Serve a body that `validate` can check."""
    services, record = request.app[SERVICES], request[RECORD]
    async with observed(services, record) as outcome:
        with ExitStack() as permits:
            call, card = await _validated(request, body, validate, permits)
            envelope = envelope_of(call, fingerprint=_fingerprint(card))
            headers = compute_headers(services.settings, card, num_characters=call.num_characters)
            if body.stream:
                return await _stream(request, call, envelope, outcome, headers)
            validated_s = record.elapsed_s
            answers = await services.generator.complete_each(call.requests)
        _record_answers(record, answers, validated_s=validated_s)
        text = answer_json(call, envelope, answers)
        headers |= time_headers(
            record,
            [answer.finish for answer in answers],
            num_prompt_tokens=call.num_prompt_tokens,
            validation_s=validated_s,
            has_compute_time=call.is_chat,
        )
        return web.Response(text=text, content_type="application/json", headers=headers)


async def _validated(
    request: web.Request, body: CommonBody, validate: Validate, permits: ExitStack
) -> tuple[ValidCall, ModelCard]:
    """Admit and check a call; its permits live as long as `permits`."""
    services, record = request.app[SERVICES], request[RECORD]
    permits.enter_context(services.admission.permit(holder=holder_of(request)))
    terms = terms_of(request, tenant=tenant_of(request))
    services.broker.check()
    model = await model_of(request, body.model)
    record.model, record.id = model.name, terms.request_id or record.id
    call = await validate(
        body,
        model,
        services.settings,
        request_id=record.id,
        created_at=record.created_at,
        traceparent=inject(),
    )
    call = _on_terms(request, call, terms, body)
    if terms.request_id:
        known = await services.finder.lookup(call.requests[0].id)
        if known and known.fingerprint != call.requests[0].fingerprint:
            raise IdempotencyConflict()
        record.known = known
    num_more = len(call.requests) - 1
    permits.enter_context(services.admission.permit(num_more, holder=holder_of(request)))
    record.prompt_tokens = call.num_prompt_tokens
    record_start(record, call.requests)
    for made in call.requests:
        services.metrics.observe_start(made, validation_s=record.elapsed_s)
    return call, model.card


def _on_terms(http: web.Request, call: ValidCall, terms: Terms, body: CommonBody) -> ValidCall:
    """Note in the requests whose they are, and what a retry must find again."""
    if terms.last_event and len(call.requests) > 1:
        raise ValidationError(
            "Input validation error: `Last-Event-ID` is not supported with several choices"
        )
    fingerprint = fingerprint_of(body, tenant_of(http), header_of(http))

    def noted(request: GenerationRequest) -> GenerationRequest:
        sampling = request.sampling
        if terms.request_id and sampling.do_sample and body.seed is None:
            sampling = replace(sampling, seed=seed_of(request.id))
        shown = ValidGeneration(
            requests=(request,),
            has_details=True,
            prefix="",
            num_characters=0,
            keeps_special_tokens=call.keeps_special_tokens,
        )
        return replace(
            with_owner(request, http, asked_priority=body.priority),
            sampling=sampling,
            on_disconnect=terms.on_disconnect,
            fingerprint=fingerprint,
            # by its id alone, a request is shown in TGI's shape
            presentation=presentation_of(shown),
        )

    return call.with_requests(tuple(noted(request) for request in call.requests))


async def _stream(
    request: web.Request,
    call: ValidCall,
    envelope: Envelope,
    outcome: list[BaseException],
    headers: dict[str, str],
) -> web.StreamResponse:
    """Write the frames of all choices. Errors before the first byte have a real status; later ones are the last event."""
    services, record = request.app[SERVICES], request[RECORD]
    validated_s, last_event = record.elapsed_s, last_event_of(request)
    async with AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(services.generator.stream(made, last_event=last_event))
            for made in call.requests
        ]
        events = await stack.enter_async_context(
            EventStream(
                request,
                services.outbox,
                keep_alive_s=services.settings.keep_alive_s,
                headers=headers,
            )
        )
        for frames in streams:
            frames.call_while_held(events.say_wait)
        known = [frames.request for frames in streams]
        if len(known) == 1:
            envelope = replace(envelope, created=int(known[0].created_at))
        try:
            format = StreamFormat(call, envelope, known)
            makes = [
                noting_seen(record, partial(format.events, index), last_event)
                for index in range(len(streams))
            ]
            await _relay_all(streams, events, makes, last_event)
        except FleetError as error:
            outcome.append(error)
            shown = with_way_back(error, streams[0]) if len(streams) == 1 else error
            await events.write(openai_error_event(shown))
        except ConnectionError:
            raise
        except Exception as error:
            logger.exception("stream failed", extra={"request_id": record.id})
            outcome.append(error)
            await events.write(openai_error_event(FleetError("Internal error")))
        finally:
            _record_streams(record, streams, validated_s=validated_s)
    return events.response


async def _relay_all(
    streams: list[FrameStream],
    events: EventStream,
    makes: list[Callable[[int, Frame], bytes]],
    last_event: EventId | None,
) -> None:
    """Relay every stream; one failure ends all."""
    if len(streams) == 1:
        await relay(streams[0], events, makes[0], last_event=last_event)
    else:
        try:
            async with asyncio.TaskGroup() as group:
                for frames, make in zip(streams, makes, strict=True):
                    group.create_task(relay(frames, events, make))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures
    if not any(frames.is_stopped for frames in streams):
        return
    if len(streams) > 1 or streams[0].on_leave is OnDisconnect.CANCEL:  # no way to come back
        raise Unavailable("This gateway is stopping")
    events.cut()


def _fingerprint(card: ModelCard) -> str:
    """What makes answers differ: our version, and the model's."""
    return f"tokenfleet-{package_version()}-{(card.revision or card.tokenizer_digest)[:12]}"


def _record_answers(
    record: RequestRecord, answers: list[Completion], *, validated_s: float
) -> None:
    first = answers[0]
    record_finish(record, first.finish, first_token_s=validated_s + first.first_token_s)
    record.generated_tokens = sum(answer.finish.generated_tokens for answer in answers)


def _record_streams(
    record: RequestRecord, streams: list[FrameStream], *, validated_s: float
) -> None:
    record_stream(record, streams[0], validated_s=validated_s)
    record.generated_tokens = sum(frames.num_tokens for frames in streams)
    record.is_left = not all(frames.is_ended for frames in streams)
