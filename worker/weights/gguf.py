"""GGUF file to Hugging Face folder, so that everything else needs to know one format only.

For the llama architecture with a byte-level BPE tokenizer. Quantised tensors are dequantised and
stored as bfloat16: the folder is as good as the file was, and can be read by anything that reads
safetensors. What this code does not know (another architecture, rope scaling, a foreign
pre-tokenizer) is refused, never guessed.

Sources: the GGUF specification, and llama.cpp's converter for what it did to the tensors.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from worker.weights.tensor_file import header_of

_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_DIGITS_APART = frozenset(
    {"smollm", "starcoder", "refact", "codeshell"}
)  # every digit is a word of its own
_PLAIN_BYTE_LEVEL = frozenset({"gpt-2", "gpt2"})


def convert_gguf(
    source: Path, folder: Path, *, on_progress: Callable[[float], None] = lambda fraction: None
) -> None:
    """Write the configuration, weights and tokenizer of `source` into an existing folder.

    `on_progress` hears which fraction of the tensors is done. Raises ValueError for what this code
    does not know.
    """
    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = llama_config(fields, is_tied=all(t.name != "output.weight" for t in reader.tensors))
    documents = {
        "config.json": config,
        "generation_config.json": _generation_config(config),
        "tokenizer_config.json": _tokenizer_config(fields, config),
        "special_tokens_map.json": _special_tokens(fields),
    }
    tokenizer = byte_level_tokenizer(fields)
    shapes = {tensor_name(t.name): tuple(map(int, reversed(t.shape))) for t in reader.tensors}
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header_of({name: (torch.bfloat16, shape) for name, shape in shapes.items()}))
        for done, tensor in enumerate(reader.tensors, start=1):
            weights = torch.from_numpy(_as_in_transformers(tensor, config)).to(torch.bfloat16)
            assert weights.shape == shapes[tensor_name(tensor.name)]
            file.write(weights.view(torch.uint8).numpy().data)
            on_progress(done / len(reader.tensors))
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, document in documents.items():
        (folder / name).write_text(
            json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def tensor_name(name: str) -> str:
    """The name in a Hugging Face folder of a tensor in a GGUF file."""
    if name in _TENSORS:
        return _TENSORS[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in _LAYER_TENSORS:
        raise ValueError(
            f"Tensor {name!r} is not one of a plain llama model: such GGUF files are not supported."
        )
    return f"model.layers.{match[1]}.{_LAYER_TENSORS[match[2]]}.weight"


def unpermute(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a q or k projection `[heads * d, hidden]`, in the order of transformers.

    llama.cpp rotates neighbours, transformers rotates halves, so its converter had interleaved each
    head's rows:

        file   0 d/2 1 d/2+1 2 ...  ->  folder   0 1 2 ... | d/2 d/2+1 ...
    """
    num_rows, num_columns = weights.shape
    pairs = weights.reshape(num_heads, num_rows // num_heads // 2, 2, num_columns)
    return pairs.swapaxes(1, 2).reshape(num_rows, num_columns)


def _as_in_transformers(tensor: gguf.ReaderTensor, config: Mapping[str, Any]) -> np.ndarray:
    """The tensor in float32, its rows in the order of transformers."""
    weights = gguf.dequantize(tensor.data, tensor.tensor_type)
    if tensor.name.endswith("attn_q.weight"):
        weights = unpermute(weights, config["num_attention_heads"])
    elif tensor.name.endswith("attn_k.weight"):
        weights = unpermute(weights, config["num_key_value_heads"])
    return np.array(weights, dtype=np.float32)  # a copy: the file's pages are read-only


def llama_config(fields: Mapping[str, Any], *, is_tied: bool) -> dict[str, Any]:
    """`config.json` from the metadata of a GGUF file."""
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"GGUF files of the architecture {architecture!r} are not supported, only 'llama'."
        )
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(f"GGUF files with rope scaling {scaling!r} are not supported.")
    hidden_size = fields["llama.embedding_length"]
    num_heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", num_heads),
        "head_dim": fields.get("llama.attention.key_length", hidden_size // num_heads),
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": _shortest(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _shortest(fields.get("llama.rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": is_tied,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
    }


def byte_level_tokenizer(fields: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file whose tokenizer model is "gpt2": byte-level BPE."""
    kind = fields.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(
            f"GGUF files with a {kind!r} tokenizer are not supported, only byte-level BPE ('gpt2')."
        )
    texts = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocab = {text: token for token, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(fields.get("tokenizer.ggml.pre", ""))
    tokenizer.decoder = decoders.ByteLevel()
    for text, kind in zip(texts, fields["tokenizer.ggml.token_type"], strict=True):
        if kind in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED):
            is_special = kind == gguf.TokenType.CONTROL
            tokenizer.add_tokens([AddedToken(text, special=is_special, normalized=False)])
    if fields.get("tokenizer.ggml.add_bos_token", False):
        bos = fields["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{texts[bos]} $A",
            pair=f"{texts[bos]} $A $B",
            special_tokens=[(texts[bos], bos)],
        )
    return tokenizer


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """How text is cut into words: GGUF has a name for it, whose meaning is in llama.cpp."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in _DIGITS_APART:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if name in _PLAIN_BYTE_LEVEL:
        return byte_level
    known = ", ".join(sorted(_DIGITS_APART | _PLAIN_BYTE_LEVEL))
    raise ValueError(f"GGUF files with the pre-tokenizer {name!r} are not supported, only {known}.")


def _generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: config[name] for name in names if config[name] is not None}


def _special_tokens(fields: Mapping[str, Any]) -> dict[str, str]:
    """Names such as `eos_token`, with their texts."""
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    texts = fields["tokenizer.ggml.tokens"]
    keys = {name: f"tokenizer.ggml.{short}_token_id" for short, name in names.items()}
    return {name: texts[fields[key]] for name, key in keys.items() if key in fields}


def _tokenizer_config(fields: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    document = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        **_special_tokens(fields),
    }
    if "tokenizer.chat_template" in fields:
        document["chat_template"] = fields["tokenizer.chat_template"]
    return document


def _shortest(value: float) -> float:
    """A float32 of the file as people had written it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
