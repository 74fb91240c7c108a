"""From sampled ids to frames."""

import math

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from common.errors import GenerationFailed
from common.messages import (
    Failure,
    FinishReason,
    GenerationRequest,
    Sampling,
    Stopping,
    first_chain,
    next_chain,
)
from worker.engine.plan import (
    NO_TOKEN,
    KvCacheLayout,
    PromptLogprobs,
    Sampled,
    StepPlan,
    StepResult,
)
from worker.engine.scheduler import Scheduler
from worker.engine.sequence import Sequence, SequenceState
from worker.service.output import OutputProcessor


def a_tokenizer():
    """One token a byte, and an end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: index for index, piece in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>", "<mark>"])
    return tokenizer


TOKENIZER = a_tokenizer()
EOS, MARK = TOKENIZER.token_to_id("</s>"), TOKENIZER.token_to_id("<mark>")


def ids(text):
    return TOKENIZER.encode(text).ids


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Rig:
    """One sequence through scheduler and processor; the samples are given."""

    def __init__(self, prompt="ab", max_step_tokens=16, begun=None, **fields):
        stopping = {"max_new_tokens": 20} | fields.pop("stopping", {})
        self.request = GenerationRequest(
            "id", "model", tuple(ids(prompt)), Sampling(), Stopping(**stopping), **fields
        )
        self.clock = Clock()
        self.processor = OutputProcessor(
            TOKENIZER,
            eos_tokens=frozenset({EOS}),
            special_tokens=frozenset({EOS, MARK}),
            clock=self.clock,
        )
        self.scheduler = Scheduler(
            KvCacheLayout(64, 4, 4), max_step_tokens=max_step_tokens, clock=self.clock
        )
        frames = begun.frames if begun else ()
        self.sequence = Sequence.from_journal(self.request, frames, leased_at=98.0, waited_s=3.0)
        self.processor.start(self.sequence)
        self.scheduler.add(self.sequence)
        self.frames = list(frames)

    def step(self, token=None, top=(), prompt_logprobs=False):
        plan = self.scheduler.plan()
        (chunk,) = plan.chunks
        sampled = (Sampled(chunk.slot, token, -0.5, top),) if chunk.is_sampled else ()
        positions = range(chunk.start, chunk.start + len(chunk.tokens))
        rows = (PromptLogprobs(chunk.slot, chunk.start, tuple(-float(at) for at in positions)),)
        result = StepResult(plan.step, sampled, rows if prompt_logprobs else ())
        outputs = self.processor.advance(plan, result, self.scheduler.sequence_at)
        self.scheduler.commit(plan, outputs)
        self.scheduler.check()
        self.frames += [output.frame for output in outputs]
        return outputs

    def generate(self, tokens):
        for token in tokens:
            if self.sequence.state is SequenceState.FINISHED:
                break
            self.step(token)
        return self

    @property
    def tokens(self):
        return [token for frame in self.frames for token in frame.tokens]

    @property
    def text(self):
        return "".join(token.text for token in self.tokens if not token.is_special)

    @property
    def reason(self):
        return self.frames[-1].finish and self.frames[-1].finish.reason


def test_a_frame_a_token_with_a_chain():
    rig = Rig().generate(ids("hé"))
    assert [token.text for token in rig.tokens] == ["h", "", "é"]
    assert [token.logprob for token in rig.tokens] == [-0.5] * 3
    chain = first_chain("id")
    for frame in rig.frames:
        chain = next_chain(chain, frame.tokens)
        assert frame.chain == chain
    (output,) = rig.step(ids("x")[0])
    assert (output.index, output.token_id, output.sequence) == (3, ids("x")[0], rig.sequence)
    assert rig.sequence.num_frames == 4 and rig.reason is None


def test_the_end_of_sequence_is_a_special_token_with_its_name():
    rig = Rig().generate([*ids("hi"), EOS])
    last = rig.tokens[-1]
    assert (last.text, last.is_special) == ("</s>", True)
    assert (rig.text, rig.reason) == ("hi", FinishReason.EOS_TOKEN)
    assert rig.sequence.state is SequenceState.FINISHED and rig.scheduler.num_used_blocks == 0
    assert rig.frames[-1].finish.generated_tokens == 3


def test_special_tokens_in_the_middle_do_not_tear_the_text():
    euro = ids("€")
    rig = Rig(stopping={"stop": ("xyz",)}).generate([*ids("x"), MARK, *euro[:2], MARK, euro[2]])
    assert [token.is_special for token in rig.tokens] == [False, True, False, False, True, False]
    assert rig.text == "x€"


@pytest.mark.parametrize(("include_stop", "expected"), [(True, "so END"), (False, "so ")])
def test_a_stop_string_ends_the_sequence(include_stop, expected):
    stopping = {"stop": ("END",), "include_stop": include_stop}
    rig = Rig(stopping=stopping).generate(ids("so END and more"))
    assert (rig.text, rig.reason) == (expected, FinishReason.STOP_SEQUENCE)
    assert rig.frames[-1].finish.generated_tokens == 6


@pytest.mark.parametrize(
    ("answer", "expected"), [("so EN", "so EN"), ("so €", "so €"), ("aEND", "a")]
)
def test_held_text_comes_out_at_the_length(answer, expected):
    tokens = ids(answer)
    stopping = {"stop": ("END",), "include_stop": False, "max_new_tokens": len(tokens)}
    assert Rig(stopping=stopping).generate(tokens).text == expected


def test_a_special_token_can_be_a_stop_string():
    rig = Rig(stopping={"stop": ("<mark>", "bcd"), "include_stop": False})
    rig.generate([*ids("abc"), MARK, *ids("no")])
    assert rig.reason is FinishReason.STOP_SEQUENCE
    assert rig.text == "abc", "what might have become the other stop string is told"
    assert len(rig.tokens) == 4 and rig.tokens[-1].id == MARK


def test_a_special_token_that_is_no_stop_string_ends_nothing():
    rig = Rig(stopping={"stop": ("<mar", "</s>")}).generate([*ids("a"), MARK, *ids("b")])
    assert rig.reason is None and rig.text == "ab"


def test_half_a_character_at_the_end_is_replaced():
    rig = Rig(stopping={"max_new_tokens": 3}).generate(ids("a€")[:3])
    assert (rig.text, rig.reason) == ("a\ufffd", FinishReason.LENGTH)


def test_held_text_at_a_special_end_makes_that_token_visible():
    rig = Rig(stopping={"stop": ("END",), "include_stop": False}).generate([*ids("so EN"), EOS])
    assert (rig.text, rig.reason) == ("so EN", FinishReason.EOS_TOKEN)
    assert not rig.tokens[-1].is_special


@given(
    st.lists(st.sampled_from([*ids("aEND€"), EOS, MARK]), min_size=1, max_size=12),
    st.booleans(),
    st.integers(0, 11),
)
def test_text_and_chain_do_not_depend_on_who_generates(tokens, include_stop, cut):
    """Another worker that goes on from the journal writes what the first would have written."""
    stopping = {"stop": ("END", "DE"), "include_stop": include_stop, "max_new_tokens": 12}
    alone = Rig(stopping=stopping).generate([*tokens, EOS])
    first = Rig(stopping=stopping).generate(tokens[:cut])
    if first.frames and first.frames[-1].is_terminal:
        assert first.frames == alone.frames
        return
    second = Rig(stopping=stopping, begun=first).generate([*tokens, EOS][len(first.frames) :])
    assert [frame.tokens for frame in second.frames] == [frame.tokens for frame in alone.frames]
    assert [frame.chain for frame in second.frames] == [frame.chain for frame in alone.frames]
    assert second.reason == alone.reason


def test_a_replay_that_reads_differently_is_refused():
    begun = Rig().generate(ids("hi"))
    sequence = Sequence.from_journal(begun.request, begun.frames)
    sequence.journaled_text = "ho"
    with pytest.raises(GenerationFailed, match="same tokenizer"):
        begun.processor.start(sequence)


def test_prompt_logprobs_come_with_the_first_frame():
    rig = Rig(prompt="a€bc", max_step_tokens=4, prompt_logprobs=True)
    assert rig.step(prompt_logprobs=True) == []
    rig.step(ids("x")[0], prompt_logprobs=True)
    rig.step(ids("y")[0])
    first, second = rig.frames
    assert [row.id for row in first.prompt] == ids("a€bc")
    assert [row.logprob for row in first.prompt] == [None, -1.0, -2.0, -3.0, -4.0, -5.0]
    assert first.prompt[0].text == "a" and second.prompt == ()


def test_alternatives_have_their_own_text():
    rig = Rig()
    letter = ids("h")[0]
    rig.step(letter, top=((letter, -0.5), (EOS, -1.0)))
    top = rig.tokens[0].top
    assert [(one.text, one.logprob, one.is_special) for one in top] == [
        ("h", -0.5, False),
        ("</s>", -1.0, True),
    ]


def test_the_end_tells_the_times():
    rig = Rig(stopping={"max_new_tokens": 3})
    plan_at, first_at, end_at = 100.0, 100.25, 101.5
    plan = rig.scheduler.plan()
    rig.clock.now = first_at
    result = StepResult(plan.step, (Sampled(plan.chunks[0].slot, 1, -1.0),))
    rig.scheduler.commit(plan, rig.processor.advance(plan, result, rig.scheduler.sequence_at))
    rig.step(1)
    rig.clock.now = end_at
    rig.step(1)
    finish = rig.frames[-1].finish
    assert finish.queue_s == 3.0 + plan_at - 98.0
    assert finish.prefill_s == first_at - plan_at
    assert finish.decode_s == end_at - first_at
    assert finish.cached_tokens == 0


def test_broken_logits_fail_their_sequence():
    rig = Rig().generate(ids("a"))
    plan = rig.scheduler.plan()
    result = StepResult(plan.step, (Sampled(plan.chunks[0].slot, NO_TOKEN, math.nan),))
    outputs = rig.processor.advance(plan, result, rig.scheduler.sequence_at)
    rig.scheduler.commit(plan, outputs)
    frame = outputs[0].frame
    assert frame.failure.kind == "generation" and "token 2" in frame.failure.message
    assert frame.tokens == () and frame.chain == next_chain(rig.frames[-1].chain, ())
    assert rig.sequence.state is SequenceState.FINISHED and rig.sequence.output_tokens == ids("a")


def test_failure_with_a_reason_of_its_own():
    rig = Rig()
    plan = rig.scheduler.plan()
    failure = Failure("validation", "grammar is not valid: unclosed group")
    sampled = Sampled(plan.chunks[0].slot, NO_TOKEN, math.nan, failure=failure)
    result = StepResult(plan.step, (sampled,))
    (output,) = rig.processor.advance(plan, result, rig.scheduler.sequence_at)
    assert output.frame.failure == failure


def test_a_dropped_sequence_has_no_output():
    rig = Rig()
    plan = rig.scheduler.plan()
    rig.scheduler.drop(rig.sequence)
    result = StepResult(plan.step, (Sampled(plan.chunks[0].slot, 1, -1.0),))
    assert rig.processor.advance(plan, result, rig.scheduler.sequence_at) == []


def test_a_result_of_another_step_is_refused():
    rig = Rig()
    with pytest.raises(AssertionError, match="result of step 2"):
        rig.processor.advance(StepPlan(1, ()), StepResult(2, ()), rig.scheduler.sequence_at)
