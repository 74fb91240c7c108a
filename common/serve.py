"""`tokenfleet serve`: broker, gateway and workers on this machine, under one supervisor.

The one module of `common` that knows both sides, and it knows them by name: their settings, which are light, and the
commands that start them. It loads no model and opens no port itself.
"""

import asyncio
import errno
import logging
import pkgutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from common.broker import EmbeddedBroker
from common.child import Child
from common.errors import FleetError
from common.machine_limits import num_usable_cores
from common.probe import is_healthy, local_address
from common.settings import merged, options_from, part_of, setting, to_arguments
from common.supervisor import Service, Supervisor
from common.telemetry import configure_logging

GatewaySettings: Any = pkgutil.resolve_name("gateway.settings:GatewaySettings")
WorkerSettings: Any = pkgutil.resolve_name("worker.settings:WorkerSettings")

FIRST_PROGRESS_S = 1.0
PROGRESS_S = 5.0
STOP_MARGIN_S = 5.0  # on top of the time that a process gives itself for draining
EXIT_KILLED = 130  # as a shell reports a program that Ctrl-C ended
EXAMPLE = '{"inputs":"What is Deep Learning?","parameters":{"max_new_tokens":40}}'

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What `serve` has beside the settings of gateway and worker."""

    redis_url: str | None = setting(
        None,
        "Broker: redis://, rediss://, unix://, or redis+sentinel://host,host/service; without it one is "
        "started here.",
        env=("REDIS_URL",),
    )
    data_dir: str | None = setting(
        None, "Folder in which that broker keeps its data; the default is a temporary one."
    )
    num_workers: int = setting(1, "Worker processes; they share the cores.")
    graceful_termination_timeout_s: float | None = setting(
        None,
        "Seconds from SIGTERM to the end of everything, however long streams are; the default is what "
        "gateway and workers take one after the other.",
        aliases=("--graceful-termination-timeout",),
        env=("GRACEFUL_TERMINATION_TIMEOUT",),
    )

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ValueError(f"`num_workers` must be at least 1. Given: {self.num_workers}")
        if self.redis_url and self.data_dir:
            raise ValueError("`data_dir` has no use with `redis_url`: no broker is started here")
        timeout_s = self.graceful_termination_timeout_s
        if timeout_s is not None and timeout_s <= 0:
            raise ValueError(
                f"`graceful_termination_timeout_s` must be strictly positive. Given: {timeout_s}"
            )


@dataclass(frozen=True, slots=True)
class Grace:
    """How long the gateway and then the workers may drain, and how much later each is killed."""

    gateway_s: float
    worker_s: float
    margin_s: float = STOP_MARGIN_S

    @classmethod
    def within(cls, total_s: float) -> "Grace":
        """Nearly all for the gateway, for its streams are what one waits for; the rest is divided by four stops."""
        rest_s = min(10.0, total_s / 2)
        return cls(total_s - rest_s, rest_s / 4, rest_s / 4)


@dataclass(frozen=True, slots=True)
class Stack:
    """What is to be started: the settings of each part, and which of them the command line gave."""

    options: ServeOptions
    gateway: Any
    worker: Any
    given: AbstractSet[str]

    def __post_init__(self) -> None:
        if self.options.num_workers > 1 and self.worker.metrics_port:
            raise ValueError(
                "`metrics_port` can be had by one worker only; `num_workers` is larger"
            )

    def services(self, broker_url: str) -> tuple[list[Service], list[Service]]:
        """The gateway and the workers, in the order in which they stop: streams end before their workers do."""
        address = {} if self.options.redis_url else {"redis_url": broker_url}
        total_s = self.options.graceful_termination_timeout_s
        grace = (
            Grace.within(total_s) if total_s else Grace(self.gateway.drain_s, self.worker.drain_s)
        )
        gateway = self._command(
            "gateway",
            self.gateway,
            model_id=self.worker.model_name,
            port=self.gateway.port,
            wait_for_model=True,
            drain_s=grace.gateway_s,
            **address,
        )
        fixed = {"drain_s": grace.worker_s, **self._threads(), **address}
        worker = self._command("worker", self.worker, **fixed)
        count = self.options.num_workers
        names = ["worker"] if count == 1 else [f"worker {index + 1}" for index in range(count)]
        return (
            [_service("gateway", gateway, grace.gateway_s + grace.margin_s)],
            [_service(name, worker, grace.worker_s + grace.margin_s) for name in names],
        )

    def _threads(self) -> dict[str, int]:
        if self.options.num_workers == 1 or self.worker.threads is not None:
            return {}
        num_processes = self.options.num_workers * self.worker.num_local_shards
        return {"threads": max(1, num_usable_cores() // num_processes)}

    def _command(self, package: str, settings: Any, **fixed: Any) -> list[str]:
        """What the environment gave reaches the child through it, so that no secret stands on a command line."""
        arguments = to_arguments(replace(settings, **fixed), only=self.given | fixed.keys())
        # -P, because a folder named `worker` where the user stands must not be taken for ours.
        return [sys.executable, "-P", "-m", package, *arguments]


@click.command()
@options_from(merged("ServeSettings", ServeOptions, WorkerSettings, GatewaySettings))
def serve(settings: Any) -> None:
    """Serve a model on this machine: broker, gateway and workers under one supervisor.

    Needs neither Docker nor Redis nor a GPU. Ctrl-C lets open streams finish; a second one ends at once.
    """
    configure_logging(settings.log_level, settings.json_output)
    context = click.get_current_context()
    source = context.get_parameter_source
    given = {name for name in context.params if source(name) == ParameterSource.COMMANDLINE}
    try:
        gateway = part_of(settings, GatewaySettings)
        port = reserve_port(gateway.hostname, gateway.port)
        parts = (part_of(settings, ServeOptions), replace(gateway, port=port))
        stack = Stack(*parts, part_of(settings, WorkerSettings), given)
        code = asyncio.run(run(stack))
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    except FleetError as error:
        raise click.ClickException(str(error)) from error
    context.exit(code)


async def run(stack: Stack) -> int:
    """Start everything, say when the model can answer, stay until a signal; returns the exit code.

    Raises BrokerError, and StartupFailed when gateway or worker cannot start.
    """
    announcer = Announcer(stack)
    async with broker_url(stack.options) as url, Supervisor(stack.services(url)) as supervisor:
        _stop_on_signals(supervisor, announcer)
        await supervisor.until_ready(announcer.model_answers)
        if not supervisor.is_stopping:
            announcer.ready()
        await supervisor.until_stop_requested()
    return EXIT_KILLED if supervisor.was_killed else 0


@asynccontextmanager
async def broker_url(options: ServeOptions) -> AsyncIterator[str]:
    """The given broker, or one that runs as long as the block does."""
    if options.redis_url:
        yield options.redis_url
    elif options.data_dir:
        async with EmbeddedBroker(Path(options.data_dir).expanduser()) as broker:
            yield broker.url
    else:
        with tempfile.TemporaryDirectory(prefix="tokenfleet-") as folder:
            async with EmbeddedBroker(Path(folder)) as broker:
                yield broker.url


class Announcer:
    """Tells the person at the terminal what happens, as plain lines, or as log lines with `--json-output`."""

    def __init__(self, stack: Stack) -> None:
        self._model = stack.worker.model_name
        self._redis_url = stack.options.redis_url
        self._host = local_address(stack.gateway.hostname)
        self._port = stack.gateway.port
        self._needs_key = bool(stack.gateway.api_key or stack.gateway.api_keys_file)
        self._has_tls = stack.gateway.tls_cert is not None
        self._is_json = stack.worker.json_output
        self._started_at = time.monotonic()
        self._next_progress_s = FIRST_PROGRESS_S

    async def model_answers(self) -> bool:
        """Ask the gateway, whose port opens once the model can answer; meanwhile report progress."""
        is_ready = await is_healthy(self._host, self._port, has_tls=self._has_tls)
        if not is_ready and self._elapsed_s > self._next_progress_s:
            has_broker = await self._has_broker()
            state = "is loading" if has_broker else "waits for the broker, nobody answers there"
            self._say(f"{self._model} {state} ({self._elapsed_s:.0f} s)")
            self._next_progress_s += PROGRESS_S
        return is_ready

    def ready(self) -> None:
        """One line that can be pasted into a shell."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        key = " -H 'Authorization: Bearer <api key>'" if self._needs_key else ""
        self._say(
            f"{self._model} is ready after {self._elapsed_s:.1f} s. Try: "
            f"curl -N {'https' if self._has_tls else 'http'}://{host}:{self._port}/generate_stream{key} "
            f"-H 'Content-Type: application/json' -d '{EXAMPLE}'"
        )

    def stopping(self) -> None:
        """The answer to a Ctrl-C."""
        self._say("stopping: open streams may finish; once more ends them at once")

    async def _has_broker(self) -> bool:
        """One of ours is there before anything else starts."""
        if self._redis_url is None:
            return True
        from common.wire import BrokerAddress  # redis, not needed with a broker of ours

        return await BrokerAddress.parse(self._redis_url).is_there()

    @property
    def _elapsed_s(self) -> float:
        return time.monotonic() - self._started_at

    def _say(self, message: str) -> None:
        if self._is_json:
            log.info(message)
        else:
            click.echo(f"tokenfleet: {message}", err=True)


def reserve_port(hostname: str, port: int) -> int:
    """The port to serve on; 0 becomes a free one. Raises FleetError when it cannot be had, before a model is loaded."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            hostname, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind) as listener:
            # As a server does it: connections of a former one that linger do not count.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            return listener.getsockname()[1]
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise FleetError(
                f"Port {port} of {hostname} is taken by another program; end that one or choose another with --port."
            ) from error
        raise FleetError(f"Cannot listen on port {port} of {hostname}: {error.strerror}") from error


def _service(name: str, command: list[str], grace_s: float) -> Service:
    return Service(name, lambda: Child(command), grace_s=grace_s)


def _stop_on_signals(supervisor: Supervisor, announcer: Announcer) -> None:
    def stop() -> None:
        is_first = not supervisor.is_stopping
        supervisor.request_stop()
        if is_first:
            announcer.stopping()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    for number in numbers:
        asyncio.get_running_loop().add_signal_handler(number, stop)
