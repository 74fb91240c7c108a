"""What cloud platforms call (SageMaker's /invocations, Vertex AI's /vertex), and /chat_tokenize."""

import asyncio
import json
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from aiohttp import web

from common.errors import ValidationError
from common.telemetry import inject
from gateway.access import holder_of, with_owner
from gateway.chat import chat_prompt, tool_use_of
from gateway.handlers import generate, openai
from gateway.handlers.body import read_body, read_data
from gateway.handlers.outcome import observed
from gateway.handlers.routing import model_of
from gateway.openai_format import message_text
from gateway.openai_validation import ValidCall, validate_chat
from gateway.record import RECORD, RequestRecord
from gateway.schemas.native import GenerateBody
from gateway.schemas.openai import ChatBody
from gateway.schemas.platforms import VertexBody
from gateway.services import SERVICES, Services
from gateway.validation import ValidGeneration, validate


async def chat_tokenize(request: web.Request) -> web.Response:
    """The prompt that the chat template makes of a conversation, and its tokens."""
    body = await read_body(request, ChatBody)
    model = await model_of(request, body.model)
    with request.app[SERVICES].admission.permit(holder=holder_of(request)):
        text = await asyncio.to_thread(chat_prompt, body, model.card, tool_use_of(body))
        rows = await model.tokenizer.spans_json(text, adds_special_tokens=False)
    prompt = json.dumps(text, ensure_ascii=False).encode()
    data = b"".join((b'{"tokenize_response": ', rows, b', "templated_text": ', prompt, b"}"))
    return web.Response(body=data, content_type="application/json", charset="utf-8")


async def invocations(request: web.Request) -> web.StreamResponse:
    """SageMaker's route: `inputs` is served as by `POST /`, `messages` as a chat, `prompt` as a completion."""
    try:
        data = json.loads(await read_data(request))
    except (ValueError, RecursionError):
        data = {}  # whoever reads the body below says what is wrong with it
    names = data if isinstance(data, dict) else {}
    if "inputs" not in names and "messages" in names:
        return await openai.chat_completions(request)
    if "inputs" not in names and "prompt" in names:
        return await openai.completions(request)
    return await generate.compat_generate(request)


async def vertex(request: web.Request) -> web.Response:
    """Vertex AI's route: a text for every instance."""
    body = await read_body(request, VertexBody)
    services, record = request.app[SERVICES], request[RECORD]
    most = services.settings.max_client_batch_size
    if not 0 < len(body.instances) <= most:
        raise ValidationError(
            f"Input validation error: `instances` must be 1 to {most}. Given: {len(body.instances)}"
        )
    async with observed(services, record):
        with ExitStack() as permits:
            permits.enter_context(services.admission.permit(holder=holder_of(request)))
            services.broker.check()
            checked = [
                await _checked(request, instance, f"{record.id}-{number}")
                for number, instance in enumerate(body.instances)
            ]
            num_requests = sum(len(call.requests) for call in checked)
            record.prompt_tokens = sum(call.num_prompt_tokens for call in checked)
            more = services.admission.permit(num_requests - 1, holder=holder_of(request))
            permits.enter_context(more)
            for call in checked:
                for made in call.requests:
                    services.metrics.observe_start(made, validation_s=record.elapsed_s)
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [
                        group.create_task(_predict(services, record, call)) for call in checked
                    ]
            except ExceptionGroup as failures:
                raise failures.exceptions[0] from failures
    predictions = {"predictions": [task.result() for task in tasks]}
    return web.json_response(text=json.dumps(predictions, ensure_ascii=False))


async def _checked(
    request: web.Request, instance: GenerateBody | ChatBody, request_id: str
) -> ValidGeneration | ValidCall:
    services, record = request.app[SERVICES], request[RECORD]
    model = await model_of(request, instance.model)
    record.model = model.name
    check = validate_chat if isinstance(instance, ChatBody) else validate
    if isinstance(instance, ChatBody) and (instance.stream or (instance.n or 1) > 1):
        raise ValidationError("Input validation error: `stream` and `n` are not supported here")
    call = await check(
        instance,
        model,
        services.settings,
        request_id=request_id,
        created_at=record.created_at,
        traceparent=inject(),
    )
    owned = partial(with_owner, request=request, asked_priority=instance.priority)
    if isinstance(call, ValidCall):
        return call.with_requests(tuple(owned(made) for made in call.requests))
    return replace(call, requests=tuple(owned(made) for made in call.requests))


async def _predict(
    services: Services, record: RequestRecord, call: ValidGeneration | ValidCall
) -> str:
    answers = await services.generator.complete_all(
        call.requests, keeps_special_tokens=call.keeps_special_tokens
    )
    num_tokens = sum(answer.finish.generated_tokens for answer in answers)
    record.generated_tokens = (record.generated_tokens or 0) + num_tokens
    if isinstance(call, ValidGeneration):
        return call.prefix + answers[0].text
    return message_text(call, answers[0])
