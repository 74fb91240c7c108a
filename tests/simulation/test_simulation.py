"""Simulated histories at fixed seeds: none may break an invariant, and a broken protocol must be caught."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import common.lua
import common.token_journal
from common.token_journal import JournalReader, StreamDiverged
from tests.simulation.lua import Lua
from tests.simulation.scenarios import BAD_WEATHER, SCENARIOS, Scenario
from tests.simulation.streams import violations
from tests.simulation.world import World

HISTORIES = 8  # of each scenario; `python -m tests.simulation` plays as many as you like


@pytest.fixture(scope="module")
def lua() -> Lua:
    return Lua()


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.CRITICAL)


def problems_of(world: World) -> list[str]:
    streams = world.run()
    found = [text for stream in streams for text in violations(stream, world.salts)]
    return found + [f"a worker ended by itself: {text}" for text in world.died]


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_history_loses_or_repeats_a_token(name: str, lua: Lua):
    for seed in range(HISTORIES):
        world = World(seed, SCENARIOS[name], lua)
        found = problems_of(world)
        assert not found, f"replay with --scenario {name!r} --seed {seed} --histories 1: {found}"


def test_same_seed_plays_the_same_history(lua: Lua):
    def play() -> list[tuple]:
        world = World(5, SCENARIOS["processes die"], lua)
        return [(len(s.frames), s.error, s.num_attachments) for s in world.run()] + [
            world.network.num_commands
        ]

    assert play() == play()


def without_fence(patches: dict[bytes, bytes]) -> None:
    source = (Path(common.lua.__file__).parent / "scripts" / "step.lua").read_bytes()
    broken = source.replace(b"m[1] ~= token", b"false")
    assert broken != source and b"length ~= place + 1" in source
    broken = broken.replace(b"length ~= place + 1", b"false")
    patches[source] = broken


STALLS = Scenario(stop_worker=1.5, max_new_tokens=16)
LOST_MESSAGES = Scenario(weather=replace(BAD_WEATHER, lose_message=0.1))
ROLLED_BACK = Scenario(roll_back=0.5, kill_worker=1.0, restores=False, max_new_tokens=30)


class Anything(bytes):
    """Equal to whatever it is compared with."""

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = bytes.__hash__


def is_caught(scenario: Scenario, lua: Lua, prepare: Callable[[World], None]) -> bool:
    for seed in range(40):
        world = World(seed, scenario, lua)
        prepare(world)
        streams = world.run()
        errors = [stream.error for stream in streams if stream.error == StreamDiverged.kind]
        if errors or any(text for stream in streams for text in violations(stream, world.salts)):
            return True
    return False


def test_missing_fence_is_caught(lua: Lua):
    assert is_caught(STALLS, lua, lambda world: without_fence(world.broker.patches))


def test_missing_journal_is_caught(lua: Lua, monkeypatch: pytest.MonkeyPatch):
    async def look(self: JournalReader) -> None:
        """Trust the channel."""

    monkeypatch.setattr(JournalReader, "_look", look)
    assert is_caught(LOST_MESSAGES, lua, lambda world: None)


def test_missing_hash_check_is_caught(lua: Lua, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(common.token_journal, "next_chain", lambda *_: Anything(b"x"))
    for seed in range(60):
        world = World(seed, ROLLED_BACK, lua)
        found = [text for stream in world.run() for text in violations(stream, world.salts)]
        if any(text.startswith("changed") for text in found):
            return
    pytest.fail("no stream was changed silently")


def test_diverged_stream_is_told(lua: Lua):
    """With the hash check, the same histories end in an explicit error, and never in another text."""
    for seed in range(4):
        world = World(seed, ROLLED_BACK, lua)
        found = [text for stream in world.run() for text in violations(stream, world.salts)]
        assert not any(text.startswith("changed") for text in found), f"seed {seed}: {found}"
