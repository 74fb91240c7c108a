"""BLOOM, GPT-NeoX, OPT, GPT-BigCode and GPT-2 compute what transformers computes: tokens exactly,
log-probabilities to 1e-4, in float32.

Head counts are odd or no powers of two where that may matter, and widths are no multiples of
anything that a kernel likes.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from common.errors import FleetError
from tests.checkpoints import VOCAB_SIZE, Driven, prompt_logprob_oracle, random_prompt
from tests.parity import NUM_TOKENS, TOLERANCE, Checkpoint, a_sequence, run_scheduled
from worker.engine.engine import build_engine
from worker.settings import WorkerSettings

IDS = dict(vocab_size=VOCAB_SIZE, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def bloom(**changes: object) -> transformers.PretrainedConfig:
    values = dict(hidden_size=48, n_layer=3, n_head=6, seq_length=256)
    return transformers.BloomConfig(**IDS | values | changes)


def neox(**changes: object) -> transformers.PretrainedConfig:
    values = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=80)
    return transformers.GPTNeoXConfig(**IDS | values | changes)


def opt(**changes: object) -> transformers.PretrainedConfig:
    values = dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, ffn_dim=80)
    values |= dict(max_position_embeddings=70, word_embed_proj_dim=48)
    return transformers.OPTConfig(**IDS | values | changes)


def bigcode(**changes: object) -> transformers.PretrainedConfig:
    values = dict(n_embd=48, n_layer=3, n_head=6, n_inner=80, n_positions=70)
    return transformers.GPTBigCodeConfig(**IDS | values | changes)


def gpt2(**changes: object) -> transformers.PretrainedConfig:
    values = dict(n_embd=48, n_layer=3, n_head=6, n_positions=70)
    return transformers.GPT2Config(**IDS | values | changes)


def rope(fraction: float, **values: object) -> dict[str, object]:
    return {"rope_theta": 500.0, "partial_rotary_factor": fraction, "rope_type": "default"} | values


FAMILIES = {
    "bloom-6-heads": bloom(),
    "bloom-8-heads": bloom(hidden_size=64, n_head=8, n_layer=2),
    "bloom-7-heads-untied": bloom(hidden_size=56, n_head=7, tie_word_embeddings=False),
    "bloom-normed-residual": bloom(n_head=3, apply_residual_connection_post_layernorm=True),
    "neox": neox(rope_parameters=rope(0.25)),
    "neox-in-a-row": neox(rope_parameters=rope(0.5), use_parallel_residual=False, vocab_size=256),
    "neox-no-bias-tied": neox(
        num_attention_heads=6,
        attention_bias=False,
        tie_word_embeddings=True,
        hidden_act="gelu_fast",
        rope_parameters=rope(1.0, rope_type="linear", factor=2.0),
    ),
    # Heads of 32 features are the smallest for which every kernel of worker/kernels/cpu is used.
    "neox-kernels": neox(hidden_size=96, rope_parameters=rope(1.0)),
    "opt": opt(),
    "opt-350m": opt(do_layer_norm_before=False, word_embed_proj_dim=20, num_attention_heads=3),
    "galactica": opt(enable_bias=False, activation_function="gelu", num_attention_heads=6),
    "opt-plain-norms-untied": opt(layer_norm_elementwise_affine=False, tie_word_embeddings=False),
    "bigcode": bigcode(),
    "bigcode-multi-head": bigcode(multi_query=False, n_head=3, activation_function="relu"),
    "bigcode-untied": bigcode(n_embd=40, n_head=5, n_inner=None, tie_word_embeddings=False),
    "santacoder": bigcode(n_layer=2, n_head=4),
    "gpt2": gpt2(),
    "gpt2-falling-scale": gpt2(n_head=3, scale_attn_by_inverse_layer_idx=True, n_inner=72),
    "gpt2-unscaled-untied": gpt2(
        n_head=12, scale_attn_weights=False, tie_word_embeddings=False, reorder_and_upcast_attn=True
    ),
}

# With other seeds these repeat one token, whatever their layers compute.
SEEDS = {
    "bloom-6-heads": 2,
    "bloom-8-heads": 2,
    "bloom-normed-residual": 52,
    "neox-in-a-row": 1,
    "opt-350m": 44,
    "bigcode": 1,
    "bigcode-multi-head": 6,
    "bigcode-untied": 1,
    "gpt2-falling-scale": 3,
}

# Ten prompts; the second half begins as the long one does, in the middle of a block or at its end.
LENGTHS = (37, 23, 5, 1, 16)
LONG = random_prompt(37, seed=37)
PROMPTS = tuple(random_prompt(length, seed=length) for length in LENGTHS) + tuple(
    LONG[:shared] + random_prompt(length, seed=100 + length)
    for shared, length in ((20, 9), (20, 1), (21, 3), (35, 2), (8, 17))
)


def as_the_original_santacoder(folder: Path) -> None:
    """q apart from k and v, weights of a block as [inputs, outputs], masks among the tensors."""
    config = json.loads((folder / "config.json").read_text())
    hidden_size, heads = config["n_embd"], config["n_head"]
    for name in ("multi_query", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"):
        del config[name]
    config |= dict(architectures=["GPT2LMHeadCustomModel"], model_type="gpt2")
    config |= dict(attention_head_type="multiquery", activation_function="gelu_fast")
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if ".attn.c_attn." in name:
            q, kv = tensor.split((hidden_size, 2 * hidden_size // heads))
            parts = {"q_attn": q, "kv_attn": kv}
        else:
            parts = {"": tensor}
        for part, values in parts.items():
            if values.dim() == 2 and (".attn." in name or ".mlp." in name):
                values = values.T
            tensors[name.replace("c_attn", part)] = values.contiguous()
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    rewrite = as_the_original_santacoder if request.param == "santacoder" else None
    folder = tmp_path_factory.mktemp(request.param)
    seed = SEEDS.get(request.param, 0)
    return Checkpoint(folder, FAMILIES[request.param], seed=seed, rewrite=rewrite)


def test_the_oracle_is_not_trivial(family: Checkpoint) -> None:
    tokens, logprobs = family.answer(LONG)
    assert len(set(tokens)) > NUM_TOKENS // 2
    assert min(logprobs) < -0.01


def test_alone(family: Checkpoint) -> None:
    driver = family.driver()
    for prompt in PROMPTS:
        alone = Driven(3, prompt, NUM_TOKENS, 1000)
        driver.run([alone])
        family.check(alone)


def test_mixed_batch_with_chunked_prompts(family: Checkpoint) -> None:
    chunk_sizes = (1000, 7, 4, 1, 5, 1, 16, 3, 1000, 2)
    batch = [
        Driven(slot, prompt, NUM_TOKENS, chunk_size)
        for slot, (prompt, chunk_size) in enumerate(zip(PROMPTS, chunk_sizes, strict=True))
    ]
    family.driver(seed=1).run(batch)
    for one in batch:
        family.check(one)


@pytest.mark.parametrize("max_step_tokens", [10, 13, 64])
def test_scheduled_with_prefix_hits(family: Checkpoint, max_step_tokens: int) -> None:
    told, scheduler = run_scheduled(
        family.engine(max_batch_size=4), PROMPTS, max_step_tokens=max_step_tokens
    )
    assert scheduler.num_prefix_hit_tokens > 0
    for one in told:
        family.check(one)


def test_after_preemption(family: Checkpoint) -> None:
    """The pool holds one sequence of full length, and ten want to run."""
    engine = family.engine(max_batch_total_tokens=64)
    told, scheduler = run_scheduled(engine, PROMPTS, max_step_tokens=32)
    assert scheduler.num_preemptions > 0
    for one in told:
        family.check(one)


@pytest.mark.parametrize("chunk_size", [6, 1000])
def test_prompt_logprobs(family: Checkpoint, chunk_size: int) -> None:
    scored = Driven(0, LONG, NUM_TOKENS, chunk_size, wants_prompt_logprobs=True)
    family.driver().run([scored, a_sequence(1, 5)])
    found = [scored.prompt_logprobs[position] for position in range(1, len(LONG))]
    expected = prompt_logprob_oracle(family.oracle, LONG)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("num_shards", [2, 3, 4])
def test_shards(family: Checkpoint, num_shards: int) -> None:
    """Slopes by global head, biases added once, shared keys and values on every shard."""
    config = family.oracle.config
    inner_size = getattr(config, "ffn_dim", None) or getattr(config, "intermediate_size", None)
    inner_size = inner_size or getattr(config, "n_inner", None) or 4 * config.hidden_size
    if config.num_attention_heads % num_shards or inner_size % num_shards:
        with pytest.raises(FleetError, match="must be divisible by the number of shards"):
            family.engine(num_shards=num_shards)
        return
    engine = family.engine(num_shards=num_shards)
    told, _ = run_scheduled(engine, PROMPTS[:6], max_step_tokens=13)
    engine.close()
    for one in told:
        family.check(one)


def test_bfloat16_follows_the_oracle(family: Checkpoint) -> None:
    """Close, as the oracle in bfloat16 is close to itself in float32."""
    scored = Driven(0, LONG, NUM_TOKENS, 1000, wants_prompt_logprobs=True)
    family.driver(dtype="bfloat16").run([scored])
    found = torch.tensor([scored.prompt_logprobs[position] for position in range(1, len(LONG))])
    expected = torch.tensor(prompt_logprob_oracle(family.oracle, LONG))
    rounded = copy.deepcopy(family.oracle).to(torch.bfloat16)
    reference = torch.tensor(prompt_logprob_oracle(rounded, LONG))
    assert (found - expected).abs().mean() < 2 * (reference - expected).abs().mean() + 1e-3


@pytest.mark.parametrize("name", ["bloom-6-heads", "neox", "opt", "bigcode", "gpt2"])
def test_files_that_leave_the_first_part_of_names_out(name: str, tmp_path: Path) -> None:
    def shorten(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        first = next(name for name in tensors if "layers." in name or "h." in name).split(".")[0]
        short = {name.removeprefix(f"{first}."): tensor for name, tensor in tensors.items()}
        save_file(short, folder / "model.safetensors")

    checkpoint = Checkpoint(tmp_path, FAMILIES[name], rewrite=shorten)
    one = a_sequence(0, 16)
    checkpoint.driver().run([one])
    checkpoint.check(one)


def test_a_head_by_its_newer_name(tmp_path: Path) -> None:
    def rename(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        renamed = {name.replace("embed_out", "lm_head"): value for name, value in tensors.items()}
        assert "lm_head.weight" in renamed
        save_file(renamed, folder / "model.safetensors")

    checkpoint = Checkpoint(tmp_path, FAMILIES["neox"], rewrite=rename)
    one = a_sequence(0, 16)
    checkpoint.driver().run([one])
    checkpoint.check(one)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (gpt2(add_cross_attention=True), "`add_cross_attention` must be false"),
        (neox(rope_parameters=rope(0.2)), "an even number of features. Given: 0.2 of 16"),
        (opt(activation_function="tanh"), "activation must be one of"),
    ],
    ids=["cross-attention", "odd-rotary", "activation"],
)
def test_what_is_not_computed_is_refused(config: object, message: str, tmp_path: Path) -> None:
    names = {"gpt2": "GPT2LMHeadModel", "opt": "OPTForCausalLM", "gpt_neox": "GPTNeoXForCausalLM"}
    config.architectures = [names[config.model_type]]
    config.save_pretrained(tmp_path)
    with pytest.raises(FleetError, match=message):
        build_engine(WorkerSettings(model_id=str(tmp_path), device="cpu"))
