"""Structured output over random logits: what ends is always what the grammar asked for."""

import json
import re
import statistics
import time

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from common.errors import ValidationError
from common.grammar import GrammarError
from common.messages import Grammar, GrammarKind, Sampling
from worker.engine.echo import END_TOKEN, VOCAB_SIZE, echo_tokenizer_json
from worker.engine.plan import NO_TOKEN, SequenceStart
from worker.sampling.grammar import Grammars
from worker.sampling.sampler import Sampler

PADDED_VOCAB = VOCAB_SIZE + 13  # models pad their vocabulary; the rest has no text
PROMPT = (65, 66)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,5}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "bc"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
JSON = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))
REGEX = Grammar(GrammarKind.REGEX, r"[a-c]{2,4}-\d{3}")
LARK = Grammar(GrammarKind.LARK, 'start: "<" WORD (" " WORD)~1..3 ">"\nWORD: /[xyz]{1,3}/')

# A mistake that is easily made: every letter doubles the ways in which a text can be read.
AMBIGUOUS = Grammar(GrammarKind.LARK, "start: e\ne: e e | e e e | /[a-z ]/")
# The same with 200 names for it: within the limits a mask of all words below would take two seconds.
NAMES = range(200)
HOSTILE = Grammar(
    GrammarKind.LARK,
    f"start: e\ne: {' | '.join(f'e{i} e' for i in NAMES)} | /[a-z ]/\n"
    + "\n".join(f"e{i}: e" for i in NAMES),
)
NAMED = {str(number): {"type": "string"} for number in range(5000)}
HUGE = Grammar(
    GrammarKind.JSON_SCHEMA,
    json.dumps({"type": "object", "properties": NAMED, "required": list(NAMED)}),
)


def tool(number):
    arguments = {
        f"argument_{number}_{i}": kind
        for i, kind in enumerate(
            (
                {"type": "string", "maxLength": 1000},
                {"type": ["integer", "null"], "minimum": 0},
                {"enum": [f"option {number} {choice}" for choice in range(20)]},
                {"type": "array", "items": {"type": "string", "format": "date-time"}},
            )
        )
    }
    kind = {"type": "object", "properties": arguments, "additionalProperties": False}
    call = {"name": {"const": f"tool_{number}"}, "arguments": kind}
    return {"type": "object", "properties": call, "required": list(call)}


def nested(depth):
    inner = nested(depth - 1) if depth else {"type": "string"}
    return {"type": "object", "properties": {"name": {"type": "string"}, "inner": inner}}


# What people do ask for, at its largest.
LARGE_SCHEMAS = {
    "tools": {"type": "array", "items": {"anyOf": [tool(number) for number in range(128)]}},
    "fields": {"properties": {f"field_{i}": {"type": ["string", "null"]} for i in range(500)}},
    "enum": {"enum": [f"value {i * 7919 % 100_003}" for i in range(2000)]},
    "depth": nested(60),
    "pattern": {"type": "string", "pattern": "^[a-zA-Z0-9 ,.]{0,1000}$"},
    "rows": {"type": "array", "items": SCHEMA, "maxItems": 1000},
}


@pytest.fixture(scope="module")
def grammars():
    return Grammars(echo_tokenizer_json(), eos_tokens=(END_TOKEN,))


def random_row(seed, position):
    """A row of logits as a function of a text's place, so that two runs can be compared."""
    generator = torch.Generator().manual_seed(seed * 10_000 + position)
    return torch.randn(PADDED_VOCAB, generator=generator) * 4


def run(grammars, *samplings, max_tokens=400, output=(), min_new_tokens=0, seeds=None):
    """Generate a batch until every row has ended; the tokens of each row."""
    sampler = Sampler(
        len(samplings), PADDED_VOCAB, eos_tokens=(END_TOKEN,), device="cpu", grammars=grammars
    )
    seeds = seeds or range(len(samplings))
    rows = [list(output) for _ in samplings]
    for slot, sampling in enumerate(samplings):
        sampler.start(SequenceStart(slot, PROMPT, tuple(output), sampling, min_new_tokens))
    live = list(range(len(samplings)))
    while live:
        logits = torch.stack([random_row(seeds[slot], len(rows[slot])) for slot in live])
        positions = [len(PROMPT) + len(rows[slot]) for slot in live]
        for chosen in sampler.sample(logits, live, positions):
            assert chosen.token != NO_TOKEN, chosen.failure
            rows[chosen.slot].append(chosen.token)
        live = [s for s in live if rows[s][-1] != END_TOKEN and len(rows[s]) < max_tokens]
    return rows


def text_of(tokens):
    assert tokens[-1] == END_TOKEN, "the text did not come to its end"
    return bytes(tokens[:-1]).decode()


def check_json(text):
    value = json.loads(text)
    assert list(value) == list(SCHEMA["properties"])
    assert re.fullmatch("[A-Z][a-z]{1,5}", value["name"]) and 0 <= value["age"] <= 120
    assert 1 <= len(value["tags"]) <= 3 and set(value["tags"]) <= {"a", "bc"}


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_texts_follow_their_grammars(grammars, do_sample, seed):
    samplings = [
        Sampling(do_sample=do_sample, seed=seed, temperature=3.0, grammar=grammar)
        for grammar in (JSON, REGEX, LARK)
    ]
    found = run(grammars, *samplings, seeds=[seed, seed + 50, seed + 100])
    as_json, as_regex, as_lark = map(text_of, found)
    check_json(as_json)
    assert re.fullmatch(REGEX.value, as_regex)
    assert re.fullmatch("<[xyz]{1,3}( [xyz]{1,3}){1,3}>", as_lark)


def test_rows_do_not_disturb_one_another(grammars):
    mixed = [Sampling(), Sampling(grammar=REGEX), Sampling(do_sample=True, seed=4, top_k=9)]
    together = run(grammars, *mixed, max_tokens=12)
    for row, sampling in enumerate(mixed):
        assert run(grammars, sampling, max_tokens=12, seeds=[row]) == [together[row]]


@pytest.mark.parametrize("cut", [0, 1, 7, 20])
def test_replay_gives_the_same_continuation(grammars, cut):
    """As after a preemption, or on another worker."""
    sampling = Sampling(do_sample=True, seed=8, grammar=JSON)
    (whole,) = run(grammars, sampling)
    assert len(whole) > 20
    assert run(grammars, sampling, output=whole[:cut]) == [whole]


def test_the_end_may_come_exactly_where_the_grammar_allows_it(grammars):
    sampler = Sampler(1, PADDED_VOCAB, eos_tokens=(END_TOKEN,), device="cpu", grammars=grammars)
    grammar = Grammar(GrammarKind.REGEX, "ab?")
    sampler.start(SequenceStart(0, PROMPT, (), Sampling(grammar=grammar, top_n_tokens=9)))

    def next_tokens(position, wanted):
        logits = torch.zeros(1, PADDED_VOCAB)
        logits[0, wanted] = 1
        (chosen,) = sampler.sample(logits, [0], [position])
        assert chosen.token == wanted
        return {token for token, _ in chosen.top}

    assert next_tokens(2, ord("a")) == {ord("a")}
    assert next_tokens(3, ord("b")) == {ord("b"), END_TOKEN}
    assert next_tokens(4, END_TOKEN) == {END_TOKEN}
    assert next_tokens(5, END_TOKEN) == {END_TOKEN}  # who ignores the end gets it again


def test_shortest_answer_waits_for_the_end_but_not_for_ever(grammars):
    """`min_new_tokens` masks the end as long as the text can go on."""
    optional = Sampling(grammar=Grammar(GrammarKind.REGEX, "a{0,3}"), logit_bias=((END_TOKEN, 90),))
    assert text_of(run(grammars, optional)[0]) == ""
    assert text_of(run(grammars, optional, min_new_tokens=2)[0]) == "aa"
    assert text_of(run(grammars, optional, min_new_tokens=30)[0]) == "aaa"


def test_replay_of_ends_that_were_ignored(grammars):
    sampling = Sampling(grammar=Grammar(GrammarKind.REGEX, "ab"))
    output = [*b"ab", END_TOKEN, END_TOKEN]
    assert run(grammars, sampling, output=output, max_tokens=5) == [[*output, END_TOKEN]]


def test_penalties_come_before_the_mask(grammars):
    """A bias cannot bring back what the grammar forbids."""
    sampling = Sampling(grammar=REGEX, logit_bias=((ord("!"), 100.0),), repetition_penalty=5.0)
    assert re.fullmatch(REGEX.value, text_of(run(grammars, sampling)[0]))


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar(GrammarKind.REGEX, "("), "unclosed group"),
        (Grammar(GrammarKind.JSON_SCHEMA, "{"), "EOF while parsing"),
        (Grammar(GrammarKind.LARK, "start: x"), "unknown name"),
        (Grammar(GrammarKind.LARK, "start: <no_such_token>"), "no_such_token"),
        (HUGE, "grammar size (number of symbols) too big"),
    ],
)
def test_grammar_that_cannot_be_followed_fails_alone(grammars, grammar, reason):
    sampler = Sampler(2, PADDED_VOCAB, eos_tokens=(END_TOKEN,), device="cpu", grammars=grammars)
    sampler.start(SequenceStart(0, PROMPT, (), Sampling(grammar=grammar)))
    sampler.start(SequenceStart(1, PROMPT, (), Sampling()))
    failed, sound = sampler.sample(torch.stack([random_row(0, 0)] * 2), [0, 1], [2, 2])
    assert failed.token == NO_TOKEN and failed.failure.kind == ValidationError.kind
    assert failed.failure.message.startswith("Input validation error: grammar is not valid: ")
    assert reason in failed.failure.message
    assert sound.token == int(random_row(0, 0).argmax()) and sound.failure is None


@pytest.fixture(scope="module")
def many_words():
    """A vocabulary of 8000 words on top of the bytes, as models have: a mask looks at all of them."""
    draw = np.random.default_rng(0)
    letters = [chr(letter) for letter in range(33, 127)]
    pieces = [*letters, " ", "</s>"]
    pieces += ["".join(draw.choice(letters[64:90], draw.integers(2, 17))) for _ in range(8000)]
    vocabulary = {piece: token for token, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=False))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    grammars = Grammars(tokenizer.to_str(), eos_tokens=(vocabulary["</s>"],))
    grammars.start(REGEX, ()).next_tokens()  # its tables are built
    return grammars, vocabulary


@pytest.mark.parametrize("grammar", [AMBIGUOUS, HOSTILE], ids=["ambiguous", "hostile"])
def test_expensive_grammar_fails_alone_and_soon(many_words, grammar):
    grammars, vocabulary = many_words
    sampler = Sampler(2, len(vocabulary), eos_tokens=(95,), device="cpu", grammars=grammars)
    anything = Grammar(GrammarKind.REGEX, "[a-z]*")
    for slot, each in enumerate((grammar, anything)):
        sampler.start(SequenceStart(slot, (1,), (), Sampling(grammar=each)))
    logits = torch.zeros(2, len(vocabulary))
    logits[:, vocabulary["a"]] = 1
    slowest_s = 0.0
    for position in range(1, 120):
        started = time.perf_counter()
        first, second = sampler.sample(logits.clone(), [0, 1], [position, position])
        slowest_s = max(slowest_s, time.perf_counter() - started)
        assert second.token == vocabulary["a"]
        if first.failure:
            break
    assert first.token == NO_TOKEN and first.failure.kind == ValidationError.kind
    assert "grammar is not valid: too expensive to follow: " in first.failure.message
    assert slowest_s < 0.6  # 0.15 s on an idle machine; whole seconds if nobody stopped it


def test_grammar_that_costs_a_bit_too_much_in_every_step_fails(grammars, monkeypatch):
    monkeypatch.setattr("worker.sampling.grammar_budget.MOST_S", 0.001)
    monkeypatch.setattr("worker.sampling.grammar_budget.STEP_S", 0.0)
    endless = Sampling(grammar=Grammar(GrammarKind.REGEX, "a*"))
    with pytest.raises(AssertionError, match="too expensive to follow: other requests"):
        run(grammars, endless, min_new_tokens=999, max_tokens=999)


@pytest.mark.parametrize("name", LARGE_SCHEMAS)
def test_large_schemas_are_affordable(grammars, name):
    schema = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(LARGE_SCHEMAS[name]))
    (tokens,) = run(grammars, Sampling(do_sample=True, seed=3, grammar=schema), max_tokens=300)
    if tokens[-1] == END_TOKEN:
        json.loads(text_of(tokens))


def test_model_without_an_end_or_with_a_foreign_tokenizer_says_so():
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).to_str()
    for grammars, reason in (
        (Grammars(echo_tokenizer_json(), eos_tokens=()), "no end-of-sequence token"),
        (Grammars(words, eos_tokens=(1,)), "the model's tokenizer is of no use"),
        (Grammars(echo_tokenizer_json(), eos_tokens=(9999,)), "the model's tokenizer is of no use"),
    ):
        sampler = Sampler(1, PADDED_VOCAB, eos_tokens=(), device="cpu", grammars=grammars)
        sampler.start(SequenceStart(0, PROMPT, (), Sampling(grammar=REGEX)))
        (failed,) = sampler.sample(random_row(0, 0).unsqueeze(0), [0], [2])
        assert failed.token == NO_TOKEN and reason in failed.failure.message


def test_unigram_tokenizer():
    """T5's kind: a space is a part of its words, and tokens are no bytes."""
    pieces = ["</s>", "<unk>", "▁", "▁ab", "a", "b", "ab", "é", "▁1", "1", "23"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], 1))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    grammars = Grammars(tokenizer.to_str(), eos_tokens=(0,))
    grammar = Grammar(GrammarKind.REGEX, "(ab|é){3} (ab|1|23)")
    seen = set()
    for seed in range(12):
        sampling = Sampling(do_sample=True, seed=seed, grammar=grammar)
        sampler = Sampler(1, len(pieces), eos_tokens=(0,), device="cpu", grammars=grammars)
        sampler.start(SequenceStart(0, (3,), (), sampling))
        tokens = []
        while 0 not in tokens:
            logits = torch.zeros(1, len(pieces))
            (chosen,) = sampler.sample(logits, [0], [1 + len(tokens)])
            assert chosen.token != NO_TOKEN, chosen.failure
            tokens.append(chosen.token)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        assert re.fullmatch(grammar.value, text), text
        seen.add(text)
    assert len(seen) > 3
    impossible = grammars.start(Grammar(GrammarKind.REGEX, r"ab\{"), (6,))
    with pytest.raises(GrammarError):
        impossible.next_tokens()


def test_rows_without_a_grammar_need_no_mask(grammars, monkeypatch):
    monkeypatch.setattr("worker.sampling.processors.keep_grammatical_", None)
    run(grammars, Sampling(), Sampling(do_sample=True), max_tokens=3)


def test_next_mask_is_ready_when_it_is_needed(grammars):
    """It is worked out beside the engine; what a step waits for is far below a step's own time."""
    matcher = grammars.start(JSON, ())
    matcher.next_tokens()
    waits = []
    for byte in b'{"name":"Ab","age":7,"tags":["a"':
        matcher.record(byte)
        started = time.perf_counter()
        matcher.next_tokens()
        waits.append(time.perf_counter() - started)
    assert statistics.median(waits) < 0.01
