"""The `gateway` command."""

import click

from common.settings import options_from
from gateway.settings import GatewaySettings


@click.command()
@options_from(GatewaySettings)
def gateway(settings: GatewaySettings) -> None:
    """Serve HTTP: put requests on the queue, stream their tokens back. Holds no state; run as many as you like."""
    from gateway.supervisor import run_gateway  # aiohttp and the rest, not needed for --help

    try:
        run_gateway(settings)
    except OSError as error:
        address = f"{settings.hostname}:{settings.port}"
        raise click.ClickException(
            f"cannot listen on {address}: {error.strerror or error}"
        ) from error
