"""Scheduling of encoder-decoder models: inputs are read whole, and blocks are never shared."""

import pytest

from common.errors import ValidationError
from common.messages import Frame, Token
from tests.scheduling import START, SimulatedWorker, a_request, a_translation, reference
from worker.engine.sequence import Sequence, SequenceState


def test_an_encoder_reads_its_input_whole_and_the_decoder_begins_with_its_start_token():
    worker = SimulatedWorker(block_size=4, max_step_tokens=16)
    sequence = a_translation(range(10), max_new_tokens=3)
    worker.add(sequence)
    plan = worker.step()
    (start,) = plan.started
    assert (start.prompt_tokens, start.encoder_tokens) == ((START,), tuple(range(10)))
    assert len(start.encoder_blocks) == 3
    assert plan.num_tokens == 11
    chunks = [*plan.chunks, *(chunk for plan in worker.run() for chunk in plan.chunks)]
    assert [(chunk.start, len(chunk.tokens), chunk.is_sampled) for chunk in chunks] == [
        (0, 1, True),
        (1, 1, True),
        (2, 1, True),
    ]
    assert sequence.output_tokens == reference(sequence.request, has_encoder=True)


def test_encoder_inputs_share_a_budget():
    worker = SimulatedWorker(max_step_tokens=16)
    worker.add(*(a_translation([n] * 6, name=str(n)) for n in range(3)))
    plans = worker.run()
    assert [len(plan.started) for plan in plans[:2]] == [2, 1]
    assert plans[0].num_tokens == 14


def test_an_input_beyond_the_budget_runs_as_the_only_prompt_of_its_step():
    worker = SimulatedWorker(num_blocks=64, max_step_tokens=8)
    short, long = a_translation([1, 2], 9, "short"), a_translation(range(30), 3, "long")
    worker.add(short, long, a_translation([3], name="next"))
    first, second, third = (worker.step() for _ in range(3))
    assert [len(plan.started) for plan in (first, second, third)] == [1, 1, 1]
    assert second.num_tokens == 32, "a decode goes with the 30, and the long one's start token"
    worker.run()
    assert long.output_tokens == reference(long.request, has_encoder=True)


def test_an_encoder_s_input_does_not_wait_for_a_decode_to_end():
    worker = SimulatedWorker(num_slots=4, max_step_tokens=8)
    worker.add(*(a_translation([n], 20, str(n)) for n in range(3)))
    worker.step()
    worker.add(a_translation([9] * 8, name="as long as the budget"))
    assert [len(start.encoder_tokens) for start in worker.step().started] == [8]


def test_a_preempted_sequence_is_encoded_again():
    worker = SimulatedWorker(num_blocks=8, block_size=2)
    old, new = a_translation([1, 2, 3], 8, "old"), a_translation([4, 5, 6], 8, "new")
    worker.add(old, new)
    while worker.scheduler.num_preemptions == 0:
        worker.step()
    done = tuple(new.output_tokens)
    assert new.state is SequenceState.WAITING and not new.encoder_blocks
    (again,) = (start for plan in worker.run() for start in plan.started)
    assert (again.output_tokens, again.encoder_tokens) == (done, (4, 5, 6))
    for sequence in (old, new):
        assert sequence.output_tokens == reference(sequence.request, has_encoder=True)


def test_a_translation_goes_on_where_another_worker_stopped():
    worker = SimulatedWorker(max_step_tokens=3)
    request = a_request(range(6), max_new_tokens=8)
    answer = reference(request, has_encoder=True)
    token_frames = [Frame(tokens=(Token(token, "", -1.0),), chain=b"chain") for token in answer[:5]]
    sequence = Sequence.from_journal(request, token_frames, decoder_start_token=START)
    worker.add(sequence)
    plan = worker.step()
    assert plan.chunks[0].tokens == (START,), "what the input has left of the budget, at least one"
    worker.run()
    assert sequence.output_tokens == answer


def test_a_decoder_s_blocks_are_never_shared():
    """The same tokens after another input are other keys and values."""
    worker = SimulatedWorker(block_size=1)
    for prompt in ([1, 2], [3, 4], [1, 2]):
        request = a_request(prompt, max_new_tokens=6)
        begun = dict(output_tokens=(7, 8, 9), chain=b"12345678")
        worker.add(Sequence(request, decoder_start_token=START, **begun))
        worker.run()
    assert worker.scheduler.num_prefix_hit_tokens == 0


def test_an_input_that_can_never_fit_is_refused():
    worker = SimulatedWorker(num_blocks=3, block_size=4)
    message = r"each in whole blocks of 4 must be <= .*: 12. Given: 5 `inputs` tokens and 5 "
    with pytest.raises(ValidationError, match=message):
        worker.add(a_translation(range(5), max_new_tokens=5))
    fits = a_translation(range(5), max_new_tokens=4)
    worker.add(fits)
    worker.run()
    assert fits.output_tokens == reference(fits.request, has_encoder=True)


def test_room_counts_the_memory_of_encoder_inputs():
    worker = SimulatedWorker(num_blocks=16, block_size=4, num_slots=4, max_step_tokens=64)
    worker.add(a_translation(range(28)))
    assert worker.scheduler.room == 1, "16 blocks, 8 are wanted, another one like it fits"
    worker.add(a_translation(range(28)))
    assert worker.scheduler.room == 0
