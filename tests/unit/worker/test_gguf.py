"""GGUF conversion: tensors, tokenizer and configuration of a file that is written here."""

import json

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from worker.settings import WorkerSettings
from worker.weights.files import ModelFilesError
from worker.weights.gguf import (
    byte_level_tokenizer,
    convert_gguf,
    llama_config,
    tensor_name,
    unpermute,
)
from worker.weights.prepare import prepare_model

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS = 64, 4, 2, 96, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
QUANTIZED = {"attn_q": gguf.GGMLQuantizationType.Q4_1, "ffn_down": gguf.GGMLQuantizationType.Q8_0}


def trained_tokenizer() -> Tokenizer:
    """A real byte-level BPE with single digits, as SmolLM2 has one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(text, normalized=False) for text in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the river, the rain   and 12345 rivers don't rain\n\n"] * 9, trainer
    )
    return tokenizer


ORACLE = trained_tokenizer()


def tokenizer_fields(**changes):
    model = json.loads(ORACLE.to_str())["model"]
    texts = sorted(model["vocab"], key=model["vocab"].get)
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [3 if text in SPECIAL else 1 for text in texts],
        "tokenizer.ggml.merges": [
            merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]
        ],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return fields | changes


def permute(weights, num_heads):
    """What llama.cpp does to q and k: of each head, row i comes to 2i.

    And row d/2 + i to 2i + 1.
    """
    permuted = np.empty_like(weights)
    size = len(weights) // num_heads
    for head in range(num_heads):
        rows = slice(head * size, (head + 1) * size)
        permuted[rows][0::2] = weights[rows][: size // 2]
        permuted[rows][1::2] = weights[rows][size // 2 :]
    return permuted


def write_gguf(path, weights, *, architecture="llama"):
    """A GGUF file of these Hugging Face tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    fields = tokenizer_fields()
    writer.add_tokenizer_model(fields["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(fields["tokenizer.ggml.pre"])
    writer.add_token_list(fields["tokenizer.ggml.tokens"])
    writer.add_token_types(fields["tokenizer.ggml.token_type"])
    writer.add_token_merges(fields["tokenizer.ggml.merges"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, values in weights.items():
        part = name.split(".")[-2]
        if part in ("attn_q", "attn_k"):
            values = permute(values, HEADS if part == "attn_q" else KV_HEADS)
        kind = QUANTIZED.get(part)
        if kind is None:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_weights():
    generator = np.random.default_rng(5)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {"token_embd": (ORACLE.get_vocab_size(), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.{name}": shape
            for name, shape in {
                "attn_norm": (HIDDEN,),
                "attn_q": (HIDDEN, HIDDEN),
                "attn_k": (kv, HIDDEN),
                "attn_v": (kv, HIDDEN),
                "attn_output": (HIDDEN, HIDDEN),
                "ffn_norm": (HIDDEN,),
                "ffn_gate": (FFN, HIDDEN),
                "ffn_up": (FFN, HIDDEN),
                "ffn_down": (HIDDEN, FFN),
            }.items()
        }
    return {
        f"{name}.weight": generator.normal(size=s).astype(np.float32) for name, s in shapes.items()
    }


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The weights, and the folder made of them."""
    folder = tmp_path_factory.mktemp("gguf")
    weights = random_weights()
    write_gguf(folder / "tiny.gguf", weights)
    fractions = []
    (folder / "model").mkdir()
    convert_gguf(folder / "tiny.gguf", folder / "model", on_progress=fractions.append)
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    return weights, folder / "model"


def test_tensors_arrive_in_the_order_of_transformers(converted):
    weights, folder = converted
    tensors = load_file(folder / "model.safetensors")
    assert len(tensors) == len(weights)
    for name, values in weights.items():
        found = tensors[tensor_name(name)]
        assert found.dtype == torch.bfloat16
        kind = QUANTIZED.get(name.split(".")[-2])
        if kind is not None:  # each row is quantised by itself, so the permutation does not matter
            values = gguf.dequantize(gguf.quantize(values, kind), kind)
        assert found.equal(torch.from_numpy(values).to(torch.bfloat16)), name


def test_folder_is_one_that_transformers_loads(converted):
    _, folder = converted
    config = AutoConfig.from_pretrained(folder)
    assert config.rms_norm_eps == 1e-5
    assert config.rope_parameters["rope_theta"] == 100000.0
    assert config.tie_word_embeddings
    assert (config.num_key_value_heads, config.head_dim) == (KV_HEADS, HIDDEN // HEADS)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert model.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("the 12 rivers").input_ids == ORACLE.encode("the 12 rivers").ids
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    )


@given(st.text() | st.text("the rivan12 \n'<|>_").map(lambda text: f"{text}<|im_end|>  1"))
def test_tokenizer_is_the_one_that_was_written(text):
    tokenizer = byte_level_tokenizer(tokenizer_fields())
    assert tokenizer.encode(text).ids == ORACLE.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_a_file_may_ask_for_a_first_token():
    tokenizer = byte_level_tokenizer(tokenizer_fields(**{"tokenizer.ggml.add_bos_token": True}))
    assert tokenizer.encode("rain").ids == [1, *ORACLE.encode("rain").ids]
    assert tokenizer.encode("rain", add_special_tokens=False).ids == ORACLE.encode("rain").ids


def test_unpermute_undoes_what_llama_cpp_did():
    weights = np.arange(32 * 3, dtype=np.float32).reshape(32, 3)
    assert np.array_equal(unpermute(permute(weights, 4), 4), weights)
    assert not np.array_equal(permute(weights, 4), weights)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"general.architecture": "bloom"}, "architecture 'bloom'"),
        (
            {"general.architecture": "llama", "llama.rope.scaling.type": "yarn"},
            "rope scaling 'yarn'",
        ),
    ],
)
def test_unknown_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        llama_config(fields, is_tied=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, "'llama' tokenizer"),
        ({"tokenizer.ggml.pre": "qwen2"}, "pre-tokenizer 'qwen2'"),
    ],
)
def test_unknown_tokenizers_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        byte_level_tokenizer(tokenizer_fields(**fields))


@pytest.mark.parametrize(
    "name", ["rope_freqs.weight", "blk.0.attn_q.bias", "blk.0.ffn_gate_exps.weight"]
)
def test_unknown_tensors_are_refused(name):
    with pytest.raises(ValueError, match=name):
        tensor_name(name)


def test_file_as_a_model_is_converted_once(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", random_weights())
    first = prepare_model(str(tmp_path / "tiny.gguf"), cache_dir=str(tmp_path / "cache"))
    assert first.path.is_relative_to(tmp_path / "cache") and first.path.name.startswith("tiny-")
    (weights,) = first.weight_files()
    written_at = weights.stat().st_mtime_ns
    assert prepare_model(str(tmp_path / "tiny.gguf"), cache_dir=str(tmp_path / "cache")) == first
    assert weights.stat().st_mtime_ns == written_at
    assert first.config()["architectures"] == ["LlamaForCausalLM"]
    changed = {name: values * 2 for name, values in random_weights().items()}
    write_gguf(tmp_path / "tiny.gguf", changed)
    second = prepare_model(str(tmp_path / "tiny.gguf"), cache_dir=str(tmp_path / "cache"))
    assert second.path != first.path


def test_file_that_cannot_be_used_is_one_sentence_and_leaves_nothing(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"no model")
    write_gguf(tmp_path / "foreign.gguf", random_weights(), architecture="bloom")
    for name, reason in (("broken", "broken.gguf cannot be used"), ("foreign", "'bloom'")):
        with pytest.raises(ModelFilesError, match=reason):
            prepare_model(str(tmp_path / f"{name}.gguf"), cache_dir=str(tmp_path / "cache"))
    left = (tmp_path / "cache/tokenfleet").iterdir()
    assert [path.name for path in left if path.suffix != ".lock"] == []


def test_name_of_a_file_as_a_model(tmp_path):
    (tmp_path / "Tiny-1B.Q4.gguf").touch()
    assert WorkerSettings(model_id=str(tmp_path / "Tiny-1B.Q4.gguf")).model_name == "Tiny-1B.Q4"
    assert WorkerSettings(model_id=str(tmp_path)).model_name == tmp_path.name
    assert WorkerSettings(model_id="owner/name").model_name == "owner/name"
