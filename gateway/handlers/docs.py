"""The API's description, for machines and for people. Everything is served from here; nothing comes from elsewhere."""

from collections.abc import Awaitable, Callable
from importlib.resources import files

from aiohttp import web

OPENAPI = web.AppKey("openapi", str)

_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_POLICY = "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


async def openapi(request: web.Request) -> web.Response:
    """The API as an OpenAPI document."""
    return web.Response(text=request.app[OPENAPI], content_type="application/json")


def static_file(name: str) -> Callable[[web.Request], Awaitable[web.Response]]:
    """A handler for one file of `gateway/static/`, read once."""
    path = files("gateway") / "static" / name
    body, kind = path.read_bytes(), _KINDS[name[name.rindex(".") :]]

    async def serve(request: web.Request) -> web.Response:
        """A file of the documentation page."""
        headers = {"content-security-policy": _POLICY, "cache-control": "no-cache"}
        return web.Response(body=body, content_type=kind, charset="utf-8", headers=headers)

    return serve
