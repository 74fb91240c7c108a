"""What T5's files say: two generations of config.json, three names of one tensor, a tokenizer that
ends its input."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from worker.layers.bucketed_bias import bucket
from worker.layers.build import Build
from worker.models.config import ConfigError
from worker.models.t5 import T5Model
from worker.weights.files import ModelFolder
from worker.weights.loader import load_weights
from worker.weights.matching import WeightError
from worker.weights.tokenizer_files import read_tokenizer_files

# What matters of t5-small's config.json.
T5_SMALL = {
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 2048,
    "d_kv": 64,
    "d_model": 512,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
    "n_positions": 512,
    "num_heads": 8,
    "num_layers": 6,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "vocab_size": 32128,
}
FLAN = T5_SMALL | {
    "feed_forward_proj": "gated-gelu",
    "num_decoder_layers": 8,
    "tie_word_embeddings": False,
}
MT0 = FLAN | {"architectures": ["MT5ForConditionalGeneration"], "tie_word_embeddings": True}


def read(hf: dict) -> object:
    return T5Model.read_config(hf)


def test_the_original_has_a_plain_mlp_and_scales_its_output() -> None:
    config = read(T5_SMALL)
    assert (config.activation, config.is_gated) == ("relu", False)
    assert config.has_scaled_output
    assert (config.num_encoder_layers, config.num_layers) == (6, 6)
    assert (config.num_kv_heads, config.windows, config.eos_tokens) == (8, (None,) * 6, (1,))


def test_later_ones_are_gated_and_do_not_scale() -> None:
    config = read(FLAN)
    assert (config.activation, config.is_gated) == ("gelu_new", True)
    assert not config.has_scaled_output
    assert (config.num_encoder_layers, config.num_layers) == (6, 8)
    assert not read(MT0).has_scaled_output, "mT5 never does"
    assert read(MT0 | {"feed_forward_proj": "gated-silu"}).activation == "silu"


@pytest.mark.parametrize("is_scaled", [True, False])
def test_transformers_5_tells_the_scale_apart_from_the_tie(tmp_path: Path, is_scaled: bool) -> None:
    sizes = {key: FLAN[key] for key in ("d_ff", "d_kv", "d_model", "num_heads", "num_layers")}
    transformers.T5Config(**sizes, tie_word_embeddings=is_scaled).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["tie_word_embeddings"] is True
    assert read(saved).has_scaled_output is is_scaled


def test_what_is_missing_or_unknown_is_named() -> None:
    with pytest.raises(ConfigError, match="no 'd_kv'"):
        read({key: value for key, value in T5_SMALL.items() if key != "d_kv"})
    with pytest.raises(ConfigError, match="feed_forward_proj must be"):
        read(T5_SMALL | {"feed_forward_proj": "twice-gelu"})
    assert read(T5_SMALL | {"decoder_start_token_id": None}).decoder_start_token == 0


@pytest.mark.parametrize("is_bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (12, 20), (8, 9)])
def test_buckets_are_transformers_own(
    is_bidirectional: bool, num_buckets: int, max_distance: int
) -> None:
    distance = torch.arange(-200, 201)
    theirs = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket(
        -distance,
        bidirectional=is_bidirectional,
        num_buckets=num_buckets,
        max_distance=max_distance,
    )
    ours = bucket(distance, num_buckets, max_distance, is_bidirectional=is_bidirectional)
    assert torch.equal(ours, theirs)


TINY = T5_SMALL | {"d_ff": 4, "d_kv": 2, "d_model": 6, "num_heads": 2, "num_layers": 1}
TINY["vocab_size"] = 9


def tiny_tensors(folder: Path) -> dict[str, torch.Tensor]:
    config = transformers.T5Config(**{k: v for k, v in TINY.items() if k != "architectures"})
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def load(folder: Path, tensors: dict[str, torch.Tensor]) -> T5Model:
    path = folder / "changed.safetensors"
    save_file(tensors, path)
    config = read(TINY)
    model = T5Model(config, Build(dtype=torch.float32))
    load_weights(model, T5Model.weight_names(config), [path], torch.device("cpu"))
    return model


def test_the_embedding_by_any_of_its_names(tmp_path: Path) -> None:
    tensors = tiny_tensors(tmp_path)
    expected = tensors.pop("shared.weight")
    assert "lm_head.weight" not in tensors
    with pytest.raises(WeightError, match="missing: shared.weight"):
        load(tmp_path, tensors)
    names = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    for present in ([names[1]], [names[2]], names):
        model = load(tmp_path, tensors | {name: expected.clone() for name in present})
        assert torch.equal(model.embedding.weight, expected)


def test_a_bias_that_old_files_carry_is_left_out(tmp_path: Path) -> None:
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    load(tmp_path, tiny_tensors(tmp_path) | {name: torch.zeros(32, 2)})


def test_a_head_of_its_own_is_used(tmp_path: Path) -> None:
    head = torch.randn(9, 6)
    model = load(tmp_path, tiny_tensors(tmp_path) | {"lm_head.weight": head})
    hidden = torch.randn(1, 6)
    torch.testing.assert_close(model.logits(hidden), hidden @ head.T)


def test_the_tokenizer_ends_an_input(tmp_path: Path) -> None:
    """Inputs without `</s>` are another task to these models."""
    words = ["<pad>", "</s>", "<unk>", "▁", "▁hello", "▁world"]
    vocabulary = [(word, -float(score)) for score, word in enumerate(words)]
    transformers.T5Tokenizer(vocab=vocabulary, extra_ids=2).save_pretrained(tmp_path)
    files = read_tokenizer_files(ModelFolder(tmp_path))
    assert files.eos_token == "</s>"
    encoded = Tokenizer.from_str(files.tokenizer_json).encode("hello world")
    assert encoded.tokens == ["▁hello", "▁world", "</s>"]
