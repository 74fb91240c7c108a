"""The `gateway` command."""

import click

from common.settings import options_from
from gateway.api_keys import KeyFileError, KeyRing
from gateway.settings import GatewaySettings
from gateway.tls import TlsFileError, certificate_of


def check_files(settings: GatewaySettings) -> None:
    """Read what the settings name once, so that a mistake is said once. Raises KeyFileError and TlsFileError."""
    KeyRing(settings.api_key, settings.api_keys_file)
    certificate_of(settings)


@click.command()
@options_from(GatewaySettings)
def gateway(settings: GatewaySettings) -> None:
    """Serve HTTP: put requests on the queue, stream their tokens back. Holds no state; run as many as you like."""
    from gateway.supervisor import run_gateway  # aiohttp and the rest, not needed for --help

    try:
        check_files(settings)
        run_gateway(settings)
    except (KeyFileError, TlsFileError) as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        address = f"{settings.hostname}:{settings.port}"
        raise click.ClickException(
            f"cannot listen on {address}: {error.strerror or error}"
        ) from error
