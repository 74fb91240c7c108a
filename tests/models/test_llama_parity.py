"""The Llama family computes what transformers computes: tokens exactly, log-probabilities to 1e-4,
in float32."""

import copy

import pytest
import torch
import transformers

from tests.checkpoints import VOCAB_SIZE, Driven, prompt_logprob_oracle, random_prompt
from tests.parity import NUM_TOKENS, Checkpoint, a_sequence

SIZES = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


def llama(**changes: object) -> transformers.PretrainedConfig:
    return transformers.LlamaConfig(**SIZES | changes)


def rope(kind: str, **values: object) -> dict[str, object]:
    return {"rope_type": kind, "rope_theta": 500.0, **values}


LLAMA3 = dict(
    factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)

FAMILIES = {
    "llama-gqa": llama(),
    "llama-mqa-tied": llama(num_key_value_heads=1, tie_word_embeddings=True),
    "llama-mha-biases": llama(num_key_value_heads=6, attention_bias=True, mlp_bias=True),
    "llama-head-dim": llama(head_dim=16),
    "llama-rope-llama3": llama(rope_parameters=rope("llama3", **LLAMA3)),
    "llama-rope-linear": llama(rope_parameters=rope("linear", factor=3.0)),
    "llama-rope-yarn": llama(
        rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=32)
    ),
    # Beyond the length that the files tell, where it is the one before scaling.
    "qwen2-rope-yarn-switched-on": transformers.Qwen2Config(
        **SIZES | dict(max_position_embeddings=20),
        rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=16),
    ),
    "llama-rope-linear-before": llama(
        max_position_embeddings=16, rope_parameters=rope("linear", factor=4.0)
    ),
    # A prompt within the original length that grows out of it.
    "llama-rope-dynamic": llama(
        max_position_embeddings=40, rope_parameters=rope("dynamic", factor=2.0)
    ),
    "mistral-window": transformers.MistralConfig(**SIZES, sliding_window=11, head_dim=8),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen2-some-windows": transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=11, max_window_layers=1
    ),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16),
    # Heads of 32 features are the smallest for which every kernel of worker/kernels/cpu is used.
    "mistral-window-kernels": transformers.MistralConfig(**SIZES, sliding_window=11, head_dim=32),
    "qwen3-kernels": transformers.Qwen3Config(**SIZES, head_dim=32),
}

LONG, MIDDLE, SHORT = 37, 23, 5


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(tmp_path_factory.mktemp(request.param), FAMILIES[request.param])


@pytest.fixture(scope="module")
def plain_family(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(tmp_path_factory.mktemp("plain"), FAMILIES["llama-gqa"])


def test_the_oracle_is_not_trivial(family: Checkpoint) -> None:
    tokens, logprobs = family.answer(random_prompt(LONG, seed=LONG))
    assert len(set(tokens)) > NUM_TOKENS // 2
    assert min(logprobs) < -0.01


def test_alone(family: Checkpoint) -> None:
    alone = a_sequence(3, LONG)
    family.driver().run([alone])
    family.check(alone)


def test_mixed_batch_with_chunked_prompts(family: Checkpoint) -> None:
    batch = [
        a_sequence(0, MIDDLE),
        a_sequence(5, LONG, chunk_size=7),
        a_sequence(2, SHORT, chunk_size=4),
        a_sequence(1, LONG, chunk_size=1),
        a_sequence(7, 1),
    ]
    family.driver(seed=1).run(batch)
    for one in batch:
        family.check(one)


@pytest.mark.parametrize("chunk_size", [2, 4, 5, 16, 36])
def test_chunk_sizes(plain_family: Checkpoint, chunk_size: int) -> None:
    chunked = a_sequence(0, LONG, chunk_size=chunk_size)
    plain_family.driver().run([chunked])
    plain_family.check(chunked)


def test_shared_prefix_blocks(family: Checkpoint) -> None:
    driver = family.driver()
    first = a_sequence(0, LONG)
    driver.run([first])
    shared = tuple(driver.tables[0][:5])  # 20 tokens
    prompt = first.prompt[:20] + random_prompt(9, seed=99)
    second = Driven(1, prompt, NUM_TOKENS, 4, shared_blocks=shared)
    third = Driven(2, first.prompt, NUM_TOKENS, 1000, shared_blocks=shared)
    driver.run([second, third])
    family.check(third)
    if "dynamic" not in str(family.folder):
        family.check(second)


def test_a_slot_is_used_again(plain_family: Checkpoint) -> None:
    driver = plain_family.driver()
    for length in (LONG, SHORT, MIDDLE):
        one = a_sequence(0, length)
        driver.run([one])
        plain_family.check(one)


@pytest.mark.parametrize("chunk_size", [1, 6, 1000])
def test_prompt_logprobs(family: Checkpoint, chunk_size: int) -> None:
    scored = a_sequence(0, LONG, chunk_size=chunk_size, wants_prompt_logprobs=True)
    family.driver().run([scored, a_sequence(1, SHORT)])
    expected = prompt_logprob_oracle(family.oracle, scored.prompt)
    assert sorted(scored.prompt_logprobs) == list(range(1, LONG))
    found = [scored.prompt_logprobs[position] for position in range(1, LONG)]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_overflow_of_a_neighbour_does_not_spread(plain_family: Checkpoint) -> None:
    """Blocks full of NaN, left behind by a broken sequence, must not reach their next owner."""
    driver = plain_family.driver()
    for rows in driver.engine._runner._cache.layers:
        rows.fill_(float("nan"))
    batch = [
        a_sequence(0, MIDDLE),
        a_sequence(1, LONG, chunk_size=5),
        a_sequence(2, SHORT, chunk_size=2),
    ]
    driver.run(batch)
    for one in batch:
        plain_family.check(one)


def test_bfloat16_follows_the_oracle(family: Checkpoint) -> None:
    """With the packed products of the CPU: close, as the oracle in bfloat16 is close to itself in
    float32."""
    driver = family.driver(dtype="bfloat16")
    scored = a_sequence(0, LONG, wants_prompt_logprobs=True)
    driver.run([scored])
    expected = torch.tensor(prompt_logprob_oracle(family.oracle, scored.prompt))
    found = torch.tensor([scored.prompt_logprobs[position] for position in range(1, LONG)])
    rounded = copy.deepcopy(family.oracle).to(torch.bfloat16)
    reference = torch.tensor(prompt_logprob_oracle(rounded, scored.prompt))
    assert (found - expected).abs().mean() < 2 * (reference - expected).abs().mean() + 1e-3
