"""Which model a request is for: its body or the header X-Model says so, or there is only one."""

from aiohttp import web

from common.errors import ValidationError
from gateway.model_directory import ServedModel
from gateway.services import SERVICES

HEADER = "x-model"

# What clients send that were told no model: text-generation and examples of TGI, huggingface_hub.
_PLACEHOLDERS = frozenset(("tgi", "dummy"))


async def model_of(request: web.Request, named: str | None) -> ServedModel:
    """The model that the body names as `named`, or the header, or the default.

    Raises ValidationError when both name one and not the same, and as `ModelDirectory.find`.
    """
    directory = request.app[SERVICES].directory
    if named in _PLACEHOLDERS and named not in {model.name for model in directory.models}:
        named = None
    wanted = header_of(request) or None
    if wanted is not None and named is not None and wanted != named:
        raise ValidationError(
            "Input validation error: `model` and the header X-Model must name the same model. "
            f"Given: `{named[:100]}` and `{wanted[:100]}`",
            param="model",
        )
    return await directory.find(wanted if named is None else named)


def header_of(request: web.Request) -> str:
    """The model that the header names, or nothing."""
    return request.headers.get(HEADER, "").strip()
