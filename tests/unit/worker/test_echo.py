"""The echo model: what it says, that it can be moved.

And the mistakes of a scheduler that it notices.
"""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from common.messages import Grammar, GrammarKind, Sampling
from worker.engine.echo import END_TOKEN, EchoEngine, echo_tokenizer_json, load_echo
from worker.engine.plan import NO_TOKEN, Chunk, KvCacheLayout, SequenceStart, StepPlan
from worker.settings import WorkerSettings

LAYOUT = KvCacheLayout(num_blocks=64, block_size=4, num_slots=4)
HELLO = tuple(b"hello")


def prefill(prompt=HELLO, *, output=(), slot=0, **start):
    tokens = (*prompt, *output)
    blocks = tuple(range(-(-len(tokens) // 4)))
    started = SequenceStart(slot, prompt, output, start.pop("sampling", Sampling()), **start)
    return StepPlan(1, (Chunk(slot, 0, tokens, blocks, is_sampled=True),), started=(started,))


def generate(engine, count, **start):
    """Tokens of one sequence, decoded step by step."""
    plan = prefill(**start)
    position, num_blocks = plan.num_tokens, len(plan.chunks[0].new_blocks)
    tokens = [engine.step(plan).sampled[0].token]
    while len(tokens) < count:
        new_blocks = (num_blocks,) if position == num_blocks * 4 else ()
        num_blocks += len(new_blocks)
        chunk = Chunk(0, position, (tokens[-1],), new_blocks, is_sampled=True)
        tokens.append(engine.step(StepPlan(2, (chunk,))).sampled[0].token)
        position += 1
    return tokens


def test_it_repeats_the_prompt_and_ends():
    assert generate(EchoEngine(LAYOUT), 8) == [*HELLO, END_TOKEN, *HELLO[:2]]


def test_the_end_waits_for_min_new_tokens():
    assert generate(EchoEngine(LAYOUT), 8, min_new_tokens=6) == [*HELLO, HELLO[0], *HELLO[:2]]
    assert generate(EchoEngine(LAYOUT), 6, min_new_tokens=5)[-1] == END_TOKEN


@given(st.integers(1, 11), st.sampled_from(["", "worker-a"]))
def test_a_moved_sequence_continues_the_same_text(moved_after, salt):
    stayed = generate(EchoEngine(LAYOUT, salt=salt), 12)
    output = tuple(stayed[:moved_after])
    rest = generate(EchoEngine(LAYOUT, salt=salt), 12 - moved_after, output=output)
    assert [*output, *rest] == stayed


def test_salt_changes_the_text_but_not_its_length():
    a, again, b = (generate(EchoEngine(LAYOUT, salt=salt), 6) for salt in ("a", "a", "b"))
    assert a == again
    assert a != b
    assert a[5] == b[5] == END_TOKEN
    assert bytes(a[:5]).decode("ascii").isprintable()


def test_grammar_is_refused_and_not_ignored():
    grammar = Grammar(GrammarKind.REGEX, "a")
    sampled = EchoEngine(LAYOUT).step(prefill(sampling=Sampling(grammar=grammar))).sampled[0]
    assert sampled.token == NO_TOKEN and sampled.failure.kind == "validation"
    assert "grammar is not supported" in sampled.failure.message


def test_top_tokens_start_with_the_chosen_one():
    sampled = EchoEngine(LAYOUT).step(prefill(sampling=Sampling(top_n_tokens=3))).sampled[0]
    assert sampled.top[0] == (sampled.token, sampled.logprob)
    assert len({token for token, _ in sampled.top}) == 3
    assert [p for _, p in sampled.top] == sorted((p for _, p in sampled.top), reverse=True)


def test_prompt_logprobs_cover_all_but_the_first_token_however_the_prompt_is_cut():
    start = SequenceStart(0, HELLO, (), Sampling(), prompt_logprobs=True)
    whole = EchoEngine(LAYOUT).step(prefill(prompt_logprobs=True)).prompt_logprobs
    assert [(p.start, len(p.logprobs)) for p in whole] == [(1, 4)]
    engine, parts = EchoEngine(LAYOUT), []
    for first, last in ((0, 2), (2, 4), (4, 5)):
        chunk = Chunk(0, first, HELLO[first:last], (first,) if first % 4 == 0 else (), last == 5)
        result = engine.step(StepPlan(first, (chunk,), started=(start,) if first == 0 else ()))
        for part in result.prompt_logprobs:
            assert part.start == 1 + len(parts)
            parts += part.logprobs
    assert tuple(parts) == whole[0].logprobs


def test_slots_are_independent_and_can_be_used_again():
    engine = EchoEngine(LAYOUT)
    first, second = prefill(slot=0), prefill(tuple(b"world"), slot=3)
    both = StepPlan(1, (*second.chunks, *first.chunks), started=(*first.started, *second.started))
    assert [(s.slot, s.token) for s in engine.step(both).sampled] == [(3, ord("w")), (0, ord("h"))]
    third = prefill(tuple(b"again"), slot=0)
    reused = StepPlan(2, third.chunks, started=third.started, released=(0,))
    assert engine.step(reused).sampled[0].token == ord("a")


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (Chunk(0, 5, (1,), (2,), True), "hold other tokens"),
        (Chunk(0, 6, (104,), (2,), True), "hold other tokens"),
        (Chunk(0, 5, (104, 1), (2,), True), "hold other tokens"),
        (Chunk(0, 4, (111,), (), True), "only the last token"),
        (Chunk(0, 5, (104,), (64,), True), "no block 64"),
        (Chunk(0, 0, (), (), False), "has tokens"),
    ],
)
def test_a_wrong_plan_is_noticed(chunk, message):
    engine = EchoEngine(LAYOUT)
    engine.step(prefill())
    with pytest.raises(AssertionError, match=message):
        engine.step(StepPlan(2, (chunk,)))


def test_tokens_need_a_block():
    chunk = Chunk(0, 0, HELLO, (0,), True)
    with pytest.raises(AssertionError, match="no block for its tokens"):
        EchoEngine(LAYOUT).step(StepPlan(1, (chunk,), started=prefill().started))


@given(st.text())
def test_tokenizer_is_bytes(text):
    tokenizer = Tokenizer.from_str(echo_tokenizer_json())
    tokens = tokenizer.encode(text).ids
    assert bytes(tokens) == text.encode()
    assert tokenizer.decode(tokens) == text


def test_tokenizer_knows_the_end():
    tokenizer = Tokenizer.from_str(echo_tokenizer_json())
    assert tokenizer.encode("a<|endoftext|>").ids == [97, END_TOKEN]
    assert tokenizer.decode([97, END_TOKEN]) == "a"
    assert tokenizer.get_vocab_size() == 257


def test_settings_size_the_model():
    settings = WorkerSettings(
        model_id="echo",
        max_total_tokens=100,
        max_batch_size=3,
        block_size=16,
        max_batch_total_tokens=250,
        echo_delay_ms=1,
    )
    model = load_echo(settings)
    assert model.layout == KvCacheLayout(num_blocks=16, block_size=16, num_slots=3)
    assert model.layout == model.engine.layout
    assert model.max_total_tokens == 100
    assert model.engine.delay_s == 0.001
    assert load_echo(WorkerSettings(model_id="echo")).max_total_tokens == 32768


def test_it_needs_no_torch():
    code = "import sys, worker.engine.echo; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
