"""Models that we have no code for compute what transformers computes, on either path: tokens
exactly, log-probabilities to 1e-4, in float32. And a path that computes something else is refused."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicLayer

from common.errors import FleetError
from tests.checkpoints import (
    INITIAL_STD,
    VOCAB_SIZE,
    Driver,
    prompt_logprob_oracle,
    random_prompt,
    save_tokenizer,
)
from tests.parity import NUM_TOKENS, TOLERANCE, Checkpoint, a_sequence, run_scheduled
from worker.engine import padded_runner
from worker.engine.engine import build_engine
from worker.engine.loaded import LoadedModel
from worker.models import auto_paged
from worker.parallel.group import Shard
from worker.settings import WorkerSettings

TOKENS = dict(vocab_size=VOCAB_SIZE, bos_token_id=1, eos_token_id=2, pad_token_id=0)
SIZES = TOKENS | dict(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=256,
    tie_word_embeddings=False,
)
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=1e4,
    short_factor=[1.0] * 4,
    long_factor=[2.0] * 4,
)


def phi3(**changes: object) -> transformers.PretrainedConfig:
    return transformers.Phi3Config(**SIZES | changes)


PAGED = {
    "phi3-window": phi3(sliding_window=11),
    "phi3-longrope-short": phi3(rope_parameters=LONGROPE, original_max_position_embeddings=64),
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=16, sliding_window=11),
    "starcoder2": transformers.Starcoder2Config(**SIZES),
    "olmo2": transformers.Olmo2Config(**SIZES),
    "granite": transformers.GraniteConfig(**SIZES, logits_scaling=3.0, attention_multiplier=0.5),
    "gpt-oss": transformers.GptOssConfig(
        **SIZES, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=11
    ),
}
PADDED = {
    "falcon-alibi": transformers.FalconConfig(
        **TOKENS, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, alibi=True
    ),
    "mpt": transformers.MptConfig(**TOKENS, d_model=48, n_heads=6, n_layers=2, max_seq_len=128),
    "codegen": transformers.CodeGenConfig(
        **TOKENS, n_embd=48, n_head=4, n_layer=2, n_positions=128, rotary_dim=4
    ),
    "stablelm": transformers.StableLmConfig(**SIZES),
    "mamba": transformers.MambaConfig(
        **TOKENS, hidden_size=48, num_hidden_layers=2, state_size=4, tie_word_embeddings=False
    ),
    "deepseek-v3": transformers.DeepseekV3Config(
        **SIZES | dict(num_key_value_heads=6),
        **dict(n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2),
        **dict(kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, v_head_dim=8),
        qk_nope_head_dim=8,
    ),
    "phi3-longrope": phi3(rope_parameters=LONGROPE, original_max_position_embeddings=30),
}
PROMPTS = [random_prompt(length, seed=length) for length in (23, 37, 5, 1, 21)]


def settings_of(folder: Path, **settings: object) -> WorkerSettings:
    values = dict(model_id=str(folder), device="cpu", dtype="float32", threads=1)
    values |= dict(block_size=4, max_total_tokens=64, max_batch_size=8) | settings
    return WorkerSettings(**values)


def load(folder: Path, **settings: object) -> LoadedModel:
    return build_engine(settings_of(folder, **settings))


def make(path: pytest.TempPathFactory, name: str) -> Checkpoint:
    made = Checkpoint(path.mktemp(name), (PAGED | PADDED)[name], seed=len(name))
    if name == "phi3-longrope":  # some versions of `generate` keep a stale cache at the switch
        made.oracle.generation_config.use_cache = False
    return made


@pytest.fixture(scope="module", params=[*PAGED, *PADDED])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    return make(tmp_path_factory, request.param)


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make(tmp_path_factory, "gemma2")


def test_mixed_batch_in_chunks(
    checkpoint: Checkpoint, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    name = request.node.callspec.params["checkpoint"]
    with caplog.at_level(logging.WARNING, logger="worker.engine.fallback"):
        loaded = load(checkpoint.folder)
    is_paged = name in PAGED
    assert loaded.served_by == ("transformers" if is_paged else "transformers-padded")
    assert loaded.has_paged_cache == is_paged
    assert ("paged cache because" in caplog.text) == (not is_paged)
    batch = [
        a_sequence(0, 23, wants_prompt_logprobs=True),
        a_sequence(5, 37, chunk_size=7),
        a_sequence(2, 5, chunk_size=4),
        a_sequence(7, 1),
    ]
    driver = Driver(loaded.engine)
    driver.run(batch)
    for one in batch:
        checkpoint.check(one)
    expected = prompt_logprob_oracle(checkpoint.oracle, batch[0].prompt)
    found = [batch[0].prompt_logprobs[position] for position in range(1, 23)]
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    alone = a_sequence(5, 23)
    driver.run([alone])
    checkpoint.check(alone)


def test_through_the_scheduler_with_preemption(checkpoint: Checkpoint) -> None:
    loaded = load(checkpoint.folder, max_batch_total_tokens=96)
    told, scheduler = run_scheduled(
        loaded.engine, PROMPTS, max_step_tokens=16, prefix_caching=loaded.has_paged_cache
    )
    assert scheduler.num_preemptions > 0
    for one in told:
        checkpoint.check(one)


def test_shared_prefixes(gemma2: Checkpoint) -> None:
    common = random_prompt(17, seed=3)
    prompts = [common + random_prompt(length, seed=length) for length in (3, 9, 6)]
    told, scheduler = run_scheduled(gemma2.engine(), prompts, max_step_tokens=22)
    assert scheduler.num_prefix_hit_tokens > 0
    for one in told:
        gemma2.check(one)


BROKEN = {
    "scale": dict(scaling=0.3),
    "softcap": dict(softcap=None),
    "window": dict(sliding_window=None),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_attention_is_found_out(
    gemma2: Checkpoint,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An attention that ignores what a layer asks for loses the path, not the answers."""
    honest = auto_paged.attend

    def attend(*args: object, **values: object) -> object:
        return honest(*args, **values | BROKEN[what])

    monkeypatch.setattr(auto_paged, "attend", attend)
    loaded = load(gemma2.folder)
    assert loaded.served_by == "transformers-padded"
    reason = "windows" if what == "window" else "its logits differ from its own"
    assert reason in caplog.text
    told, _ = run_scheduled(loaded.engine, PROMPTS[:1], max_step_tokens=64, prefix_caching=False)
    gemma2.check(told[0])


def test_broken_cache_of_a_model_is_refused(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgetful = make(tmp_path_factory, "codegen")
    update = DynamicLayer.update

    def forget(self: DynamicLayer, *args: object, **values: object) -> object:
        keys, rest = update(self, *args, **values)
        return keys, rest.flip(-1)

    monkeypatch.setattr(DynamicLayer, "update", forget)
    with pytest.raises(FleetError, match="cannot decode CodeGenForCausalLM: with a cache"):
        load(forgetful.folder)


def test_broken_batches_are_found_out(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Sequences that would see their padding run alone instead."""
    falcon = make(tmp_path_factory, "falcon-alibi")
    assert load(falcon.folder).engine._runner.is_batching

    def padding_mask(lengths: list[int], device: torch.device) -> torch.Tensor:
        return torch.ones(len(lengths), max(lengths), dtype=torch.int64, device=device)

    monkeypatch.setattr(padded_runner, "padding_mask", padding_mask)
    loaded = load(falcon.folder)
    assert "runs each sequence alone" in caplog.text
    assert "in a padded batch its logits differ from its own" in caplog.text
    told, _ = run_scheduled(loaded.engine, PROMPTS, max_step_tokens=64, prefix_caching=False)
    for one in told:
        falcon.check(one)


class Bart:
    """An encoder-decoder checkpoint whose answers begin with a forced token."""

    START, FIRST, NEVER = 2, 5, 9

    def __init__(self, folder: Path) -> None:
        config = transformers.BartConfig(
            **TOKENS,
            d_model=48,
            encoder_layers=2,
            decoder_layers=3,
            encoder_attention_heads=6,
            decoder_attention_heads=4,
            encoder_ffn_dim=80,
            decoder_ffn_dim=80,
            max_position_embeddings=64,
            decoder_start_token_id=self.START,
            forced_eos_token_id=None,
        )
        torch.manual_seed(3)
        self.oracle = transformers.BartForConditionalGeneration._from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        with torch.no_grad():
            for parameter in self.oracle.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=INITIAL_STD)
        values = dict(decoder_start_token_id=self.START, forced_bos_token_id=self.FIRST)
        values |= dict(bad_words_ids=[[self.NEVER]], eos_token_id=2, pad_token_id=0)
        self.oracle.generation_config = transformers.GenerationConfig(**values)
        self.oracle.save_pretrained(folder)
        save_tokenizer(folder)

    def answer(self, prompt: tuple[int, ...]) -> tuple[list[int], list[float]]:
        out = self.oracle.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            output_scores=True,
            return_dict_in_generate=True,
        )
        tokens = out.sequences[0, 1:].tolist()
        rows = zip(out.scores, tokens, strict=True)
        return tokens, [step[0].log_softmax(-1)[token].item() for step, token in rows]


@pytest.mark.parametrize("max_step_tokens", [16, 64])
def test_encoder_decoder(tmp_path: Path, max_step_tokens: int) -> None:
    bart = Bart(tmp_path)
    loaded = load(tmp_path, max_batch_total_tokens=68)
    assert (loaded.served_by, loaded.decoder_start_token) == ("transformers-padded", bart.START)
    for prompts in ([PROMPTS[1]], PROMPTS):
        told, scheduler = run_scheduled(
            loaded.engine,
            prompts,
            max_step_tokens=max_step_tokens,
            prefix_caching=loaded.has_paged_cache,
            decoder_start_token=loaded.decoder_start_token,
        )
        for one in told:
            tokens, logprobs = bart.answer(one.prompt)
            assert one.tokens == tokens and tokens[0] == bart.FIRST
            torch.testing.assert_close(one.logprobs, logprobs, atol=TOLERANCE, rtol=0)
    assert scheduler.num_preemptions > 0


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def plain(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path, PAGED["starcoder2"])


def test_shards_are_refused(plain: Checkpoint) -> None:
    with pytest.raises(FleetError, match="`num_shard` must be 1 for a model that transformers"):
        build_engine(settings_of(plain.folder), Shard(rank=0, size=2))


def test_quantization_is_refused(plain: Checkpoint) -> None:
    with pytest.raises(FleetError, match="`quantize` must be left out.*Given: int8"):
        load(plain.folder, quantize="int8")


def test_a_model_that_generates_no_text_is_refused(plain: Checkpoint) -> None:
    change_config(plain.folder, architectures=["BertForMaskedLM"], model_type="bert")
    with pytest.raises(FleetError, match="must name a model that generates text.*BertForMaskedLM"):
        load(plain.folder)


def test_missing_tensors_are_refused(plain: Checkpoint) -> None:
    change_config(plain.folder, num_hidden_layers=3)
    with pytest.raises(FleetError, match="the weight files lack .* tensors that Starcoder2"):
        load(plain.folder)


def test_a_model_without_longest_sequence_needs_one(tmp_path: Path) -> None:
    Checkpoint(tmp_path, PADDED["mamba"])
    with pytest.raises(FleetError, match="MambaForCausalLM names no longest sequence"):
        load(tmp_path, max_total_tokens=None)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class WeaverConfig(LlamaConfig):
    model_type = "weaver"

class WeaverForCausalLM(LlamaForCausalLM):
    config_class = WeaverConfig
"""


@pytest.fixture
def with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Checkpoint]:
    """A checkpoint with code of its own."""
    modules = tmp_path / "modules"
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(str(modules))
    folder = tmp_path / "weaver"
    folder.mkdir()
    yield Checkpoint(folder, transformers.LlamaConfig(**SIZES), rewrite=_add_code)


def _add_code(folder: Path) -> None:
    (folder / "weaver.py").write_text(CODE)
    classes = {"AutoConfig": "WeaverConfig", "AutoModelForCausalLM": "WeaverForCausalLM"}
    auto_map = {auto: f"weaver.{name}" for auto, name in classes.items()}
    names = dict(architectures=["WeaverForCausalLM"], model_type="weaver")
    change_config(folder, auto_map=auto_map, **names)


def test_code_of_a_checkpoint_runs_only_by_flag(with_code: Checkpoint) -> None:
    with pytest.raises(FleetError, match="read it, then allow it with --trust-remote-code"):
        load(with_code.folder)
    loaded = load(with_code.folder, trust_remote_code=True)
    assert (loaded.served_by, loaded.architecture) == ("transformers", "WeaverForCausalLM")
    told, _ = run_scheduled(loaded.engine, PROMPTS[:2], max_step_tokens=64)
    for one in told:
        with_code.check(one)
