"""Children, services and the supervisor, with shell commands in the place of gateway and worker."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.child import Child, describe_exit
from common.supervisor import Service, StartupFailed, Supervisor

FOREVER = ["sleep", "1000"]
ROOT = Path(__file__).parents[3]


async def always() -> bool:
    return True


def service(name: str, *command: str, grace_s: float = 10, first_pause_s: float = 0.01) -> Service:
    return Service(name, lambda: Child(command), grace_s=grace_s, first_pause_s=first_pause_s)


def draining(name: str, folder: Path) -> Service:
    """Says `name` in the file `stopped` when it gets SIGTERM; makes the file `name` once it is ready for that."""
    script = (
        f"trap 'echo {name} >> {folder}/stopped; exit 0' TERM; "
        f"touch {folder}/{name}; while :; do sleep 0.02; done"
    )
    return service(name, "sh", "-c", script)


async def test_a_child_has_a_session_of_its_own() -> None:
    child = Child(FOREVER)
    assert os.getsid(child.pid) == child.pid
    child.kill()
    assert await child.exited() == -signal.SIGKILL


async def test_exit_codes_are_those_of_the_command() -> None:
    assert await Child(["sh", "-c", "exit 3"]).exited() == 3
    assert Child(["true"]).wait() == 0


def test_a_command_that_does_not_exist_says_so(tmp_path: Path) -> None:
    with open(tmp_path / "said", "wb") as output:
        child = Child(["/no/such/program"], output=output)
    assert child.wait() == 127
    assert "cannot run /no/such/program: No such file" in (tmp_path / "said").read_text()


def test_waiting_longer_than_allowed_is_a_timeout() -> None:
    child = Child(FOREVER)
    with pytest.raises(TimeoutError, match="still runs after"):
        child.wait(0.01)
    child.kill()
    child.wait()


@pytest.mark.parametrize("ending", ["kill", "crash"])
def test_grandchildren_end_with_a_child(ending: str) -> None:
    reading, writing = os.pipe()
    with open(writing, "wb") as output:
        child = Child(["sh", "-c", "sleep 1000 & echo started; wait"], output=output)
    with open(reading, "rb") as said:
        assert said.readline() == b"started\n"
        if ending == "kill":
            child.kill()
        else:
            os.kill(child.pid, signal.SIGKILL)
        child.wait()
        assert said.read() == b""  # the end comes when nobody holds the other end of the pipe


@pytest.mark.parametrize("has_death_signal", [True, False])
def test_kill_minus_nine_of_the_parent_leaves_no_orphan(has_death_signal: bool) -> None:
    if has_death_signal and sys.platform != "linux":
        pytest.skip("only Linux has a death signal")
    program = (
        "import signal; from common.child import Child; "
        f"children = [Child(['sh', '-c', 'trap \"\" TERM HUP INT; echo up; exec sleep 1000'], "
        f"has_death_signal={has_death_signal}) for _ in range(3)]; signal.pause()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert parent.stdout is not None
    with parent.stdout as said:
        assert [said.readline() for _ in range(3)] == [b"up\n"] * 3
        parent.kill()
        parent.wait()
        assert said.read() == b""  # the children hold this pipe too


def test_exits_in_words() -> None:
    assert describe_exit(2) == "exit code 2"
    assert describe_exit(-signal.SIGTERM) == "SIGTERM"
    assert "memory" in describe_exit(-signal.SIGKILL)


async def test_a_crashed_service_starts_again(caplog: pytest.LogCaptureFixture) -> None:
    starts: asyncio.Queue[Child] = asyncio.Queue()

    def start() -> Child:
        child = Child(FOREVER)
        starts.put_nowait(child)
        return child

    crashing = Service("worker", start, grace_s=10, first_pause_s=0.01)
    async with asyncio.timeout(20), Supervisor([[crashing]]) as supervisor:
        await supervisor.until_ready(always)
        running = asyncio.create_task(supervisor.until_stop_requested())
        for _ in range(3):
            child = await starts.get()
            assert crashing.pid == child.pid
            child.kill()
        last = await starts.get()
        supervisor.request_stop()
        await running
    assert last.exit_code == -signal.SIGTERM
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    pauses = [record.args[-1] for record in caplog.records if isinstance(record.args, tuple)]
    assert pauses == [0.01, 0.02, 0.04]


async def test_a_failure_before_all_is_ready_is_final() -> None:
    async def never() -> bool:
        return False

    healthy = service("gateway", *FOREVER)
    with pytest.raises(StartupFailed, match=r"worker could not start \(exit code 7\)") as caught:
        async with (
            asyncio.timeout(20),
            Supervisor([[healthy], [service("worker", "sh", "-c", "exit 7")]]) as supervisor,
        ):
            await supervisor.until_ready(never)
    assert caught.value.exit_code == 7
    assert healthy.exit_code == -signal.SIGTERM


async def test_groups_stop_one_after_the_other(tmp_path: Path) -> None:
    names = ["gateway", "worker", "broker"]

    async def all_up() -> bool:
        return all((tmp_path / name).exists() for name in names)

    async with (
        asyncio.timeout(20),
        Supervisor([[draining(name, tmp_path)] for name in names]) as supervisor,
    ):
        await supervisor.until_ready(all_up)
    assert (tmp_path / "stopped").read_text().split() == names


async def test_a_service_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    async def deaf() -> bool:
        return (tmp_path / "deaf").exists()

    script = f"trap '' TERM; touch {tmp_path}/deaf; while :; do sleep 0.02; done"
    stubborn = service("worker", "sh", "-c", script, grace_s=0.05)
    async with asyncio.timeout(20), Supervisor([[stubborn]]) as supervisor:
        await supervisor.until_ready(deaf)
    assert stubborn.exit_code == -signal.SIGKILL


async def test_a_second_request_to_stop_kills(tmp_path: Path) -> None:
    async def deaf() -> bool:
        return (tmp_path / "deaf").exists()

    script = f"trap '' TERM; touch {tmp_path}/deaf; while :; do sleep 0.02; done"
    stubborn = service("worker", "sh", "-c", script, grace_s=1000)
    async with asyncio.timeout(20), Supervisor([[stubborn]]) as supervisor:
        await supervisor.until_ready(deaf)
        supervisor.request_stop()
        await supervisor.until_stop_requested()
        assert not supervisor.was_killed
        supervisor.request_stop()
    assert supervisor.was_killed
    assert stubborn.exit_code == -signal.SIGKILL


async def test_a_stop_ends_the_wait_for_readiness() -> None:
    async def never() -> bool:
        supervisor.request_stop()
        return False

    async with asyncio.timeout(20), Supervisor([[service("worker", *FOREVER)]]) as supervisor:
        await supervisor.until_ready(never)
        assert supervisor.is_stopping


async def test_a_start_that_fails_stops_what_was_started() -> None:
    def fail() -> Child:
        raise OSError("no more processes")

    first = service("worker", *FOREVER)
    with pytest.raises(OSError, match="no more processes"):
        async with Supervisor([[Service("gateway", fail, grace_s=1)], [first]]):
            pytest.fail("must not be entered")
    assert first.exit_code == -signal.SIGTERM
