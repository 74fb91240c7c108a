"""Routes for operators and load balancers. None of them waits for a model or for the broker."""

from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from aiohttp import hdrs, web

from common.messages import ModelCard
from gateway.exposition import CONTENT_TYPE
from gateway.fleet_metrics import fleet_metrics
from gateway.model_directory import ServedModel
from gateway.services import SERVICES, Services

_UNHEALTHY = '{"error":"unhealthy","error_type":"healthcheck"}'
_LONG_CARD_FIELDS = ("chat_template",)


async def health(request: web.Request) -> web.Response:
    """Can a request be served now: the broker answers, a worker is ready, and this process is not stopping."""
    services = request.app[SERVICES]
    if services.directory.is_ready and not services.is_draining:
        return web.Response()
    return web.Response(status=503, text=_UNHEALTHY, content_type="application/json")


async def live(request: web.Request) -> web.Response:
    """This process runs. A dead broker or fleet is no reason to restart it."""
    return web.Response()


async def info(request: web.Request) -> web.Response:
    """TGI's fields for the default model, and everything that is served."""
    services = request.app[SERVICES]
    settings, directory = services.settings, services.directory
    card = directory.default.card if directory.default else None
    return web.json_response(
        {
            "model_id": card.model if card else settings.model_id,
            "model_sha": card.revision or None if card else None,
            "model_dtype": card.dtype or None if card else None,
            "model_device_type": card.device or None if card else None,
            "model_pipeline_tag": _pipeline_tag(card) if card else None,
            "max_concurrent_requests": settings.max_concurrent_requests,
            "max_best_of": settings.max_best_of,
            "max_stop_sequences": settings.max_stop_sequences,
            "max_input_tokens": card.max_input_tokens if card else None,
            "max_total_tokens": card.max_total_tokens if card else None,
            "validation_workers": settings.validation_workers,
            "max_client_batch_size": settings.max_client_batch_size,
            "router": "tokenfleet",
            "version": package_version(),
            "sha": None,
            "docker_label": None,
            "max_waiting_requests": settings.max_waiting_requests,
            "max_top_n_tokens": settings.max_top_n_tokens,
            "models": [_describe(model) for model in directory.models],
        }
    )


async def models(request: web.Request) -> web.Response:
    """What a request may name."""
    names = [model.name for model in request.app[SERVICES].directory.models]
    return web.json_response({"object": "list", "data": [model_entry(name) for name in names]})


async def metrics(request: web.Request) -> web.Response:
    """All processes that share the port, and the fleet."""
    services: Services = request.app[SERVICES]
    text = services.shared_metrics.render(fleet_metrics(services.directory))
    return web.Response(body=text.encode(), headers={hdrs.CONTENT_TYPE: CONTENT_TYPE})


def model_entry(name: str) -> dict[str, Any]:
    """A model in OpenAI's shape; when it was made, no worker knows."""
    return {"id": name, "object": "model", "created": 0, "owned_by": name}


def package_version() -> str:
    try:
        return version("tokenfleet")
    except PackageNotFoundError:
        return "0+source"  # run from a checkout that is not installed


def _pipeline_tag(card: ModelCard) -> str:
    return "text2text-generation" if card.is_encoder_decoder else "text-generation"


def _describe(model: ServedModel) -> dict[str, Any]:
    card = {
        name: value for name, value in asdict(model.card).items() if name not in _LONG_CARD_FIELDS
    }
    return {
        **card,
        "is_ready": model.is_ready,
        "waiting": model.depth.waiting,
        "running": model.depth.running,
        "workers": [asdict(worker) for worker in model.workers],
    }
