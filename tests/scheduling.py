"""Continuous batching against a simulated engine that knows only block tables and blocks.

Its next token is a function of all tokens that it finds through a slot's tables, so that a wrong
block, a stale shared block or a wrong start shows as a wrong token.
"""

from dataclasses import dataclass

from common.messages import (
    Finish,
    FinishReason,
    Frame,
    GenerationRequest,
    Sampling,
    Stopping,
    Token,
)
from worker.engine.plan import KvCacheLayout, Sampled, StepResult
from worker.engine.scheduler import Scheduler
from worker.engine.sequence import Sequence

START = 49  # what the decoder of an encoder-decoder model begins with


def next_token(tokens, encoder_tokens=()):
    """The model: the next token after all of `tokens`."""
    return hash((*encoder_tokens, -1, *tokens)) % 50


def reference(request, *, has_encoder=False):
    encoder_tokens = request.prompt_tokens if has_encoder else ()
    tokens = [START] if has_encoder else list(request.prompt_tokens)
    num_prompt = len(tokens)
    for _ in range(request.stopping.max_new_tokens):
        tokens.append(next_token(tokens, encoder_tokens))
    return tokens[num_prompt:]


def a_request(prompt, max_new_tokens=4, name="r", **fields):
    return GenerationRequest(
        name, "model", tuple(prompt), Sampling(), Stopping(max_new_tokens), **fields
    )


def a_sequence(prompt, max_new_tokens=4, name="r", **fields):
    return Sequence(a_request(prompt, max_new_tokens, name, **fields))


def a_translation(prompt, max_new_tokens=4, name="r", **fields):
    """A sequence of an encoder-decoder model."""
    request = a_request(prompt, max_new_tokens, name, **fields)
    return Sequence(request, decoder_start_token=START)


@dataclass
class SlotState:
    start: object
    table: list


class SimulatedEngine:
    """Slots with block tables, and blocks with the token at each position.

    What a decoder has computed of a token also holds what its encoder had read.
    """

    def __init__(self, layout):
        self.layout = layout
        self.slots = {}
        self.blocks = [[None] * layout.block_size for _ in range(layout.num_blocks)]

    def step(self, plan):
        for slot in plan.released:
            del self.slots[slot]
        for start in plan.started:
            assert start.slot not in self.slots
            self.slots[start.slot] = SlotState(start, [])
            self.encode(start)
        assert len({chunk.slot for chunk in plan.chunks}) == len(plan.chunks)
        for chunk in plan.chunks:
            self.write(chunk)
        sampled = [
            Sampled(chunk.slot, next_token(self.read(chunk), self.read_encoded(chunk.slot)), -1.0)
            for chunk in plan.chunks
            if chunk.is_sampled
        ]
        return StepResult(plan.step, tuple(sampled))

    def encode(self, start):
        size = self.layout.block_size
        assert len(start.encoder_blocks) == -(-len(start.encoder_tokens) // size)
        for position, token in enumerate(start.encoder_tokens):
            self.blocks[start.encoder_blocks[position // size]][position % size] = token

    def read_encoded(self, slot):
        start, size = self.slots[slot].start, self.layout.block_size
        tokens = [
            self.blocks[start.encoder_blocks[position // size]][position % size]
            for position in range(len(start.encoder_tokens))
        ]
        assert tuple(tokens) == start.encoder_tokens
        return tokens

    def write(self, chunk):
        state, size = self.slots[chunk.slot], self.layout.block_size
        state.table += chunk.new_blocks
        for position, token in enumerate(chunk.tokens, chunk.start):
            block = self.blocks[state.table[position // size]]
            block[position % size] = (token, state.start.encoder_tokens)

    def read(self, chunk):
        state, size = self.slots[chunk.slot], self.layout.block_size
        places = [
            self.blocks[state.table[position // size]][position % size]
            for position in range(chunk.start + len(chunk.tokens))
        ]
        tokens = [token for token, _ in places]
        assert {encoder_tokens for _, encoder_tokens in places} == {state.start.encoder_tokens}
        known = (*state.start.prompt_tokens, *state.start.output_tokens)
        assert tuple(tokens[: len(known)]) == known[: len(tokens)]
        return tokens


@dataclass
class FakeOutput:
    sequence: Sequence
    frame: Frame


def outputs_of(scheduler, result):
    """What the output processor would make of a result, without text."""
    outputs = []
    for sampled in result.sampled:
        sequence = scheduler.sequence_at(sampled.slot)
        if sequence is None:
            continue
        num_generated = len(sequence.output_tokens) + 1
        is_last = num_generated == sequence.request.stopping.max_new_tokens
        finish = Finish(FinishReason.LENGTH, num_generated) if is_last else None
        sequence.num_frames += 1
        tokens = (Token(sampled.token, "", -1.0),)
        outputs.append(FakeOutput(sequence, Frame(tokens=tokens, chain=b"chain", finish=finish)))
    return outputs


def is_one_input(plan):
    """Whether an encoder's input is the only thing in a plan besides decoding sequences."""
    slots = [start.slot for start in plan.started if start.encoder_tokens]
    others = [chunk for chunk in plan.chunks if chunk.slot not in slots]
    return len(slots) == len(plan.started) == 1 and all(
        len(chunk.tokens) == 1 and chunk.is_sampled for chunk in others
    )


class SimulatedWorker:
    """A scheduler and an engine that step together, checked after every step."""

    def __init__(self, num_blocks=64, block_size=4, num_slots=4, max_step_tokens=16, **options):
        self.layout = KvCacheLayout(num_blocks, block_size, num_slots)
        self.scheduler = Scheduler(self.layout, max_step_tokens=max_step_tokens, **options)
        self.engine = SimulatedEngine(self.layout)
        self.max_step_tokens = max_step_tokens

    def add(self, *sequences, **options):
        for sequence in sequences:
            self.scheduler.add(sequence, **options)

    def step(self):
        plan = self.scheduler.plan()
        if plan is None:
            return None
        assert 0 < plan.num_tokens
        assert plan.num_tokens <= self.max_step_tokens or is_one_input(plan)
        result = self.engine.step(plan)
        self.scheduler.commit(plan, outputs_of(self.scheduler, result))
        self.scheduler.check()
        return plan

    def run(self, limit=10_000):
        plans = []
        while plan := self.step():
            plans.append(plan)
            assert len(plans) < limit, "no end in sight"
        assert self.scheduler.num_used_blocks == 0 and not self.scheduler.has_work
        return plans
