"""The `tokenfleet` command. A subcommand's module is imported when that command runs, so `tokenfleet gateway` never meets torch.

`COMMANDS` is the list of subcommands: for each the click command, as `module:name`, and the line that `--help` shows.
"""

import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager

import click

COMMANDS = {
    "serve": ("common.serve:serve", "Serve a model on this machine: broker, gateway and workers."),
    "gateway": ("gateway.cli:gateway", "Answer HTTP requests through the queue. Needs no torch."),
    "worker": ("worker.cli:worker", "Load a model and generate what the queue holds."),
    "download-weights": ("worker.weights.download:command", "Fetch a model's files from the hub."),
    "generate": ("common.generate:generate", "Ask a running service, and survive its gateways."),
    "queue": ("common.queue_commands:queue", "Look into the queue: depth and dead letters."),
    "health": ("common.health:health", "Ask the gateway of this machine whether it can answer."),
    "keys": ("gateway.key_commands:keys", "Make API keys for --api-keys-file."),
    "demo-model": ("worker.weights.demo_model:command", "Fetch a small model to try things with."),
}
OWN_PACKAGES = frozenset({"common", "gateway", "worker"})


class LazyGroup(click.Group):
    """A group whose commands are known by name; `--help` imports none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        path, _ = COMMANDS[cmd_name]
        with explained_imports(path.partition(".")[0]):
            return pkgutil.resolve_name(path)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@contextmanager
def explained_imports(part: str) -> Iterator[None]:
    """Turn the failed import of a foreign package into a sentence that says what to install for `part`."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in OWN_PACKAGES:
            raise
        extra = "gateway,worker,local" if part == "common" else part
        raise click.ClickException(
            f"The Python package {error.name!r} is missing. `pip install 'tokenfleet[{extra}]'` installs what is needed."
        ) from error


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="tokenfleet", message="%(prog)s %(version)s")
def main() -> None:
    """Text generation serving: a fleet of workers behind a durable queue."""


if __name__ == "__main__":
    main(prog_name="tokenfleet")
