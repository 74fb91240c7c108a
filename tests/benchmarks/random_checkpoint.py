"""Writes llama-shaped checkpoints of any size, with random weights, as a stream: no more memory than
one block.

The same random block fills all tensors, which costs a disk as much as any other bytes.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.checkpoints import save_tokenizer

FILE_BYTES = 2 * 2**30  # of one file, about; what the hub's tools write is of this order
BLOCK_VALUES = 8 * 2**20
STD = 0.02


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """Sizes as in Llama 2 7B, with grouped queries; the number of layers makes the total."""

    hidden_size: int = 4096
    intermediate_size: int = 11_008
    num_heads: int = 32
    num_kv_heads: int = 8
    vocab_size: int = 32_000

    @property
    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "eos_token_id": 2,
        }

    @property
    def layer(self) -> dict[str, tuple[int, ...]]:
        """The tensors of one layer."""
        hidden, inner = self.hidden_size, self.intermediate_size
        kv_size = hidden // self.num_heads * self.num_kv_heads
        return {
            "input_layernorm.weight": (hidden,),
            "mlp.down_proj.weight": (hidden, inner),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.k_proj.weight": (kv_size, hidden),
            "self_attn.o_proj.weight": (hidden, hidden),
            "self_attn.q_proj.weight": (hidden, hidden),
            "self_attn.v_proj.weight": (kv_size, hidden),
        }

    @property
    def others(self) -> dict[str, tuple[int, ...]]:
        matrix = (self.vocab_size, self.hidden_size)
        norm = {"model.norm.weight": (self.hidden_size,)}
        return {"lm_head.weight": matrix, "model.embed_tokens.weight": matrix} | norm


def write_checkpoint(
    folder: Path, num_bytes: int, shape: LlamaShape = LlamaShape(), *, file_bytes: int = FILE_BYTES
) -> int:
    """Fill `folder` with a bfloat16 model of at least `num_bytes`; its size in bytes. Afterwards
    the files are on the disk, so that their pages can be dropped from memory."""
    num_layers = math.ceil(max(1, num_bytes - _size(shape.others)) / _size(shape.layer))
    config = shape.config | {"num_hidden_layers": num_layers}
    (folder / "config.json").write_text(json.dumps(config))
    save_tokenizer(folder)
    groups = [shape.others] + [
        {f"model.layers.{layer}.{name}": size for name, size in shape.layer.items()}
        for layer in range(num_layers)
    ]
    block = torch.empty(BLOCK_VALUES).normal_(std=STD).bfloat16().view(torch.uint8).numpy()
    files = list(_packed(groups, file_bytes))
    weight_map = {}
    for number, tensors in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        _write_file(folder / name, tensors, memoryview(block))
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(map(_size, groups))


def _packed(
    groups: list[dict[str, tuple[int, ...]]], file_bytes: int
) -> Iterator[dict[str, tuple[int, ...]]]:
    """Groups together, until a file is full."""
    tensors: dict[str, tuple[int, ...]] = {}
    for group in groups:
        if tensors and _size(tensors) + _size(group) > file_bytes:
            yield tensors
            tensors = {}
        tensors |= group
    yield tensors


def _write_file(file: Path, tensors: dict[str, tuple[int, ...]], block: memoryview) -> None:
    header, end = {}, 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        while end > 0:
            end -= stream.write(block[: min(end, len(block))])
        stream.flush()
        os.fsync(stream.fileno())


def _size(tensors: dict[str, tuple[int, ...]]) -> int:
    return sum(2 * math.prod(shape) for shape in tensors.values())
