"""`tokenfleet generate`: a prompt to a running service, its answer to the terminal as it comes."""

import asyncio
import json
from typing import Any

import click

from common.cli import explained_imports
from common.errors import FleetError


@click.command()
@click.argument("prompt")
@click.option(
    "--url",
    "urls",
    multiple=True,
    default=("http://127.0.0.1:8080",),
    show_default=True,
    envvar="TOKENFLEET_URL",
    callback=lambda context, option, urls: tuple(map(_with_scheme, urls)),
    help="Gateway; several take over from each other.",
)
@click.option("--model", help="Model, where several are served.")
@click.option("--api-key", envvar="API_KEY", help="Key of the service.")
@click.option("--max-new-tokens", type=int, default=256, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    help="Turns sampling on; 0 is greedy, which is the default.",
)
@click.option("--seed", type=int)
@click.option("--stop", multiple=True, help="Text that ends the answer.")
@click.option("--stream/--no-stream", default=True, help="Print tokens as they come.")
@click.option("--json-output", is_flag=True, help="Print the events as JSON, one a line.")
@click.option("--patience-s", type=float, default=60.0, show_default=True)
def generate(
    prompt: str,
    urls: tuple[str, ...],
    model: str | None,
    api_key: str | None,
    stream: bool,
    json_output: bool,
    patience_s: float,
    **parameters: Any,
) -> None:
    """Generate an answer to PROMPT. When a gateway goes away, the answer goes on at the next one."""
    with explained_imports("client"):
        from common.client import FleetClient  # aiohttp, not needed for --help

    async def run() -> None:
        async with FleetClient(*urls, api_key=api_key, patience_s=patience_s) as client:
            if not stream:
                answer = await client.generate(prompt, parameters=given, model=model)
                click.echo(json.dumps(answer) if json_output else answer["generated_text"])
                return
            async for event in client.stream(prompt, parameters=given, model=model):
                if json_output:
                    click.echo(json.dumps(event))
                elif not event["token"]["special"]:
                    click.echo(event["token"]["text"], nl=False)
            if not json_output:
                click.echo()

    given = {name: value for name, value in parameters.items() if value not in (None, ())}
    if given.get("temperature") == 0:  # the service takes none of 0, and is greedy without one
        del given["temperature"]
    try:
        asyncio.run(run())
    except FleetError as error:
        raise click.ClickException(str(error)) from error


def _with_scheme(url: str) -> str:
    """`localhost:8080` means http://localhost:8080. Raises click.BadParameter for another scheme than HTTP's."""
    scheme, separator, _ = url.partition("://")
    if not separator:
        return f"http://{url}"
    if scheme.lower() not in ("http", "https"):
        raise click.BadParameter(f"a gateway's URL is http://... or https://... Given: {url}")
    return url
