"""Quantized models run through the engine: less memory, finite numbers, mostly the same tokens."""

import math

import pytest
import torch
import transformers

from common.errors import FleetError
from tests import checkpoints
from tests.checkpoints import VOCAB_SIZE, Driver, random_prompt
from tests.parity import NUM_TOKENS, Checkpoint, a_sequence
from tests.tensors import tensor_bytes
from worker.engine.build import load_model
from worker.engine.engine import build_engine
from worker.layers.build import Build
from worker.models.registry import model_class
from worker.quantization.registry import QUANTIZATIONS, linear_backends
from worker.settings import WorkerSettings
from worker.weights.files import find_model
from worker.weights.loader import load_weights

SIZES = dict(vocab_size=VOCAB_SIZE, bos_token_id=1, eos_token_id=2, pad_token_id=0)
FAMILIES = {
    "llama": transformers.LlamaConfig(
        **SIZES,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    ),
    "bloom": transformers.BloomConfig(**SIZES, hidden_size=128, n_layer=2, n_head=4),
}
# Linear weights of two layers, by hand: llama has q, k, v, o and three of 256; BLOOM 12 h^2 each.
NUM_LINEAR_WEIGHTS = {
    "llama": 2 * (128 * (128 + 2 * 64 + 128) + 3 * 128 * 256),
    "bloom": 2 * 12 * 128 * 128,
}
HEAD_WEIGHTS = VOCAB_SIZE * 128
BITS = {"bitsandbytes": 8, "bitsandbytes-nf4": 4.5, "bitsandbytes-fp4": 4.5, "int8": 8}
# The share of next tokens that stay the same, at least; by chance it would be one in 199.
SAME_TOKENS = {
    "bitsandbytes": 0.85,
    "bitsandbytes-nf4": 0.3,
    "bitsandbytes-fp4": 0.15,
    "int8": 0.85,
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(family: str, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Less wide than elsewhere: a chaotic model would say something else after any rounding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "INITIAL_STD", 0.12)
        return Checkpoint(tmp_path_factory.mktemp(family), FAMILIES[family])


def next_tokens(driver: Driver, oracle_tokens: list[int], prompt: tuple[int, ...]) -> list[int]:
    """What the driver's model says after every token of the oracle's answer."""
    sequences = []
    for length in range(len(oracle_tokens)):
        sequence = a_sequence(length % 8, 1)
        sequence.prompt, sequence.num_tokens = prompt + tuple(oracle_tokens[:length]), 1
        sequences.append(sequence)
        driver.run([sequence])
        driver.free += driver.tables.pop(sequence.slot)
        assert all(math.isfinite(value) for value in sequence.logprobs)
    return [sequence.tokens[0] for sequence in sequences]


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_most_tokens_stay_the_same(checkpoint: Checkpoint, kind: str) -> None:
    driver = checkpoint.driver(quantize=kind)
    same = []
    for seed in range(3):
        prompt = random_prompt(9, seed=seed)
        tokens, _ = checkpoint.answer(prompt)
        said = next_tokens(driver, tokens, prompt)
        same += [ours == theirs for ours, theirs in zip(said, tokens, strict=True)]
    assert sum(same) / len(same) >= SAME_TOKENS[kind], kind


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_batch_runs_in_bfloat16(checkpoint: Checkpoint, kind: str) -> None:
    driver = checkpoint.driver(quantize=kind, dtype="bfloat16")
    sequences = [a_sequence(0, 23, chunk_size=7), a_sequence(1, 5), a_sequence(2, 17)]
    driver.run(sequences)
    for sequence in sequences:
        assert len(sequence.tokens) == NUM_TOKENS
        assert all(math.isfinite(value) for value in sequence.logprobs)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_memory_falls_as_documented(checkpoint: Checkpoint, family: str, kind: str) -> None:
    plain, quantized = weight_bytes(checkpoint, None), weight_bytes(checkpoint, kind)
    num_weights = NUM_LINEAR_WEIGHTS[family]
    num_weights += HEAD_WEIGHTS if QUANTIZATIONS[kind].has_head else 0
    expected = num_weights * (16 - BITS[kind]) / 8
    # Beside the weights there are one or two numbers a row, which in layers as small as these show.
    assert plain - quantized == pytest.approx(expected, rel=0.08)


def weight_bytes(checkpoint: Checkpoint, kind: str | None) -> int:
    folder = find_model(str(checkpoint.folder))
    made = model_class(folder.config()["architectures"])
    config = made.read_config(folder.config())
    linear, head = linear_backends(kind)
    before = tensor_bytes()
    model = made(config, Build(torch.bfloat16, linear_backend=linear, head_backend=head))
    load_weights(model, made.weight_names(config), folder.weight_files(), torch.device("cpu"))
    return tensor_bytes() - before


@pytest.mark.parametrize("kind", ["int8", "bitsandbytes-nf4"])
def test_two_shards_say_what_one_says(checkpoint: Checkpoint, kind: str) -> None:
    prompt = random_prompt(9, seed=1)
    tokens, _ = checkpoint.answer(prompt)
    said = next_tokens(checkpoint.driver(quantize=kind, num_shards=2), tokens, prompt)
    same = [ours == theirs for ours, theirs in zip(said, tokens, strict=True)]
    assert sum(same) / len(same) >= SAME_TOKENS[kind] - 0.1


def test_four_shards_cut_blocks_of_four_bits(checkpoint: Checkpoint, family: str) -> None:
    messages = {"llama": "use another number of shards|key-value heads"}
    message = messages.get(family, "Given: 32; use another number of shards")
    with pytest.raises(Exception, match=message):
        checkpoint.driver(quantize="bitsandbytes-nf4", num_shards=4)


def test_the_model_tells_its_quantization(checkpoint: Checkpoint) -> None:
    values = dict(model_id=str(checkpoint.folder), device="cpu", threads=1, max_total_tokens=64)
    assert build_engine(WorkerSettings(**values, quantize="int8")).quantization == "int8"
    assert build_engine(WorkerSettings(**values)).quantization == ""


def test_the_echo_model_has_nothing_to_quantize() -> None:
    with pytest.raises(FleetError, match="`quantize` must be absent with the echo model"):
        load_model(WorkerSettings(model_id="echo", quantize="int8"))
