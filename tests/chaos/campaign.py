"""Runs cells of the fault matrix and storms. A cell is replayed alone by its fault, phase and seed."""

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack

from tests.chaos.arena import Arena
from tests.chaos.client import END_AFTER_S, ChaosClient, Observation, new_observation
from tests.chaos.faults import DIVERGED, FAULTS, LATE, UNKNOWN, Fault
from tests.chaos.phases import PHASES, inject_at, inject_while_queued
from tests.chaos.results import Outcome
from tests.chaos.sharded import ShardedModel

PROMPT = "the quick brown fox jumps over the lazy dog"
STEP_MS = 40.0
STORM = "storm"

Name = tuple[str, str, int]  # fault, phase, seed


def matrix(
    seeds: Iterable[int], *, faults: Iterable[str] = FAULTS, phases: Iterable[str] = PHASES
) -> list[Name]:
    """Every cell with every seed, seed by seed in a drawn order; those on shards come last."""
    names = []
    for seed in seeds:
        turn = [(f, p, seed) for f in faults for p in phases if p[1] in FAULTS[f].phases]
        random.Random(seed).shuffle(turn)
        names += sorted(turn, key=lambda name: FAULTS[name[0]].needs_shards)
    return names


class Campaign:
    """Plays cells one after the other on one fleet, and on a new one after a cell that went wrong."""

    def __init__(
        self,
        *,
        say: Callable[[str], None] = lambda text: None,
        sabotage: str = "",
        end_after_s: float = END_AFTER_S,
    ) -> None:
        self._say = say
        self._end_after_s = end_after_s
        self._sabotage = ",".join(filter(None, ("poison", sabotage)))
        self._stack = AsyncExitStack()
        self._arena: Arena | None = None
        self._shards: ShardedModel | None = None

    async def run(
        self, names: Iterable[Name], *, until: float = float("inf")
    ) -> AsyncIterator[Outcome]:
        """The outcomes of these cells, as far as one begins before the monotonic clock says `until`."""
        try:
            for name in names:
                if time.monotonic() > until:
                    break
                outcome = await self._run_cell(FAULTS[name[0]], *name[1:])
                yield outcome
                if not outcome.is_sound:
                    await self._close()
        finally:
            await self._close()

    async def _close(self) -> None:
        await self._stack.aclose()
        self._arena = self._shards = None

    async def _arena_for(self, fault: Fault, draw: random.Random) -> Arena:
        if self._arena is None or fault.needs_shards != (self._shards is not None):
            await self._close()
            if fault.needs_shards:
                self._shards = await self._stack.enter_async_context(ShardedModel())
                arena = self._shards.arena(draw)
            else:
                arena = Arena(draw, step_ms=STEP_MS, sabotage=self._sabotage)
            self._arena = await self._stack.enter_async_context(arena)
            if self._shards:
                await self._shards.learn(self._arena)
        self._arena.draw = draw
        return self._arena

    async def _run_cell(self, fault: Fault, phase: str, seed: int) -> Outcome:
        draw, outcome = (
            random.Random(f"{seed} {fault.name} {phase}"),
            Outcome(fault.name, phase, seed),
        )
        arena = await self._arena_for(fault, draw)
        started = time.monotonic()
        arena.forget_salts()
        target = new_observation(
            self._prompt, self._length(fault), is_resuming=_is_resuming(fault, draw, 0.7)
        )
        if fault.prepare:
            await fault.prepare(arena, target)
        for worker in arena.workers if phase == "P1" else ():
            worker.send(signal.SIGSTOP)
        reading, *others = self._begin(arena, fault, target)

        async def inject() -> None:
            outcome.num_faults += 1
            await fault.inject(arena, target)

        if phase == "P1":
            outcome.is_hit = await inject_while_queued(arena, target, inject)
        else:
            outcome.is_hit = await inject_at(phase, arena, target, reading, inject)
        await arena.replace_missing()
        await self._judge(arena, fault, outcome, [await task for task in (reading, *others)])
        outcome.seconds = round(time.monotonic() - started, 2)
        self._tell(outcome, target)
        return outcome

    @property
    def _prompt(self) -> str:
        return self._shards.prompt if self._shards else PROMPT

    def _length(self, fault: Fault) -> int:
        return self._shards.num_tokens if self._shards else fault.num_tokens

    def _begin(
        self, arena: Arena, fault: Fault, target: Observation
    ) -> list[asyncio.Task[Observation]]:
        """The stream that is looked at, and two beside it."""
        client = ChaosClient(arena.urls, arena.draw)
        client.end_after_s = self._end_after_s
        others = [
            new_observation(
                self._prompt,
                arena.draw.randint(1, 2 * self._length(fault)),
                is_resuming=_is_resuming(fault, arena.draw, 0.5) or fault.is_plain,
            )
            for _ in range(2)
        ]
        return [
            asyncio.create_task(
                client.run(
                    self._prompt,
                    max_new_tokens=seen.seen.request.stopping.max_new_tokens,
                    is_resuming=seen.is_resuming,
                    observation=seen,
                )
            )
            for seen in (target, *others)
        ]

    async def _judge(
        self, arena: Arena, fault: Fault, outcome: Outcome, streams: list[Observation]
    ) -> None:
        says = self._shards.says if self._shards else None
        twins = [await task for task in arena.twins]
        for seen in (*streams, *twins):
            outcome.add(seen, arena.salts, allowed=fault.allowed, says=says)
        for twin in twins:
            if twin.seen.request.id != streams[0].seen.request.id:
                outcome.blame("changed: a second POST began a generation of its own")
            elif twin.seen.frames != streams[0].seen.frames:
                outcome.blame("changed: two readers of one generation saw different events")
        for text in (*arena.findings, *await arena.leftovers()):
            outcome.blame(text)
        outcome.ended += arena.ended
        for seen in (arena.twins, arena.findings, arena.ended):
            seen.clear()
        await arena.broker.drop_replica()

    def _tell(self, outcome: Outcome, target: Observation) -> None:
        verdict = "ok" if outcome.is_sound else f"WRONG {[*outcome.details, *outcome.ended]}"
        self._say(
            f"{outcome.fault:26} {outcome.phase} seed {outcome.seed} {outcome.seconds:5.1f} s  "
            f"gap {target.longest_gap_s:.2f} s  {'hit' if outcome.is_hit else 'missed'}  {verdict}"
        )

    async def run_storm(self, seed: int, *, seconds: float, num_clients: int = 6) -> Outcome:
        """Many clients at once, and faults at random times."""
        draw, outcome = random.Random(f"{seed} storm"), Outcome(STORM, "any", seed, is_hit=True)
        ends_at = time.monotonic() + seconds
        faults = [fault for fault in FAULTS.values() if fault.is_stormy]
        async with Arena(draw, step_ms=STEP_MS / 2, sabotage=self._sabotage) as arena:
            readers = [
                asyncio.create_task(_read_on(arena, outcome, ends_at)) for _ in range(num_clients)
            ]
            nobody = new_observation("", 1, is_resuming=True)
            while time.monotonic() < ends_at - 3:
                await asyncio.sleep(draw.expovariate(1.0))
                fault = draw.choice(faults)
                outcome.num_faults += 1
                self._say(f"storm: {fault.name}")
                await fault.inject(arena, nobody)
                await arena.replace_missing()
            await asyncio.gather(*readers)
            for text in (*arena.findings, *await arena.leftovers()):
                outcome.blame(text)
            outcome.ended += arena.ended
        outcome.seconds = seconds
        return outcome


def _is_resuming(fault: Fault, draw: random.Random, share: float) -> bool:
    return fault.needs_resuming or (draw.random() < share and not fault.is_plain)


async def _read_on(arena: Arena, outcome: Outcome, ends_at: float) -> None:
    draw = arena.draw
    while time.monotonic() < ends_at:
        seen = new_observation(PROMPT, draw.randint(1, 40), is_resuming=True)
        seen.slow_s = 0.1 if draw.random() < 0.1 else 0.0
        await ChaosClient(arena.urls, draw).run(
            PROMPT,
            max_new_tokens=seen.seen.request.stopping.max_new_tokens,
            is_resuming=True,
            leave_after=draw.randint(0, 10) if draw.random() < 0.1 else None,
            observation=seen,
        )
        outcome.add(seen, arena.salts, allowed=DIVERGED | LATE | UNKNOWN)
