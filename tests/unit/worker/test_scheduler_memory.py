"""What the scheduler does with blocks: prefixes found again, preemption, and what does not fit."""

import pytest

from common.errors import ValidationError
from common.messages import Failure, Frame
from tests.scheduling import FakeOutput, SimulatedWorker, a_sequence, reference
from worker.engine.plan import KvCacheLayout
from worker.engine.request_limits import RequestLimits
from worker.engine.scheduler import Scheduler
from worker.engine.sequence import SequenceState


def test_prompts_and_answers_are_reused():
    worker = SimulatedWorker(block_size=4)
    first = a_sequence(range(8), max_new_tokens=9)
    worker.add(first)
    worker.run()
    # A second turn: prompt, answer, new question. 16 of the 17 old tokens are in full blocks.
    second = a_sequence([*range(8), *first.output_tokens, 7, 7])
    worker.add(second)
    chunk = worker.step().chunks[0]
    assert chunk.start == 16 and second.num_cached_tokens == 16
    assert len(chunk.new_blocks) == 5, "the blocks that hold the hit come with the first chunk"
    worker.run()
    assert second.output_tokens == reference(second.request)
    assert worker.scheduler.num_prefix_hit_tokens == 16
    assert worker.scheduler.num_prefix_query_tokens == 8 + 19


def test_one_token_is_computed_on_a_full_hit():
    worker = SimulatedWorker(block_size=4)
    worker.add(a_sequence(range(8)))
    worker.run()
    again = a_sequence(range(8))
    worker.add(again)
    chunk = worker.step().chunks[0]
    assert chunk.start == 4 and chunk.is_sampled
    worker.run()
    assert again.output_tokens == reference(again.request)


@pytest.mark.parametrize("options", [{"prefix_caching": False}, {}])
def test_prefix_hits_are_bypassed(options):
    worker = SimulatedWorker(block_size=2, **options)
    worker.add(a_sequence(range(8)))
    worker.run()
    sequence = a_sequence(range(8), prompt_logprobs=options != {"prefix_caching": False})
    worker.add(sequence)
    plan = worker.step()
    assert plan.chunks[0].start == 0 and sequence.num_cached_tokens == 0
    assert plan.started[0].prompt_logprobs is sequence.request.prompt_logprobs


def test_a_failed_sequence_leaves_nothing_in_the_prefix_cache():
    worker = SimulatedWorker(block_size=2)
    broken = a_sequence(range(8))
    worker.add(broken)
    plan = worker.scheduler.plan()
    worker.engine.step(plan)
    frame = Frame(chain=b"chain", failure=Failure("generation", "not a number"))
    worker.scheduler.commit(plan, [FakeOutput(broken, frame)])
    worker.scheduler.check()
    assert broken.state is SequenceState.FINISHED and broken.output_tokens == []
    again = a_sequence(range(8))
    worker.add(again)
    assert worker.step().chunks[0].start == 0


def test_the_newest_sequence_yields_its_memory_and_is_computed_again():
    worker = SimulatedWorker(num_blocks=6, block_size=2, prefix_caching=False)
    old, new = a_sequence([1, 2, 3], 8, "old"), a_sequence([4, 5, 6], 8, "new")
    worker.add(old, new)
    plans = []
    while worker.scheduler.num_preemptions == 0:
        plans.append(worker.step())
    assert new.state is SequenceState.WAITING and old.state is SequenceState.DECODING
    assert plans[-1].released == (1,) and not plans[-1].started
    done = len(new.output_tokens)
    later = [start for plan in worker.run() for start in plan.started]
    assert [len(start.output_tokens) for start in later] == [done]
    for sequence in (old, new):
        assert sequence.output_tokens == reference(sequence.request)


def test_preempted_sequences_wait_in_front_in_their_old_order():
    worker = SimulatedWorker(num_blocks=9, block_size=1, prefix_caching=False)
    running = [a_sequence([n, n], 8, str(n)) for n in range(3)]
    worker.add(*running, a_sequence([9] * 4, name="late"))
    order = []
    while worker.scheduler.num_preemptions < 2:
        worker.step()
    order = [one.request.id for one in worker.scheduler.sequences]
    assert order == ["0", "1", "2", "late"]
    worker.run()


def test_a_fresh_admission_leaves_room_to_grow():
    worker = SimulatedWorker(num_blocks=4, block_size=4)
    worker.add(a_sequence(range(4), 9), a_sequence(range(20, 28), 2))
    plan = worker.step()
    assert len(plan.started) == 1, "its 3 blocks fit, but not the block that the first needs next"
    worker.run()
    assert worker.scheduler.num_preemptions == 0


def test_what_can_never_fit_is_refused_and_what_just_fits_runs():
    worker = SimulatedWorker(num_blocks=3, block_size=4)
    with pytest.raises(ValidationError, match=r"must be <= .*: 13. Given: 8 .* 6 "):
        worker.add(a_sequence(range(8), max_new_tokens=6))
    fits = a_sequence(range(8), max_new_tokens=5)
    worker.add(fits)
    worker.run()
    assert fits.output_tokens == reference(fits.request)


@pytest.mark.parametrize(
    ("prompt", "max_new_tokens", "message"),
    [
        (range(6), 5, r"must be <= 10 on this worker. Given: 6 `inputs` tokens and 5 "),
        ((1, 50, 2), 5, r"token ids below 50.* Given: 50"),
    ],
)
def test_what_the_engine_was_not_built_for_is_refused(prompt, max_new_tokens, message):
    limits = RequestLimits(max_total_tokens=10, vocab_size=50)
    scheduler = Scheduler(KvCacheLayout(64, 4, 4), max_step_tokens=8, limits=limits)
    with pytest.raises(ValidationError, match=message):
        scheduler.add(a_sequence(prompt, max_new_tokens))
    scheduler.add(a_sequence((1, 49, 2, 3, 4), 5))
    assert scheduler.num_waiting == 1


def test_room_counts_slots_and_memory():
    worker = SimulatedWorker(num_blocks=16, block_size=4, num_slots=4, max_step_tokens=64)
    assert worker.scheduler.room == 4
    sequences = [a_sequence(range(n, n + 20), 20, str(n)) for n in (0, 100)]
    worker.add(sequences[0])
    assert worker.scheduler.room == 1, "16 blocks, 6 are wanted, another one like it fits"
    worker.add(sequences[1])
    assert worker.scheduler.room == 0
    worker.run()
    assert worker.scheduler.room == 4
    worker.add(*(a_sequence([n], 1, str(n)) for n in range(4)))
    assert worker.scheduler.room == 0
