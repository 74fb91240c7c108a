"""`tokenfleet serve` as a user starts it, with the echo model: real broker, gateway and worker processes."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from common.broker import start_broker

ROOT = Path(__file__).parents[2]
TOKENS = 40

pytestmark = pytest.mark.redis


class Serve:
    """A running `tokenfleet serve`; `heard` holds the lines of its log that were waited for."""

    def __init__(self, *options: str, temporary: str) -> None:
        self.port = free_port()
        # The program's environment, with the checkout in the place of an installation and nobody's settings.
        env = {key: value for key, value in os.environ.items() if not key.startswith("TOKENFLEET_")}
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "common.cli",
                "serve",
                "--hostname",
                "127.0.0.1",
                "--log-level",
                "debug",
            ]
            + ["--port", str(self.port), *options],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**env, "PYTHONPATH": str(ROOT), "TMPDIR": temporary},
            start_new_session=True,
        )
        self.heard: list[str] = []

    def wait_for_line(self, pattern: str) -> re.Match[str]:
        """Read the log until a line matches."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.heard.append(line)
            if found := re.search(pattern, line):
                return found
        pytest.fail(f"no line with {pattern!r} in:\n{''.join(self.heard)}")

    def until_ready(self) -> "Serve":
        self.wait_for_line(r"is ready after [\d.]+ s\. Try: curl")
        return self

    def pid_of(self, name: str) -> int:
        """Of the process that was last started under this name."""
        pattern = rf"{name} started as process (\d+)"
        return int([found[1] for line in self.heard if (found := re.search(pattern, line))][-1])

    def stream(self, after_first: Callable[[], object] = lambda: None) -> str:
        """The text of a stream, put together from its tokens; `after_first` is called when the third has come."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        body = {"inputs": "What is Deep Learning? " * 4, "parameters": {"max_new_tokens": TOKENS}}
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/generate_stream", json.dumps(body), headers)
        response = connection.getresponse()
        assert response.status == 200
        events = []
        for line in response:
            if line.startswith(b"data:"):
                events.append(json.loads(line[5:]))
                if len(events) == 3:
                    after_first()
        connection.close()
        assert [event["index"] for event in events] == list(range(1, TOKENS + 1))
        text = "".join(event["token"]["text"] for event in events)
        assert events[-1]["generated_text"] == text
        return text

    def exit_code(self) -> int:
        """Wait for the end; the pipe is at its end only when no child is left."""
        assert self.process.stderr is not None
        self.heard += self.process.stderr.readlines()
        return self.process.wait()


@pytest.fixture
def serve() -> Iterator[Callable[..., Serve]]:
    running: list[Serve] = []

    def start(*options: str) -> Serve:
        echo = ("--model-id", "echo", "--echo-delay-ms", "20")
        running.append(Serve(*echo, *options, temporary=temporary))
        return running[-1]

    # not tmp_path, whose length leaves no room for the name of a socket
    with tempfile.TemporaryDirectory(prefix="serve-") as temporary:
        yield start
        for one in running:
            one.process.kill()
            one.exit_code()
            assert one.process.stderr is not None
            one.process.stderr.close()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_a_stream_outlives_each_process_that_serves_it(serve: Callable[..., Serve]) -> None:
    fleet = serve("--lease-s", "1").until_ready()
    undisturbed = fleet.stream()
    assert fleet.stream(lambda: os.kill(fleet.pid_of("worker"), signal.SIGKILL)) == undisturbed
    fleet.wait_for_line(r"worker ended after .* \(SIGKILL.*\); it starts again in 0\.5 s")
    assert fleet.stream(lambda: os.kill(fleet.pid_of("broker"), signal.SIGKILL)) == undisturbed
    fleet.wait_for_line(r"broker ended after")


def test_ctrl_c_lets_streams_finish(serve: Callable[..., Serve], tmp_path: Path) -> None:
    fleet = serve("--data-dir", str(tmp_path)).until_ready()
    assert fleet.stream(lambda: fleet.process.send_signal(signal.SIGINT))
    assert fleet.exit_code() == 0
    assert not any("killed" in line for line in fleet.heard)
    assert not (tmp_path / "broker.sock").exists()


def test_a_second_ctrl_c_ends_at_once(serve: Callable[..., Serve]) -> None:
    fleet = serve("--echo-delay-ms", "60000").until_ready()

    def ctrl_c_twice() -> None:
        fleet.process.send_signal(signal.SIGINT)
        fleet.wait_for_line("stopping")
        fleet.process.send_signal(signal.SIGINT)

    connection = http.client.HTTPConnection("127.0.0.1", fleet.port)
    body = json.dumps({"inputs": "a" * TOKENS, "parameters": {"max_new_tokens": TOKENS}})
    connection.request("POST", "/generate_stream", body, {"Content-Type": "application/json"})
    assert connection.getresponse().status == 200
    ctrl_c_twice()
    assert fleet.exit_code() == 130
    connection.close()


def test_kill_minus_nine_leaves_no_orphan(serve: Callable[..., Serve], tmp_path: Path) -> None:
    fleet = serve("--data-dir", str(tmp_path)).until_ready()
    with socket.socket(socket.AF_UNIX) as broker:
        broker.connect(str(tmp_path / "broker.sock"))
        fleet.process.kill()
        assert fleet.exit_code() == -signal.SIGKILL  # gateway and worker have closed the pipe
        with suppress(ConnectionResetError):  # it ended before it took the connection
            assert broker.recv(1) == b""


def test_a_model_that_cannot_be_loaded_ends_serve(
    serve: Callable[..., Serve], tmp_path: Path
) -> None:
    fleet = serve("--model-id", str(tmp_path / "no-such-model"))
    assert fleet.exit_code() == 1
    said = "".join(fleet.heard)
    assert "no-such-model" in said
    assert "worker could not start (exit code 1); its message is above" in said
    assert "starts again" not in said


def test_a_port_in_use_is_reported_before_anything_starts(serve: Callable[..., Serve]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        fleet = serve("--port", str(port))
        assert fleet.exit_code() == 1
    said = "".join(fleet.heard)
    assert f"Port {port} of 127.0.0.1 is taken by another program" in said
    assert "started as process" not in said


def test_a_given_broker_is_used(serve: Callable[..., Serve], tmp_path: Path) -> None:
    broker = start_broker(tmp_path, port=0, persistent=False)
    try:
        fleet = serve("--redis-url", broker.url, "--num-workers", "2").until_ready()
        assert fleet.stream()
        fleet.process.terminate()
        assert fleet.exit_code() == 0
    finally:
        broker.stop()
    assert fleet.pid_of("worker 1") != fleet.pid_of("worker 2")
    assert not any("broker started" in line for line in fleet.heard)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--num-workers", "0"], "`num_workers` must be at least 1. Given: 0"),
        (
            ["--num-workers", "2", "--metrics-port", "9"],
            "`metrics_port` can be had by one worker only",
        ),
        (["--redis-url", "redis://h", "--data-dir", "d"], "`data_dir` has no use with `redis_url`"),
        (["--max-batch-size", "0"], "`max_batch_size` must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    serve: Callable[..., Serve], options: list[str], reason: str
) -> None:
    fleet = serve(*options)
    assert fleet.exit_code() == 2
    assert reason in "".join(fleet.heard)


def test_it_says_that_it_waits_for_the_broker(serve: Callable[..., Serve]) -> None:
    fleet = serve("--redis-url", "unix:///nowhere/redis.sock")
    fleet.wait_for_line(r"tokenfleet: echo waits for the broker, nobody answers there \(\d+ s\)")
