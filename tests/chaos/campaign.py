"""Runs cells of the fault matrix and storms, and counts what clients saw."""

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.chaos.arena import Arena
from tests.chaos.client import ChaosClient, Observation, new_observation
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.phases import PHASES, inject_at, inject_while_queued
from tests.simulation.streams import violations

PROMPT = "the quick brown fox jumps over the lazy dog"
NUM_TOKENS = 16
DIVERGED = "stream_diverged"
STORM = "storm"


@dataclass(slots=True)
class Cell:
    """What happened at one fault in one phase, over all its seeds."""

    fault: str
    phase: str
    runs: int = 0
    reached: int = 0  # runs in which the fault hit the phase that was meant
    streams: int = 0
    faults: int = 0
    wrong: Counter = field(default_factory=Counter)  # lost, repeated, changed, stuck, ...
    errors: Counter = field(default_factory=Counter)  # explicit errors by kind
    refusals: int = 0
    gaps_s: list[float] = field(default_factory=list)
    details: list[str] = field(default_factory=list)

    def add(self, seen: Observation, salts: list[str], *, may_diverge: bool) -> None:
        self.streams += 1
        self.refusals += seen.refusals
        if seen.longest_gap_s:
            self.gaps_s.append(seen.longest_gap_s)
        problems = [*violations(seen.seen, salts), *seen.problems]
        if seen.seen.error:
            self.errors[seen.seen.error] += 1
            if not (may_diverge and seen.seen.error == DIVERGED):
                problems.append(f"error: {seen.seen.error}")
        for text in problems:
            self.wrong[text.partition(":")[0]] += 1
            self.details.append(f"{self.fault} {self.phase} {seen.seen.request.id}: {text}")


class Campaign:
    """All results of a run."""

    def __init__(self, seed: int, *, say: Callable[[str], None] = lambda text: None) -> None:
        self.seed = seed
        self.cells: dict[tuple[str, str], Cell] = {}
        self.ended: list[str] = []
        self._say = say

    @property
    def is_sound(self) -> bool:
        return not self.ended and not any(cell.wrong for cell in self.cells.values())

    def cell(self, fault: str, phase: str) -> Cell:
        return self.cells.setdefault((fault, phase), Cell(fault, phase))

    async def run_matrix(
        self, *, until: float, faults: list[str] | None = None, phases: tuple[str, ...] = PHASES
    ) -> None:
        """Cells in a drawn order, again and again, until the monotonic clock says `until`."""
        draw = random.Random(self.seed)
        plan = [
            (FAULTS[name], phase)
            for name in faults or FAULTS
            for phase in phases
            if phase[1] in FAULTS[name].phases
        ]
        turn = 0
        async with Arena(draw, step_ms=40) as arena:
            while time.monotonic() < until:
                draw.shuffle(plan)
                for fault, phase in plan:
                    if time.monotonic() > until:
                        break
                    await self._run_cell(arena, fault, phase)
                turn += 1
            self.ended += arena.ended

    async def _run_cell(self, arena: Arena, fault: Fault, phase: str) -> None:
        draw, cell = arena.draw, self.cell(fault.name, phase)
        target_resumes = fault.needs_resuming or draw.random() < 0.7
        target = new_observation(PROMPT, NUM_TOKENS, is_resuming=target_resumes)
        client = ChaosClient(arena.urls, draw)
        others = [
            asyncio.create_task(
                client.run(
                    PROMPT,
                    max_new_tokens=draw.randint(1, 30),
                    is_resuming=fault.needs_resuming or draw.random() < 0.5,
                )
            )
            for _ in range(2)
        ]
        is_queued_phase = phase == "P1"
        if is_queued_phase:
            for worker in arena.workers:
                worker.send(signal.SIGSTOP)
        reading = asyncio.create_task(
            client.run(
                PROMPT, max_new_tokens=NUM_TOKENS, is_resuming=target_resumes, observation=target
            )
        )

        async def inject() -> None:
            cell.faults += 1
            await fault.inject(arena, target)

        started = time.monotonic()
        self._say(f"{fault.name} {phase}")
        if is_queued_phase:
            was_there = await inject_while_queued(arena, target, inject)
        else:
            was_there = await inject_at(phase, arena, target, reading, inject)
        await arena.replace_missing()
        streams = await asyncio.gather(reading, *others)
        cell.runs += 1
        cell.reached += was_there
        num_wrong = sum(cell.wrong.values())
        for seen in streams:
            cell.add(seen, arena.salts, may_diverge=fault.loses_data)
        verdict = "ok" if sum(cell.wrong.values()) == num_wrong else f"WRONG {cell.details[-1]}"
        self._say(
            f"{fault.name:26} {phase} {time.monotonic() - started:5.1f} s  "
            f"gap {streams[0].longest_gap_s:.2f} s  {'hit' if was_there else 'missed'}  {verdict}"
        )

    async def run_storm(self, *, seconds: float, num_clients: int = 6) -> None:
        """Many clients at once, and faults at random times."""
        draw = random.Random(self.seed + 1)
        cell = self.cell(STORM, "any")
        ends_at = time.monotonic() + seconds
        async with Arena(draw, step_ms=20) as arena:
            readers = [
                asyncio.create_task(self._read_on(arena, cell, ends_at)) for _ in range(num_clients)
            ]
            nobody = new_observation("", 1, is_resuming=True)
            while time.monotonic() < ends_at - 3:
                await asyncio.sleep(draw.expovariate(1.0))
                fault = FAULTS[draw.choice(list(FAULTS))]
                cell.faults += 1
                self._say(f"storm: {fault.name}")
                await fault.inject(arena, nobody)
                await arena.replace_missing()
            await asyncio.gather(*readers)
            self.ended += arena.ended
        cell.runs += 1

    async def _read_on(self, arena: Arena, cell: Cell, ends_at: float) -> None:
        draw = arena.draw
        while time.monotonic() < ends_at:
            seen = await ChaosClient(arena.urls, draw).run(
                PROMPT,
                max_new_tokens=draw.randint(1, 40),
                is_resuming=True,
                leave_after=draw.randint(0, 10) if draw.random() < 0.1 else None,
                slow_s=0.1 if draw.random() < 0.1 else 0.0,
            )
            cell.add(seen, arena.salts, may_diverge=True)
