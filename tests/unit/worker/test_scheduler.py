"""Continuous batching against a simulated engine that knows only block tables and blocks.

Its next token is a function of all tokens that it finds through a slot's tables, so that a wrong
block, a stale shared block or a wrong start shows as a wrong token.
"""

import random
import time
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ValidationError
from common.messages import (
    Failure,
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
from worker.engine.sequence import Sequence, SequenceState

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
        outputs.append(FakeOutput(sequence, Frame(tokens, b"chain", finish=finish)))
    return outputs


def is_one_input(plan):
    """Whether an encoder's input is the only thing in a plan besides decoding sequences."""
    slots = [start.slot for start in plan.started if start.encoder_tokens]
    others = [chunk for chunk in plan.chunks if chunk.slot not in slots]
    return len(slots) == len(plan.started) == 1 and all(
        len(chunk.tokens) == 1 and chunk.is_sampled for chunk in others
    )


class Fleet:
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


def test_a_prompt_is_prefilled_in_chunks_and_then_decoded():
    fleet = Fleet(max_step_tokens=4)
    sequence = a_sequence(range(10), max_new_tokens=3)
    fleet.add(sequence)
    chunks = [chunk for plan in fleet.run() for chunk in plan.chunks]
    assert [(chunk.start, len(chunk.tokens), chunk.is_sampled) for chunk in chunks] == [
        (0, 4, False),
        (4, 4, False),
        (8, 2, True),
        (10, 1, True),
        (11, 1, True),
    ]
    assert sequence.output_tokens == reference(sequence.request)
    assert sequence.state is SequenceState.FINISHED


def test_decoding_sequences_come_first_and_prompts_share_what_is_left():
    fleet = Fleet(max_step_tokens=8)
    fleet.add(a_sequence(range(6), 9), a_sequence(range(20, 40), 9))
    first = fleet.step()
    assert [len(chunk.tokens) for chunk in first.chunks] == [6, 2]
    second = fleet.step()
    assert [len(chunk.tokens) for chunk in second.chunks] == [1, 7]
    assert second.chunks[0].slot == first.started[0].slot and not second.started
    fleet.run()


def test_admission_is_in_order_of_arrival_with_resumed_ones_in_front():
    fleet = Fleet(num_slots=1)
    sequences = [a_sequence([1], name=name) for name in "abc"]
    fleet.add(*sequences[:2])
    fleet.add(sequences[2], at_front=True)
    order = []
    while fleet.step():
        order += [one.request.id for one in fleet.scheduler.sequences if one.slot is not None]
    assert list(dict.fromkeys(order)) == ["c", "a", "b"]


def test_a_budget_below_the_slots_never_starves_a_decode():
    fleet = Fleet(num_slots=8, max_step_tokens=2)
    sequences = [a_sequence([n, n + 1, n + 2], name=str(n)) for n in range(5)]
    fleet.add(*sequences)
    fleet.run()
    assert all(one.output_tokens == reference(one.request) for one in sequences)


def test_a_released_slot_is_named_before_it_starts_again():
    fleet = Fleet(num_slots=1)
    first, second = a_sequence([1, 2]), a_sequence([3, 4])
    fleet.add(first, second)
    fleet.step()
    fleet.scheduler.drop(first)
    plan = fleet.step()
    assert plan.released == (0,) and plan.started[0].slot == 0
    fleet.run()
    assert second.output_tokens == reference(second.request)


def test_a_release_alone_is_no_plan():
    fleet = Fleet()
    sequence = a_sequence([1, 2])
    fleet.add(sequence)
    fleet.step()
    fleet.scheduler.drop(sequence)
    fleet.scheduler.drop(sequence)
    assert fleet.scheduler.plan() is None
    fleet.add(a_sequence([5]))
    assert fleet.step().released == (0,)


@pytest.mark.parametrize("is_computed", [False, True])
def test_a_drop_while_its_step_runs_is_left_out(is_computed):
    fleet = Fleet()
    gone, stays = a_sequence([1, 2]), a_sequence([3, 4])
    fleet.add(gone, stays)
    plan = fleet.scheduler.plan()
    result = fleet.engine.step(plan)
    outputs = outputs_of(fleet.scheduler, result) if is_computed else None
    fleet.scheduler.drop(gone)
    assert fleet.scheduler.sequence_at(plan.chunks[0].slot) is None
    if outputs is None:
        outputs = outputs_of(fleet.scheduler, result)
    fleet.scheduler.commit(plan, outputs)
    fleet.scheduler.check()
    assert gone.output_tokens == [] and len(stays.output_tokens) == 1
    fleet.run()
    assert stays.output_tokens == reference(stays.request)


def test_a_waiting_sequence_can_be_dropped():
    fleet = Fleet()
    sequence = a_sequence([1])
    fleet.add(sequence)
    fleet.scheduler.drop(sequence)
    assert not fleet.scheduler.has_work and sequence.state is SequenceState.FINISHED


def test_prompts_and_answers_are_reused():
    fleet = Fleet(block_size=4)
    first = a_sequence(range(8), max_new_tokens=9)
    fleet.add(first)
    fleet.run()
    # A second turn: prompt, answer, new question. 16 of the 17 old tokens are in full blocks.
    second = a_sequence([*range(8), *first.output_tokens, 7, 7])
    fleet.add(second)
    chunk = fleet.step().chunks[0]
    assert chunk.start == 16 and second.num_cached_tokens == 16
    assert len(chunk.new_blocks) == 5, "the blocks that hold the hit come with the first chunk"
    fleet.run()
    assert second.output_tokens == reference(second.request)
    assert fleet.scheduler.num_prefix_hit_tokens == 16
    assert fleet.scheduler.num_prefix_query_tokens == 8 + 19


def test_one_token_is_computed_on_a_full_hit():
    fleet = Fleet(block_size=4)
    fleet.add(a_sequence(range(8)))
    fleet.run()
    again = a_sequence(range(8))
    fleet.add(again)
    chunk = fleet.step().chunks[0]
    assert chunk.start == 4 and chunk.is_sampled
    fleet.run()
    assert again.output_tokens == reference(again.request)


@pytest.mark.parametrize("options", [{"prefix_caching": False}, {}])
def test_prefix_hits_are_bypassed(options):
    fleet = Fleet(block_size=2, **options)
    fleet.add(a_sequence(range(8)))
    fleet.run()
    sequence = a_sequence(range(8), prompt_logprobs=options != {"prefix_caching": False})
    fleet.add(sequence)
    plan = fleet.step()
    assert plan.chunks[0].start == 0 and sequence.num_cached_tokens == 0
    assert plan.started[0].prompt_logprobs is sequence.request.prompt_logprobs


def test_a_sequence_goes_on_where_another_worker_stopped():
    fleet = Fleet(block_size=4, max_step_tokens=3)
    request = a_request(range(6), max_new_tokens=8, prompt_logprobs=True)
    answer = reference(request)
    sequence = Sequence(request, output_tokens=tuple(answer[:5]), chain=b"12345678")
    fleet.add(sequence)
    plan = fleet.step()
    assert plan.started[0].output_tokens == tuple(answer[:5])
    assert not plan.started[0].prompt_logprobs, "they went out with the first frame"
    fleet.run()
    assert sequence.output_tokens == answer


def test_the_newest_sequence_yields_its_memory_and_is_computed_again():
    fleet = Fleet(num_blocks=6, block_size=2, prefix_caching=False)
    old, new = a_sequence([1, 2, 3], 8, "old"), a_sequence([4, 5, 6], 8, "new")
    fleet.add(old, new)
    plans = []
    while fleet.scheduler.num_preemptions == 0:
        plans.append(fleet.step())
    assert new.state is SequenceState.WAITING and old.state is SequenceState.DECODING
    assert plans[-1].released == (1,) and not plans[-1].started
    done = len(new.output_tokens)
    later = [start for plan in fleet.run() for start in plan.started]
    assert [len(start.output_tokens) for start in later] == [done]
    for sequence in (old, new):
        assert sequence.output_tokens == reference(sequence.request)


def test_preempted_sequences_wait_in_front_in_their_old_order():
    fleet = Fleet(num_blocks=9, block_size=1, prefix_caching=False)
    running = [a_sequence([n, n], 8, str(n)) for n in range(3)]
    fleet.add(*running, a_sequence([9] * 4, name="late"))
    order = []
    while fleet.scheduler.num_preemptions < 2:
        fleet.step()
    order = [one.request.id for one in fleet.scheduler.sequences]
    assert order == ["0", "1", "2", "late"]
    fleet.run()


def test_a_fresh_admission_leaves_room_to_grow():
    fleet = Fleet(num_blocks=4, block_size=4)
    fleet.add(a_sequence(range(4), 9), a_sequence(range(20, 28), 2))
    plan = fleet.step()
    assert len(plan.started) == 1, "its 3 blocks fit, but not the block that the first needs next"
    fleet.run()
    assert fleet.scheduler.num_preemptions == 0


def test_what_can_never_fit_is_refused_and_what_just_fits_runs():
    fleet = Fleet(num_blocks=3, block_size=4)
    with pytest.raises(ValidationError, match=r"must be <= .*: 13. Given: 8 .* 6 "):
        fleet.add(a_sequence(range(8), max_new_tokens=6))
    fits = a_sequence(range(8), max_new_tokens=5)
    fleet.add(fits)
    fleet.run()
    assert fits.output_tokens == reference(fits.request)


def test_a_failed_sequence_leaves_nothing_in_the_prefix_cache():
    fleet = Fleet(block_size=2)
    broken = a_sequence(range(8))
    fleet.add(broken)
    plan = fleet.scheduler.plan()
    fleet.engine.step(plan)
    frame = Frame(chain=b"chain", failure=Failure("generation", "not a number"))
    fleet.scheduler.commit(plan, [FakeOutput(broken, frame)])
    fleet.scheduler.check()
    assert broken.state is SequenceState.FINISHED and broken.output_tokens == []
    again = a_sequence(range(8))
    fleet.add(again)
    assert fleet.step().chunks[0].start == 0


def test_room_counts_slots_and_memory():
    fleet = Fleet(num_blocks=16, block_size=4, num_slots=4, max_step_tokens=64)
    assert fleet.scheduler.room == 4
    sequences = [a_sequence(range(n, n + 20), 20, str(n)) for n in (0, 100)]
    fleet.add(sequences[0])
    assert fleet.scheduler.room == 1, "16 blocks, 6 are wanted, another one like it fits"
    fleet.add(sequences[1])
    assert fleet.scheduler.room == 0
    fleet.run()
    assert fleet.scheduler.room == 4
    fleet.add(*(a_sequence([n], 1, str(n)) for n in range(4)))
    assert fleet.scheduler.room == 0


def test_an_encoder_reads_its_input_whole_and_the_decoder_begins_with_its_start_token():
    fleet = Fleet(block_size=4, max_step_tokens=16)
    sequence = a_translation(range(10), max_new_tokens=3)
    fleet.add(sequence)
    plan = fleet.step()
    (start,) = plan.started
    assert (start.prompt_tokens, start.encoder_tokens) == ((START,), tuple(range(10)))
    assert len(start.encoder_blocks) == 3
    assert plan.num_tokens == 11
    chunks = [*plan.chunks, *(chunk for plan in fleet.run() for chunk in plan.chunks)]
    assert [(chunk.start, len(chunk.tokens), chunk.is_sampled) for chunk in chunks] == [
        (0, 1, True),
        (1, 1, True),
        (2, 1, True),
    ]
    assert sequence.output_tokens == reference(sequence.request, has_encoder=True)


def test_encoder_inputs_share_a_budget():
    fleet = Fleet(max_step_tokens=16)
    fleet.add(*(a_translation([n] * 6, name=str(n)) for n in range(3)))
    plans = fleet.run()
    assert [len(plan.started) for plan in plans[:2]] == [2, 1]
    assert plans[0].num_tokens == 14


def test_an_input_beyond_the_budget_runs_as_the_only_prompt_of_its_step():
    fleet = Fleet(num_blocks=64, max_step_tokens=8)
    short, long = a_translation([1, 2], 9, "short"), a_translation(range(30), 3, "long")
    fleet.add(short, long, a_translation([3], name="next"))
    first, second, third = (fleet.step() for _ in range(3))
    assert [len(plan.started) for plan in (first, second, third)] == [1, 1, 1]
    assert second.num_tokens == 32, "a decode goes with the 30, and the long one's start token"
    fleet.run()
    assert long.output_tokens == reference(long.request, has_encoder=True)


def test_an_encoder_s_input_does_not_wait_for_a_decode_to_end():
    fleet = Fleet(num_slots=4, max_step_tokens=8)
    fleet.add(*(a_translation([n], 20, str(n)) for n in range(3)))
    fleet.step()
    fleet.add(a_translation([9] * 8, name="as long as the budget"))
    assert [len(start.encoder_tokens) for start in fleet.step().started] == [8]


def test_a_preempted_sequence_is_encoded_again():
    fleet = Fleet(num_blocks=8, block_size=2)
    old, new = a_translation([1, 2, 3], 8, "old"), a_translation([4, 5, 6], 8, "new")
    fleet.add(old, new)
    while fleet.scheduler.num_preemptions == 0:
        fleet.step()
    done = tuple(new.output_tokens)
    assert new.state is SequenceState.WAITING and not new.encoder_blocks
    (again,) = (start for plan in fleet.run() for start in plan.started)
    assert (again.output_tokens, again.encoder_tokens) == (done, (4, 5, 6))
    for sequence in (old, new):
        assert sequence.output_tokens == reference(sequence.request, has_encoder=True)


def test_a_translation_goes_on_where_another_worker_stopped():
    fleet = Fleet(max_step_tokens=3)
    request = a_request(range(6), max_new_tokens=8)
    answer = reference(request, has_encoder=True)
    token_frames = [Frame((Token(token, "", -1.0),), b"chain") for token in answer[:5]]
    sequence = Sequence.from_journal(request, token_frames, decoder_start_token=START)
    fleet.add(sequence)
    plan = fleet.step()
    assert plan.chunks[0].tokens == (START,), "what the input has left of the budget, at least one"
    fleet.run()
    assert sequence.output_tokens == answer


def test_a_decoder_s_blocks_are_never_shared():
    """The same tokens after another input are other keys and values."""
    fleet = Fleet(block_size=1)
    for prompt in ([1, 2], [3, 4], [1, 2]):
        request = a_request(prompt, max_new_tokens=6)
        begun = dict(output_tokens=(7, 8, 9), chain=b"12345678")
        fleet.add(Sequence(request, decoder_start_token=START, **begun))
        fleet.run()
    assert fleet.scheduler.num_prefix_hit_tokens == 0


def test_an_input_that_can_never_fit_is_refused():
    fleet = Fleet(num_blocks=3, block_size=4)
    message = r"each in whole blocks of 4 must be <= .*: 12. Given: 5 `inputs` tokens and 5 "
    with pytest.raises(ValidationError, match=message):
        fleet.add(a_translation(range(5), max_new_tokens=5))
    fits = a_translation(range(5), max_new_tokens=4)
    fleet.add(fits)
    fleet.run()
    assert fits.output_tokens == reference(fits.request, has_encoder=True)


def test_room_counts_the_memory_of_encoder_inputs():
    fleet = Fleet(num_blocks=16, block_size=4, num_slots=4, max_step_tokens=64)
    fleet.add(a_translation(range(28)))
    assert fleet.scheduler.room == 1, "16 blocks, 8 are wanted, another one like it fits"
    fleet.add(a_translation(range(28)))
    assert fleet.scheduler.room == 0


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    block_size=st.integers(1, 5),
    num_slots=st.integers(1, 5),
    max_step_tokens=st.integers(1, 12),
    spare_blocks=st.integers(0, 8),
    prefix_caching=st.booleans(),
    share_of_translations=st.sampled_from([0, 0, 0.5, 1, 1]),
)
def test_every_workload_ends_with_the_reference_tokens(
    seed,
    block_size,
    num_slots,
    max_step_tokens,
    spare_blocks,
    prefix_caching,
    share_of_translations,
):
    rng = random.Random(seed)
    requests = [a_random_request(rng, name=str(n)) for n in range(rng.randint(1, 10))]
    # A fleet serves one model, but to the scheduler it is all the same.
    translated = {one.id for one in requests if rng.random() < share_of_translations}
    needs = [blocks_of(one, block_size, has_encoder=one.id in translated) for one in requests]
    num_blocks = max(needs) + spare_blocks
    fleet = Fleet(num_blocks, block_size, num_slots, max_step_tokens, prefix_caching=prefix_caching)
    sequences = [a_random_start(rng, one, has_encoder=one.id in translated) for one in requests]
    arrivals, dropped = list(sequences), []
    for _ in range(5_000):
        for _ in range(min(len(arrivals), rng.randint(0, 3))):
            fleet.add(arrivals.pop(), at_front=rng.random() < 0.2)
        live = list(fleet.scheduler.sequences)
        if live and rng.random() < 0.03:
            dropped.append(rng.choice(live))
            fleet.scheduler.drop(dropped[-1])
        if not fleet.step() and not arrivals:
            break
    assert not fleet.scheduler.has_work, "livelock"
    for sequence in sequences:
        assert sequence.state is SequenceState.FINISHED
        answer = reference(sequence.request, has_encoder=sequence.request.id in translated)
        assert sequence.output_tokens == answer or sequence in dropped
    assert fleet.scheduler.num_used_blocks == 0


def a_random_request(rng, name):
    common = [1, 2, 3, 1, 2, 3, 4, 5][: rng.randint(0, 8)]
    own = [rng.randint(0, 2) for _ in range(rng.randint(1, 8))]
    return a_request(common + own, rng.randint(1, 12), name, prompt_logprobs=rng.random() < 0.1)


def a_random_start(rng, request, *, has_encoder):
    """Fresh, or begun by another worker."""
    start_token = START if has_encoder else None
    if rng.random() < 0.7 or request.stopping.max_new_tokens == 1:
        return Sequence(request, decoder_start_token=start_token)
    answer = reference(request, has_encoder=has_encoder)
    begun = tuple(answer[: rng.randint(1, request.stopping.max_new_tokens - 1)])
    return Sequence(
        request, decoder_start_token=start_token, output_tokens=begun, chain=b"12345678"
    )


def blocks_of(request, block_size, *, has_encoder):
    """What a request needs at most, by hand."""
    num_prompt, num_new = len(request.prompt_tokens), request.stopping.max_new_tokens
    if has_encoder:  # the start token and all but the last of the new ones
        return -(-num_prompt // block_size) + -(-num_new // block_size)
    return -(-(num_prompt + num_new - 1) // block_size)


def test_a_plan_costs_little():
    """Ten times the target of 0.5 ms, for busy machines; growth with the text shows."""
    layout = KvCacheLayout(num_blocks=64 * 128, block_size=32, num_slots=64)
    scheduler = Scheduler(layout, max_step_tokens=64 * 2001)
    for n in range(64):
        scheduler.add(a_sequence([n] * 2000, 1000, str(n)))
    costs = []
    for _ in range(40):
        began = time.perf_counter()
        plan = scheduler.plan()
        costs.append(time.perf_counter() - began)
        result = StepResult(plan.step, tuple(Sampled(c.slot, 7, -1.0) for c in plan.chunks))
        scheduler.commit(plan, outputs_of(scheduler, result))
    assert len(plan.chunks) == 64
    assert sorted(costs[1:])[20] < 0.005
