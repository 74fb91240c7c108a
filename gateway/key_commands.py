"""`tokenfleet keys`: makes keys for `--api-keys-file`."""

import click

from gateway.api_keys import KeyFileError, line_for, new_key


@click.group()
def keys() -> None:
    """Make keys for clients."""


@keys.command()
@click.argument("name")
def new(name: str) -> None:
    """Make a key for the client NAME.

    The key goes to standard error, this once: nothing keeps it. The line for the key file goes to standard output, so
    that `tokenfleet keys new NAME >> keys.toml` does it.
    """
    key = new_key()
    try:
        line = line_for(name, key)
    except KeyFileError as error:
        raise click.UsageError(str(error)) from error
    click.echo(f"The key of {name}, shown only now: {key}", err=True)
    click.echo(line)
