"""The order in which the scheduler admits, prefills, decodes and drops sequences."""

import pytest

from tests.scheduling import SimulatedWorker, a_request, a_sequence, outputs_of, reference
from worker.engine.sequence import Sequence, SequenceState


def test_a_prompt_is_prefilled_in_chunks_and_then_decoded():
    worker = SimulatedWorker(max_step_tokens=4)
    sequence = a_sequence(range(10), max_new_tokens=3)
    worker.add(sequence)
    chunks = [chunk for plan in worker.run() for chunk in plan.chunks]
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
    worker = SimulatedWorker(max_step_tokens=8)
    worker.add(a_sequence(range(6), 9), a_sequence(range(20, 40), 9))
    first = worker.step()
    assert [len(chunk.tokens) for chunk in first.chunks] == [6, 2]
    second = worker.step()
    assert [len(chunk.tokens) for chunk in second.chunks] == [1, 7]
    assert second.chunks[0].slot == first.started[0].slot and not second.started
    worker.run()


def test_short_prompts_do_not_wait_for_a_long_one():
    worker = SimulatedWorker(num_blocks=2048, num_slots=8, max_step_tokens=64)
    long = a_sequence([n % 50 for n in range(4000)], name="long")
    worker.add(long)
    worker.step()
    short = [a_sequence([n] * 20, name=str(n)) for n in range(3)]
    worker.add(*short)
    num_steps = 0
    while not all(one.output_tokens for one in short):
        plan = worker.step()
        num_steps += 1
        assert sum(len(chunk.tokens) for chunk in plan.chunks) <= 64
    assert num_steps <= 10, "alone they need one, behind the long one 62"
    assert long.num_computed >= 48 * num_steps, "it keeps three quarters"
    worker.run()
    assert long.output_tokens == reference(long.request)


def test_a_long_prompt_takes_all_of_a_step_while_nobody_can_follow():
    worker = SimulatedWorker(num_blocks=2048, num_slots=1, max_step_tokens=64)
    worker.add(a_sequence([1] * 640, name="long"), a_sequence([2], name="waits for the slot"))
    assert [sum(len(chunk.tokens) for chunk in worker.step().chunks) for _ in range(3)] == [64] * 3
    worker.run()


def test_admission_is_in_order_of_arrival_with_resumed_ones_in_front():
    worker = SimulatedWorker(num_slots=1)
    sequences = [a_sequence([1], name=name) for name in "abc"]
    worker.add(*sequences[:2])
    worker.add(sequences[2], at_front=True)
    order = []
    while worker.step():
        order += [one.request.id for one in worker.scheduler.sequences if one.slot is not None]
    assert list(dict.fromkeys(order)) == ["c", "a", "b"]


def test_a_budget_below_the_slots_never_starves_a_decode():
    worker = SimulatedWorker(num_slots=8, max_step_tokens=2)
    sequences = [a_sequence([n, n + 1, n + 2], name=str(n)) for n in range(5)]
    worker.add(*sequences)
    worker.run()
    assert all(one.output_tokens == reference(one.request) for one in sequences)


def test_a_released_slot_is_named_before_it_starts_again():
    worker = SimulatedWorker(num_slots=1)
    first, second = a_sequence([1, 2]), a_sequence([3, 4])
    worker.add(first, second)
    worker.step()
    worker.scheduler.drop(first)
    plan = worker.step()
    assert plan.released == (0,) and plan.started[0].slot == 0
    worker.run()
    assert second.output_tokens == reference(second.request)


def test_a_release_alone_is_no_plan():
    worker = SimulatedWorker()
    sequence = a_sequence([1, 2])
    worker.add(sequence)
    worker.step()
    worker.scheduler.drop(sequence)
    worker.scheduler.drop(sequence)
    assert worker.scheduler.plan() is None
    worker.add(a_sequence([5]))
    assert worker.step().released == (0,)


@pytest.mark.parametrize("is_computed", [False, True])
def test_a_drop_while_its_step_runs_is_left_out(is_computed):
    worker = SimulatedWorker()
    gone, stays = a_sequence([1, 2]), a_sequence([3, 4])
    worker.add(gone, stays)
    plan = worker.scheduler.plan()
    result = worker.engine.step(plan)
    outputs = outputs_of(worker.scheduler, result) if is_computed else None
    worker.scheduler.drop(gone)
    assert worker.scheduler.sequence_at(plan.chunks[0].slot) is None
    if outputs is None:
        outputs = outputs_of(worker.scheduler, result)
    worker.scheduler.commit(plan, outputs)
    worker.scheduler.check()
    assert gone.output_tokens == [] and len(stays.output_tokens) == 1
    worker.run()
    assert stays.output_tokens == reference(stays.request)


def test_a_waiting_sequence_can_be_dropped():
    worker = SimulatedWorker()
    sequence = a_sequence([1])
    worker.add(sequence)
    worker.scheduler.drop(sequence)
    assert not worker.scheduler.has_work and sequence.state is SequenceState.FINISHED


def test_a_sequence_goes_on_where_another_worker_stopped():
    worker = SimulatedWorker(block_size=4, max_step_tokens=3)
    request = a_request(range(6), max_new_tokens=8, prompt_logprobs=True)
    answer = reference(request)
    sequence = Sequence(request, output_tokens=tuple(answer[:5]), chain=b"12345678")
    worker.add(sequence)
    plan = worker.step()
    assert plan.started[0].output_tokens == tuple(answer[:5])
    assert not plan.started[0].prompt_logprobs, "they went out with the first frame"
    worker.run()
    assert sequence.output_tokens == answer
