"""A block in few calls computes what its layers compute one by one, to the last bit."""

from pathlib import Path

import pytest
import torch
import transformers

from tests.checkpoints import VOCAB_SIZE, Driven
from tests.parity import Checkpoint, a_sequence
from worker.kernels.cpu import products
from worker.kernels.cpu.gated_block import GatedBlock
from worker.kernels.cpu.gated_decoder import GatedDecoder
from worker.models.llama import Block

SIZES = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=96,
    intermediate_size=112,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
MODELS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "biases": transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "panels": transformers.LlamaConfig(**SIZES | {"intermediate_size": 128}, mlp_bias=True),
    "window": transformers.MistralConfig(**SIZES, sliding_window=11),
    "window in some layers": transformers.Qwen2Config(
        **SIZES, sliding_window=11, use_sliding_window=True, max_window_layers=1
    ),
    "norms of heads": transformers.Qwen3Config(**SIZES),
}

pytestmark = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="needs a processor with AVX512-BF16"
)


@pytest.fixture(autouse=True)
def products_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where AMX is, and oneDNN's products would be chosen."""
    monkeypatch.setattr(products, "_is_ours", lambda: True)


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    return Checkpoint(tmp_path_factory.mktemp(request.param), MODELS[request.param])


def batch_of(checkpoint: Checkpoint, threads: int) -> list[Driven]:
    batch = [
        a_sequence(0, 23),
        a_sequence(5, 37, chunk_size=7),
        a_sequence(2, 5, chunk_size=4),
        a_sequence(7, 1),
    ]
    checkpoint.driver(seed=1, dtype="bfloat16", threads=threads).run(batch)
    return batch


@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits(checkpoint: Checkpoint, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[object] = []
    compiled = Block.compiled.func
    monkeypatch.setattr(
        Block, "compiled", property(lambda self: built.append(compiled(self)) or built[-1])
    )
    num_rows: list[int] = []
    decode = GatedDecoder.__call__

    def decode_noted(self: GatedDecoder, x: torch.Tensor, *inputs: object) -> torch.Tensor:
        num_rows.append(len(x))
        return decode(self, x, *inputs)

    monkeypatch.setattr(GatedDecoder, "__call__", decode_noted)
    ours = batch_of(checkpoint, threads)
    assert built and all(isinstance(block, GatedBlock) for block in built)
    assert max(num_rows) > 1, "no step of several sequences ran in one call"
    monkeypatch.setattr(Block, "compiled", None)
    for one, other in zip(ours, batch_of(checkpoint, threads), strict=True):
        assert one.tokens == other.tokens
        assert one.logprobs == other.logprobs


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(**SIZES, hidden_act="gelu"),
        transformers.LlamaConfig(**SIZES | {"head_dim": 16}),
    ],
    ids=["another activation", "small heads"],
)
def test_other_blocks_go_layer_by_layer(
    config: transformers.PretrainedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, found = Block.compiled.func, []
    monkeypatch.setattr(
        Block, "compiled", property(lambda self: found.append(compiled(self)) or found[-1])
    )
    one = a_sequence(0, 9)
    Checkpoint(tmp_path, config).driver(dtype="bfloat16").run([one])
    assert set(found) == {None} and one.is_done
