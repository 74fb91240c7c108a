"""Several gateway processes behind one port: starts them, replaces those that crash, stops them together.

The kernel spreads connections over the processes (SO_REUSEPORT). They share nothing but the broker and a folder in
which each keeps its metrics.
"""

import logging
import multiprocessing
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from common.telemetry import configure_logging
from gateway.exposition import bury
from gateway.server import run_server
from gateway.settings import GatewaySettings

logger = logging.getLogger(__name__)

_LOOK_S = 0.5
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
_STABLE_S = 10.0  # a process that lived so long did not fail at its start
_STOP_MARGIN_S = 5.0


class Supervisor:
    """Keeps `gateway_workers` processes running until it is told to stop."""

    def __init__(self, settings: GatewaySettings, folder: Path) -> None:
        self._settings = settings
        self._folder = folder
        self._context = multiprocessing.get_context("spawn")
        self._processes: dict[SpawnProcess, float] = {}  # and when each was started
        self._pause_s = _FIRST_PAUSE_S
        self._is_stopping = False

    def run(self) -> None:
        """Serve until `stop()`."""
        for _ in range(self._settings.gateway_workers):
            self._start()
        while not self._is_stopping:
            wait([process.sentinel for process in self._processes], timeout=_LOOK_S)
            for process in [process for process in self._processes if not process.is_alive()]:
                self._replace(process)
        self._stop_all()

    def stop(self) -> None:
        """Safe in a signal handler."""
        self._is_stopping = True

    def _start(self) -> None:
        process = self._context.Process(
            target=run_child, args=(self._settings, self._folder), name="gateway"
        )
        process.start()
        self._processes[process] = time.monotonic()

    def _replace(self, process: SpawnProcess) -> None:
        lived_s = time.monotonic() - self._processes.pop(process)
        self._pause_s = (
            _FIRST_PAUSE_S if lived_s > _STABLE_S else min(self._pause_s * 2, _LONGEST_PAUSE_S)
        )
        assert process.pid is not None
        bury(self._folder, process.pid)
        if self._is_stopping:
            return
        logger.error(
            "a gateway process ended and is replaced",
            extra={"pid": process.pid, "exit_code": process.exitcode, "pause_s": self._pause_s},
        )
        time.sleep(self._pause_s)
        if not self._is_stopping:
            self._start()

    def _stop_all(self) -> None:
        for process in self._processes:
            process.terminate()
        give_up_at = time.monotonic() + self._settings.drain_s + _STOP_MARGIN_S
        for process in self._processes:
            process.join(max(0.0, give_up_at - time.monotonic()))
            if process.is_alive():
                logger.error(
                    "a gateway process did not stop and is killed", extra={"pid": process.pid}
                )
                process.kill()
                process.join()


def run_child(settings: GatewaySettings, folder: Path) -> None:
    """A supervised process. Ctrl-C reaches the whole group; only the supervisor acts on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run_server(settings, folder)


def run_gateway(settings: GatewaySettings) -> None:
    """Serve with as many processes as the settings say. Raises OSError when the port cannot be had."""
    if settings.gateway_workers == 1:
        run_server(settings)
        return
    configure_logging(settings.log_level, settings.json_output)
    with (
        tempfile.TemporaryDirectory(prefix="tokenfleet-gateway-") as folder,
        _reserved_port(settings) as port,
    ):
        supervisor = Supervisor(replace(settings, port=port), Path(folder))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: supervisor.stop())
        supervisor.run()


@contextmanager
def _reserved_port(settings: GatewaySettings) -> Iterator[int]:
    """Hold the port, so that a port in use is an error here and port 0 is the same one for all processes."""
    family, kind, _, _, address = socket.getaddrinfo(
        settings.hostname, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    with socket.socket(family, kind) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(address)  # not listening: the kernel gives it no connections
        yield holder.getsockname()[1]
