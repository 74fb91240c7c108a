"""The `health` command: can the gateway of this machine answer? For a container's health check."""

import asyncio

import click

from common.probe import is_healthy


@click.command()
@click.option("--hostname", default="127.0.0.1", show_default=True)
@click.option("--port", default=8080, show_default=True, envvar=["TOKENFLEET_PORT", "PORT"])
def health(hostname: str, port: int) -> None:
    """Exit with 0 when the gateway answers `GET /health` with 200, over HTTP or HTTPS; with 1 when it does not."""
    if not asyncio.run(_answers(hostname, port)):
        raise click.ClickException(f"nobody at {hostname}:{port} can answer")
    click.echo("ok")


async def _answers(hostname: str, port: int) -> bool:
    return await is_healthy(hostname, port, has_tls=False) or await is_healthy(
        hostname, port, has_tls=True
    )
