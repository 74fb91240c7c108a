"""Decides what runs in the next step: continuous batching over a paged KV cache. No torch.

A step has a budget of tokens. Decoding sequences come first, one token each; what is left goes to
prompt chunks of running sequences, then to admissions in the order of arrival:

    budget 16   |d|d|d| chunk of A (rest of its prompt) | chunk of B (as much as fits) |

A prompt that others follow leaves them a quarter of what it could take: else each short prompt
behind one of 100,000 tokens would wait for all of it.

The encoder of an encoder-decoder model reads its input in one piece, which counts towards the
budget. An input longer than what is left runs when it is the only prompt of its step: none waits
for ever behind the decodes, and none makes a step longer than itself.

Blocks for a whole prompt are taken at admission, so that a prefill never waits for memory half-way;
a decoding sequence takes a block whenever it has filled its last. If there is none, the sequence
that was admitted last gives all of its blocks back and is computed again later (preemption by
recompute). The first one never is preempted while others run, and alone it fits, so something
always ends.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Protocol

from common.errors import ValidationError
from common.messages import Frame
from worker.engine.block_manager import BlockManager
from worker.engine.plan import Chunk, KvCacheLayout, SequenceStart, StepPlan
from worker.engine.request_limits import RequestLimits
from worker.engine.sequence import TERMINAL_SEQUENCE_STATES, Sequence, SequenceState

_SMALLEST_DIVIDED = 64  # tokens


class HasFrame(Protocol):
    """What `commit` needs of an `Output`, whose file is one level up."""

    sequence: Sequence
    frame: Frame


class Scheduler:
    """Owns every live sequence from `add` until it ends or is dropped.

    One plan at a time: each `plan` is followed by its `commit`. After a step that failed, the
    sequences of its plan must be dropped instead, because the engine's memory of them is unknown.
    """

    def __init__(
        self,
        layout: KvCacheLayout,
        *,
        max_step_tokens: int,
        limits: RequestLimits | None = None,
        prefix_caching: bool = True,
        salt: str = "",
        has_spare_memory: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`salt`: what keys and values depend on besides tokens, as model and revision.
        `has_spare_memory`: see `BlockManager`."""
        assert layout.num_slots > 0 and max_step_tokens > 0
        self._layout = layout
        self._max_step_tokens = max_step_tokens
        self._limits = limits or RequestLimits()
        # Each running sequence must be able to decode in every step.
        self._max_running = min(layout.num_slots, max_step_tokens)
        self._prefix_caching = prefix_caching
        self._clock = clock
        self._blocks = BlockManager(
            layout.num_blocks, layout.block_size, salt=salt, has_spare_memory=has_spare_memory
        )
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in the order of admission
        self._slots: list[Sequence | None] = [None] * layout.num_slots
        self._free_slots = list(range(layout.num_slots - 1, -1, -1))
        self._released: list[int] = []  # named in the next plan
        self._step = 0
        self.num_preemptions = 0
        self.num_prefix_query_tokens = 0
        self.num_prefix_hit_tokens = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_used_blocks(self) -> int:
        return self._blocks.num_used

    @property
    def sequences(self) -> Iterator[Sequence]:
        """All live sequences, running ones first."""
        yield from self._running
        yield from self._waiting

    @property
    def room(self) -> int:
        """How many more requests it makes sense to lease now.

        Slots and blocks that the waiting ones will need are taken already. What the next requests
        need is not known: a guess is the mean of those that are here.
        """
        num_slots = self._max_running - self.num_running - self.num_waiting
        if num_slots <= 0 or not self.has_work:
            return max(0, num_slots)
        needs = [self._blocks_for(sequence, num_more=1) for sequence in self.sequences]
        num_wanted = sum(needs[self.num_running :])
        num_blocks = self._blocks.num_free - num_wanted - self.num_running
        return max(0, min(num_slots, num_blocks * len(needs) // sum(needs)))

    def sequence_at(self, slot: int) -> Sequence | None:
        """The sequence that lives in a slot; None when it was dropped since the plan was made."""
        return self._slots[slot]

    def add(self, sequence: Sequence, *, at_front: bool = False) -> None:
        """Queue a sequence; at the front if somebody is watching its stream already.

        Raises ValidationError when the engine was not built for it, or it could not finish even
        with the whole KV cache for itself.
        """
        assert sequence.state is SequenceState.WAITING and sequence.slot is None
        self._limits.check(sequence.request)
        num_more = sequence.max_positions - sequence.num_tokens
        if self._blocks_for(sequence, num_more=num_more) > self._layout.num_blocks:
            raise ValidationError(_too_large(sequence, self._layout))
        if at_front:
            self._waiting.appendleft(sequence)
        else:
            self._waiting.append(sequence)

    def plan(self) -> StepPlan | None:
        """What to run next; None when there is nothing to run.

        Slots that were released meanwhile wait for the next plan that has work: they cost the
        engine nothing.
        """
        if not self.has_work:
            return None
        chunks: list[Chunk] = []
        started: list[SequenceStart] = []
        num_preemptions = self.num_preemptions
        self._plan_decodes(chunks)
        num_decodes = len(chunks)
        budget = self._plan_prefills(chunks, self._max_step_tokens - num_decodes)
        # A plan that had to take memory away does not hand any out.
        if num_preemptions == self.num_preemptions:
            started = self._admit(chunks, budget, has_prompts=len(chunks) > num_decodes)
        assert chunks, "there is work, but none of it can run"
        released, self._released = tuple(self._released), []
        self._step += 1
        return StepPlan(self._step, tuple(chunks), tuple(started), released)

    def commit(self, plan: StepPlan, outputs: Iterable[HasFrame]) -> None:
        """Take over what a step did; sequences that were dropped meanwhile are left out."""
        assert plan.step == self._step, f"step {plan.step} is committed after plan {self._step}"
        for chunk in plan.chunks:
            sequence = self._slots[chunk.slot]
            if sequence is None:
                continue
            sequence.num_computed = chunk.start + len(chunk.tokens)
            if chunk.is_sampled:
                sequence.state = SequenceState.DECODING
            if sequence.num_computed // self._layout.block_size > sequence.num_registered:
                self._register(sequence)
        for output in outputs:
            sequence = output.sequence
            if sequence.state in TERMINAL_SEQUENCE_STATES:
                continue
            for token in output.frame.tokens:
                sequence.append(token.id)
            if (
                output.frame.failure
            ):  # its keys and values may be broken, too: nobody else shall find them
                self._blocks.forget(sequence.blocks)
            if output.frame.is_terminal:
                self.drop(sequence)

    def drop(self, sequence: Sequence) -> None:
        """End a sequence in any state, also one that was not added, and free what it holds; full blocks stay findable."""
        if sequence.state in TERMINAL_SEQUENCE_STATES:
            return
        if sequence.state is SequenceState.WAITING:
            if sequence in self._waiting:
                self._waiting.remove(sequence)
        else:
            self._running.remove(sequence)
            self._vacate(sequence)
        sequence.state = SequenceState.FINISHED

    def check(self) -> None:
        """Assert every invariant; for tests and idle moments."""
        tables = ((sequence.blocks, sequence.encoder_blocks) for sequence in self._running)
        self._blocks.check(chain.from_iterable(tables))
        assert len(self._running) + len(self._free_slots) == self._layout.num_slots
        assert {self._slots.index(sequence) for sequence in self._running}.isdisjoint(
            self._free_slots
        )
        for sequence in self._running:
            assert sequence.state in (SequenceState.PREFILLING, SequenceState.DECODING)
            assert sequence.slot is not None and self._slots[sequence.slot] is sequence
            assert sequence.num_computed < sequence.num_tokens
            assert sequence.num_computed <= len(sequence.blocks) * self._layout.block_size
            num_encoder_blocks = self._blocks.blocks_for(len(sequence.encoder_tokens))
            assert len(sequence.encoder_blocks) == num_encoder_blocks
        for sequence in self._waiting:
            assert sequence.state is SequenceState.WAITING and sequence.slot is None
            assert not sequence.blocks and not sequence.encoder_blocks
            assert not sequence.num_computed and not sequence.num_registered

    def _plan_decodes(self, chunks: list[Chunk]) -> None:
        block_size = self._layout.block_size
        for (
            sequence
        ) in self._running:  # preemption removes from the end only, where nothing is planned yet
            if sequence.state is not SequenceState.DECODING:
                continue
            new_blocks: tuple[int, ...] = ()
            if sequence.num_computed == len(sequence.blocks) * block_size:
                while sequence.slot is not None and not self._blocks.can_allocate(1):
                    self._preempt_newest()
                if sequence.slot is None:
                    return
                new_blocks = (self._blocks.take(),)
                sequence.blocks += new_blocks
            newest = (sequence.tokens[-1],)
            chunks.append(Chunk(sequence.slot, sequence.num_computed, newest, new_blocks, True))

    def _plan_prefills(self, chunks: list[Chunk], budget: int) -> int:
        prompts = [one for one in self._running if one.state is SequenceState.PREFILLING]
        for place, sequence in enumerate(prompts, 1):
            if budget > 0:
                is_followed = place < len(prompts) or self._can_admit
                chunk = self._prompt_chunk(sequence, _share(budget, is_followed=is_followed))
                chunks.append(chunk)
                budget -= len(chunk.tokens)
        return budget

    def _admit(self, chunks: list[Chunk], budget: int, *, has_prompts: bool) -> list[SequenceStart]:
        started = []
        while self._waiting and budget > 0 and self.num_running < self._max_running:
            sequence = self._waiting[0]
            num_encoder_tokens = len(sequence.encoder_tokens)
            if num_encoder_tokens >= budget and has_prompts:
                break
            shared = self._cached_prefix(sequence)
            if not self._has_room_for(sequence, shared):
                break
            self._waiting.popleft()
            self._place(sequence, shared)
            started.append(sequence.start())
            has_prompts = True
            budget = max(1, budget - num_encoder_tokens)
            share = _share(budget, is_followed=self._can_admit)
            chunk = self._prompt_chunk(sequence, share, tuple(sequence.blocks))
            chunks.append(chunk)
            budget -= len(chunk.tokens)
        return started

    @property
    def _can_admit(self) -> bool:
        """Whether the first that waits can have a slot, and blocks even if none of its is cached."""
        if not self._waiting or self.num_running >= self._max_running:
            return False
        return self._has_room_for(self._waiting[0], [])

    def _prompt_chunk(
        self, sequence: Sequence, most: int, new_blocks: tuple[int, ...] = ()
    ) -> Chunk:
        assert sequence.slot is not None
        start = sequence.num_computed
        end = min(start + most, sequence.num_tokens)
        tokens = tuple(sequence.tokens[start:end])
        return Chunk(sequence.slot, start, tokens, new_blocks, end == sequence.num_tokens)

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        """Known blocks at its beginning; one token at least is left, to have its logits."""
        # Log-probabilities of the prompt need the logits of all its positions.
        if not self._is_shareable(sequence) or sequence.wants_prompt_logprobs:
            return []
        num_reusable = sequence.num_tokens - 1
        self._blocks.extend_hashes(sequence.block_hashes, sequence.tokens, num_reusable)
        return self._blocks.match_prefix(
            sequence.block_hashes[: num_reusable // self._layout.block_size]
        )

    def _is_shareable(self, sequence: Sequence) -> bool:
        """Whether its blocks may be found by others.

        A decoder's keys and values depend on the encoder's input, too, which no block's hash knows.
        """
        return self._prefix_caching and not sequence.encoder_tokens

    def _blocks_for(self, sequence: Sequence, *, num_more: int = 0) -> int:
        """How many blocks its tokens need, and `num_more` tokens after them."""
        blocks_for = self._blocks.blocks_for
        return blocks_for(sequence.num_tokens + num_more) + blocks_for(len(sequence.encoder_tokens))

    def _has_room_for(self, sequence: Sequence, shared: list[int]) -> bool:
        """Whether its blocks are free, and beyond them one for each running sequence to grow into.

        Without that margin an admission could cause a preemption a few steps later.
        """
        if not self._running:
            return self._blocks.can_allocate(self._blocks_for(sequence), shared)
        num_blocks = self._blocks_for(sequence, num_more=1) + self.num_running
        return self._blocks.can_allocate(num_blocks, shared)

    def _place(self, sequence: Sequence, shared: list[int]) -> None:
        slot = self._free_slots.pop()
        self._slots[slot] = sequence
        self._running.append(sequence)
        blocks_for = self._blocks.blocks_for
        sequence.place(
            slot,
            self._blocks.allocate(blocks_for(sequence.num_tokens), shared),
            num_cached=len(shared) * self._layout.block_size,
            encoder_blocks=self._blocks.allocate(blocks_for(len(sequence.encoder_tokens))),
        )
        sequence.num_registered = len(shared)
        if sequence.started_at is None:
            sequence.started_at = self._clock()
            sequence.num_cached_tokens = min(
                sequence.num_computed, len(sequence.request.prompt_tokens)
            )
            self.num_prefix_query_tokens += sequence.num_tokens
            self.num_prefix_hit_tokens += sequence.num_computed

    def _register(self, sequence: Sequence) -> None:
        """Make the blocks that it has filled known to the prefix index."""
        if not self._is_shareable(sequence):
            return
        self._blocks.extend_hashes(sequence.block_hashes, sequence.tokens, sequence.num_computed)
        num_full = sequence.num_computed // self._layout.block_size
        for index in range(sequence.num_registered, num_full):
            self._blocks.register(sequence.blocks[index], sequence.block_hashes[index])
        sequence.num_registered = num_full

    def _preempt_newest(self) -> None:
        sequence = self._running.pop()
        self._vacate(sequence)
        self._waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _vacate(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self._blocks.free(sequence.blocks)
        self._blocks.free(sequence.encoder_blocks)
        self._slots[sequence.slot] = None
        self._free_slots.append(sequence.slot)
        self._released.append(sequence.slot)
        sequence.vacate()


def _share(budget: int, *, is_followed: bool) -> int:
    """How many tokens of `budget` a prompt may take. A small budget is not divided: a chunk costs
    a pass over the weights however short it is."""
    return budget - budget // 4 if is_followed and budget >= _SMALLEST_DIVIDED else budget


def _too_large(sequence: Sequence, layout: KvCacheLayout) -> str:
    """Why a sequence cannot be run on this worker, for its client."""
    limit, rule = layout.num_tokens + 1, ""  # the last token is told, but needs no place
    if sequence.encoder_tokens:
        limit, rule = layout.num_tokens, f", each in whole blocks of {layout.block_size}"
    return (
        f"`inputs` tokens + `max_new_tokens`{rule} must be <= the KV cache of this worker: {limit}. "
        f"Given: {len(sequence.request.prompt_tokens)} `inputs` tokens and "
        f"{sequence.request.stopping.max_new_tokens} `max_new_tokens`"
    )
