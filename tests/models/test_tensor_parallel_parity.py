"""Shards that are processes compute what one process does, and what transformers does: every family
with 2 and 4 of them, over gloo, with plans through the ring."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import transformers

from common.errors import FleetError
from tests.checkpoints import VOCAB_SIZE, Driven, Driver, prompt_logprob_oracle
from tests.models import test_families_parity as families
from tests.models import test_t5_parity as t5
from tests.parity import NUM_TOKENS, TOLERANCE, Checkpoint, run_scheduled
from tests.shard_group import ShardGroup
from worker.settings import WorkerSettings

PROMPTS = families.PROMPTS[:7]
LONG = families.LONG

SIZES = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
    eos_token_id=2,
)
# More shards than key-value heads: neighbours hold the same one.
LLAMAS = {
    "llama-gqa": transformers.LlamaConfig(**SIZES),
    "llama-mqa-tied-biases": transformers.LlamaConfig(
        **SIZES | dict(num_key_value_heads=1, tie_word_embeddings=True, attention_bias=True)
    ),
    "qwen3-head-norms": transformers.Qwen3Config(**SIZES, head_dim=12),
}
# Of families whose other checkpoints have heads for two shards only.
FOR_FOUR_SHARDS = {
    "neox-8-heads": families.neox(
        hidden_size=64, num_attention_heads=8, rope_parameters=families.rope(0.5)
    ),
    "neox-4-heads-in-a-row": families.neox(
        num_attention_heads=4,
        use_parallel_residual=False,
        rope_parameters=families.rope(1.0),
    ),
    "galactica-12-heads": families.opt(
        enable_bias=False, activation_function="gelu", num_attention_heads=12
    ),
    "bigcode-8-heads": families.bigcode(n_embd=64, n_head=8),
    "bigcode-12-heads-all-keys": families.bigcode(multi_query=False, n_head=12),
}
# By family, the most shards that its heads and widths can be divided among.
MOST_SHARDS = {
    **dict.fromkeys(LLAMAS | FOR_FOUR_SHARDS, 4),
    "bloom-6-heads": 2,
    "bloom-8-heads": 4,
    "neox-no-bias-tied": 2,
    "opt": 4,
    "galactica": 2,
    "bigcode": 2,
    "santacoder": 4,
    "gpt2": 2,
    "gpt2-unscaled-untied": 4,
}
T5_MOST_SHARDS = {"t5-wide-gelu": 4, "flan-wide-tied": 4, "mt5-wide-tied": 2}


@pytest.fixture(scope="module", params=[2, 4])
def group(request: pytest.FixtureRequest) -> Iterator[ShardGroup]:
    group = ShardGroup(request.param)
    yield group
    group.close()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Those that tests have asked for, by name."""
    return {}


@pytest.fixture
def checkpoint(
    request: pytest.FixtureRequest,
    checkpoints: dict[str, Checkpoint],
    tmp_path_factory: pytest.TempPathFactory,
) -> Checkpoint:
    name = request.param
    if name not in checkpoints:
        checkpoints[name] = Checkpoint(
            tmp_path_factory.mktemp(name),
            (LLAMAS | FOR_FOUR_SHARDS | families.FAMILIES)[name],
            seed=families.SEEDS.get(name, 0),
            rewrite=families.as_the_original_santacoder if name == "santacoder" else None,
        )
    return checkpoints[name]


def settings_for(checkpoint: Checkpoint) -> WorkerSettings:
    values = dict(device="cpu", dtype="float32", threads=1, block_size=4)
    return WorkerSettings(
        model_id=str(checkpoint.folder), max_total_tokens=64, max_batch_size=4, **values
    )


@pytest.mark.parametrize("checkpoint", MOST_SHARDS, indirect=True)
def test_a_family(
    group: ShardGroup, checkpoint: Checkpoint, request: pytest.FixtureRequest
) -> None:
    """In mixed batches, with chunked prompts and shared prefixes; or refused, by every shard."""
    name = request.node.callspec.params["checkpoint"]
    if group.size > MOST_SHARDS[name]:
        with pytest.raises(FleetError, match="must be divisible by the number of shards"):
            group.load(settings_for(checkpoint))
        return
    engine = group.load(settings_for(checkpoint)).engine
    told, scheduler = run_scheduled(engine, PROMPTS, max_step_tokens=13)
    engine.close()
    assert scheduler.num_prefix_hit_tokens > 0
    for one in told:
        checkpoint.check(one)


@pytest.mark.parametrize("checkpoint", ["llama-gqa", "bloom-8-heads"], indirect=True)
def test_after_preemption(group: ShardGroup, checkpoint: Checkpoint) -> None:
    """The pool holds one sequence of full length; what is computed again is so on every shard."""
    settings = replace(settings_for(checkpoint), max_batch_total_tokens=64)
    engine = group.load(settings).engine
    told, scheduler = run_scheduled(engine, PROMPTS, max_step_tokens=32)
    engine.close()
    assert scheduler.num_preemptions > 0
    for one in told:
        checkpoint.check(one)


@pytest.mark.parametrize("name", T5_MOST_SHARDS)
def test_encoder_decoders(
    group: ShardGroup, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if group.size > T5_MOST_SHARDS[name]:
        return
    family = t5.Family(tmp_path_factory.mktemp(name), name)
    loaded = group.load(t5.settings_of(family.folder))
    family.check(t5.Run(loaded, t5.sequences(), max_step_tokens=30))
    loaded.engine.close()


@pytest.mark.parametrize("checkpoint", ["llama-gqa"], indirect=True)
def test_prompt_logprobs(group: ShardGroup, checkpoint: Checkpoint) -> None:
    """Their logits are gathered too, from more rows than those that choose a token."""
    engine = group.load(settings_for(checkpoint)).engine
    scored = Driven(0, LONG, NUM_TOKENS, 7, wants_prompt_logprobs=True)
    Driver(engine).run([scored, Driven(1, PROMPTS[2], NUM_TOKENS, 3)])
    engine.close()
    found = [scored.prompt_logprobs[position] for position in range(1, len(LONG))]
    expected = prompt_logprob_oracle(checkpoint.oracle, LONG)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("checkpoint", ["llama-gqa"], indirect=True)
def test_every_shard_has_the_same_blocks(group: ShardGroup, checkpoint: Checkpoint) -> None:
    """Also when memory, which other processes use, decides how many: a plan names blocks for all."""
    settings = replace(settings_for(checkpoint), memory_fraction=1e-5, max_batch_size=4096)
    loaded = group.load(settings)
    assert len(set(group.layouts)) == 1
    assert loaded.layout.num_blocks < 4096 * 16
    loaded.engine.close()
