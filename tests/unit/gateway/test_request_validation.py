"""The rules of a request: TGI's messages word by word, in TGI's order, and how values are resolved."""

import json

import pytest
from pydantic import ValidationError as BodyError

from common.errors import ValidationError
from common.messages import Grammar, GrammarKind, Sampling
from gateway.model_directory import ServedModel
from gateway.schemas.native import GenerateBody
from gateway.settings import GatewaySettings
from gateway.tokenization import TokenizerCache
from gateway.validation import validate


@pytest.fixture
async def model(fleet):
    cache = TokenizerCache(num_threads=1)
    card = fleet.registry.cards["tiny"]  # 20 input tokens, 30 in total
    yield ServedModel(card, await cache.load("bytes", fleet.registry.tokenizers["bytes"]))
    cache.close()


async def check(
    model, inputs="Hi", *, is_stream=False, settings=None, full_text=False, **parameters
):
    body = GenerateBody.model_validate_json(
        json.dumps({"inputs": inputs, "parameters": parameters})
    )
    return await validate(
        body,
        model,
        settings or GatewaySettings(),
        request_id="r",
        is_stream=is_stream,
        returns_full_text=full_text,
    )


# Each line also breaks the rule of the next one, so the table is the order too.
RULES = [
    ({"best_of": 3}, "`best_of` must be > 0 and <= 2. Given: 3"),
    ({"best_of": 2, "max_new_tokens": 0}, "you must use sampling when `best_of` is > 1"),
    ({"temperature": 0, "repetition_penalty": 0}, "`temperature` must be strictly positive"),
    (
        {"repetition_penalty": 0, "frequency_penalty": 3},
        "`repetition_penalty` must be strictly positive",
    ),
    ({"frequency_penalty": 2.1, "top_p": 1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"presence_penalty": -2.1, "top_p": 1}, "`presence_penalty` must be >= -2.0 and <= 2.0"),
    ({"top_p": 1.0, "typical_p": 0.0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"typical_p": 0.0, "top_k": 0}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"min_p": 1.1, "top_k": 0}, "`min_p` must be >= 0.0 and <= 1.0"),
    ({"top_k": 0, "max_new_tokens": 0}, "`top_k` must be strictly positive"),
    ({"max_new_tokens": 0, "stop": ["a"] * 5}, "`max_new_tokens` must be strictly positive"),
    ({"stop": ["a"] * 5}, "`stop` supports up to 4 stop sequences. Given: 5"),
    (
        {"best_of": 2, "do_sample": True, "seed": 1, "top_n_tokens": 6},
        "`seed` must not be set when `best_of` > 1",
    ),
    ({"top_n_tokens": 6, "truncate": 0}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    (
        {"truncate": 0, "max_new_tokens": 99},
        "`truncate` must be strictly positive and less than 20. Given: 0",
    ),
    ({"truncate": 21}, "`truncate` must be strictly positive and less than 20. Given: 21"),
    (
        {"max_new_tokens": 29},
        "`inputs` tokens + `max_new_tokens` must be <= 30. Given: 2 `inputs` tokens and 29 `max_new_tokens`",
    ),
    (
        {"min_new_tokens": 8, "max_new_tokens": 7},
        "`min_new_tokens` must be >= 0 and <= 7. Given: 8",
    ),
    (
        {"logit_bias": {"256": 1}, "grammar": {"type": "regex", "value": "("}},
        "`logit_bias` takes token ids >= 0 and < 256. Given: 256",
    ),
    ({"logit_bias": {"-1": 1}}, "`logit_bias` takes token ids >= 0 and < 256. Given: -1"),
    ({"logit_bias": {"x": 1}}, "`logit_bias` takes token ids >= 0 and < 256. Given: x"),
    (
        {"logit_bias": {"7": 100.5}},
        "`logit_bias` values must be >= -100.0 and <= 100.0. Given: 100.5",
    ),
    ({"grammar": {"type": "regex", "value": "("}}, "grammar is not valid: unclosed group"),
    (
        {"grammar": {"type": "json", "value": {"type": "foo"}}},
        "grammar is not valid: Invalid type: foo",
    ),
    (
        {"grammar": {"type": "json", "value": "{"}},
        "grammar is not valid: EOF while parsing an object at line 1 column 1",
    ),
    (
        {"grammar": {"type": "lark", "value": "start: x"}},
        'grammar is not valid: at 1(8): unknown name: "x"',
    ),
    ({"adapter_id": "a"}, "`adapter_id` is not supported; leave it out"),
]


@pytest.mark.parametrize(("parameters", "message"), RULES)
async def test_rule(model, parameters, message):
    with pytest.raises(ValidationError) as raised:
        await check(model, **parameters)
    assert str(raised.value) == f"Input validation error: {message}"


@pytest.mark.parametrize(
    ("inputs", "parameters", "message"),
    [
        ("", {"truncate": 0}, "`inputs` cannot be empty"),
        ("x" * 21, {"max_new_tokens": 1}, "`inputs` must have less than 20 tokens. Given: 21"),
        ("x" * 30, {}, "`inputs` must have less than 20 tokens. Given: 30"),
        (
            "x" * 31,
            {},
            "`inputs` tokens + `max_new_tokens` must be <= 30. Given: 31 `inputs` tokens and 0 `max_new_tokens`",
        ),
    ],
)
async def test_rule_of_the_prompt(model, inputs, parameters, message):
    with pytest.raises(ValidationError) as raised:
        await check(model, inputs, **parameters)
    assert str(raised.value) == f"Input validation error: {message}"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"best_of": 2, "decoder_input_details": True},
            "`best_of` != 1 is not supported when streaming tokens",
        ),
        (
            {"decoder_input_details": True, "temperature": 0},
            "`decoder_input_details` == true is not supported when streaming tokens",
        ),
    ],
)
async def test_rule_of_streams(model, parameters, message):
    with pytest.raises(ValidationError) as raised:
        await check(model, is_stream=True, **parameters)
    assert str(raised.value) == f"Input validation error: {message}"


async def test_best_of_that_is_switched_off(model):
    with pytest.raises(ValidationError, match="is not allowed for this endpoint"):
        await check(model, best_of=2, do_sample=True, settings=GatewaySettings(max_best_of=1))


async def test_limits_are_reached_exactly(model):
    valid = await check(model, "x" * 20, max_new_tokens=10, truncate=20)
    assert valid.num_prompt_tokens == 20 and valid.request.stopping.max_new_tokens == 10


async def test_answer_may_be_as_long_as_the_model_allows(model):
    assert (await check(model, "x" * 12)).request.stopping.max_new_tokens == 18


async def test_truncation_keeps_the_end(model):
    assert (await check(model, "abc" * 10, truncate=2)).request.prompt_tokens == (65, 66)


async def test_absent_parameters_are_greedy(model):
    sampling = (await check(model)).request.sampling
    assert not sampling.do_sample and sampling.seed == 0 and sampling.temperature == 1.0


@pytest.mark.parametrize(
    ("parameters", "does_sample"),
    [
        ({"temperature": 1.0}, False),
        ({"temperature": 0.5}, True),
        ({"top_k": 3}, True),
        ({"top_p": 0.5}, True),
        ({"typical_p": 0.5}, True),
        ({"min_p": 0.0}, False),
        ({"min_p": 0.1}, True),
        ({"do_sample": True}, True),
        ({"repetition_penalty": 1.2, "frequency_penalty": 1, "presence_penalty": 1}, False),
        ({"seed": 4}, False),
    ],
)
async def test_what_turns_sampling_on(model, parameters, does_sample):
    assert (await check(model, **parameters)).request.sampling.do_sample is does_sample


async def test_missing_seed_is_drawn_for_every_request(model):
    seeds = {(await check(model, do_sample=True)).request.sampling.seed for _ in range(8)}
    assert len(seeds) == 8 and all(0 <= seed < 2**64 for seed in seeds)


async def test_best_of_makes_requests_that_differ_by_seed(model):
    valid = await check(model, best_of=2, do_sample=True)
    assert [request.id for request in valid.requests] == ["r-0", "r-1"]
    assert len({request.sampling.seed for request in valid.requests}) == 2


async def test_full_text(model):
    assert (await check(model)).prefix == ""
    assert (await check(model, return_full_text=True)).prefix == "Hi"
    assert (await check(model, full_text=True)).prefix == "Hi"
    assert (await check(model, full_text=True, return_full_text=False)).prefix == ""


async def test_details(model):
    assert not (await check(model)).has_details
    assert (await check(model, details=True)).has_details
    valid = await check(model, decoder_input_details=True)
    assert valid.has_details and valid.request.prompt_logprobs


SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "null"}}}
MEANT = json.dumps({**SCHEMA, "additionalProperties": False})  # see gateway/json_schema.py


@pytest.mark.parametrize(
    ("given", "kind", "value"),
    [
        ({"type": "json", "value": SCHEMA}, GrammarKind.JSON_SCHEMA, MEANT),
        ({"type": "json_object", "value": SCHEMA}, GrammarKind.JSON_SCHEMA, MEANT),
        (
            {"type": "json", "value": json.dumps(SCHEMA)},
            GrammarKind.JSON_SCHEMA,
            MEANT,
        ),
        (
            {"type": "json_schema", "value": {"name": "x", "schema": SCHEMA}},
            GrammarKind.JSON_SCHEMA,
            MEANT,
        ),
        (
            {"type": "json_schema", "value": {"schema": SCHEMA}},
            GrammarKind.JSON_SCHEMA,
            MEANT,
        ),
        ({"type": "regex", "value": "a+"}, GrammarKind.REGEX, "a+"),
        ({"type": "lark", "value": 'start: "a"'}, GrammarKind.LARK, 'start: "a"'),
    ],
)
async def test_grammar_in_the_shapes_of_tgi(model, given, kind, value):
    """The order of a schema's properties is kept: it is the order of the answer's."""
    assert (await check(model, grammar=given)).request.sampling.grammar == Grammar(kind, value)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"type": "xml", "value": "a"},
        {"type": "regex"},
        {"type": "regex", "value": {}},
        {"type": "json", "value": [1]},
        {"type": "json_schema", "value": {"name": "x"}},
    ],
)
async def test_grammar_in_another_shape_is_refused_while_parsing(model, given):
    with pytest.raises(BodyError):
        await check(model, grammar=given)


async def test_every_rule_reaches_the_worker(model):
    given = {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.75,
        "typical_p": 0.25,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "frequency_penalty": -0.5,
        "presence_penalty": 1.25,
        "seed": 11,
        "top_n_tokens": 3,
        "watermark": True,
    }
    bias = {"3": -100, "255": 0.5}
    sampling = (await check(model, logit_bias=bias, **given)).request.sampling
    expected = Sampling(do_sample=True, logit_bias=((3, -100.0), (255, 0.5)), **given)
    assert sampling == expected


async def test_our_own_parameters(model):
    valid = await check(
        model, ignore_eos_token=True, include_stop=False, min_new_tokens=2, stop=["a", "b"]
    )
    stopping = valid.request.stopping
    assert stopping.ignore_eos and not stopping.include_stop and stopping.min_new_tokens == 2
    assert stopping.stop == ("a", "b")


async def test_long_prompt_is_tokenized_in_a_thread_alike(model):
    text = "héllo wörld " * 300
    assert await model.tokenizer.encode(text) == 300 * await model.tokenizer.encode("héllo wörld ")


async def test_tokenizer_that_fails_is_a_validation_error(model):
    with pytest.raises(ValidationError, match="tokenizer error"):
        await model.tokenizer.encode("\ud800")


async def test_file_that_is_no_tokenizer():
    cache = TokenizerCache(num_threads=1)
    with pytest.raises(ValueError, match=r"not a tokenizer\.json"):
        await cache.load("x", b"{}")
    cache.close()
