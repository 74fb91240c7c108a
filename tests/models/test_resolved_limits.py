"""What an engine is built with when its model is longer than memory, or its files name odd ends."""

import json
from pathlib import Path

import pytest
import transformers

from common.errors import FleetError
from common.machine_limits import has_spare_memory
from tests.checkpoints import VOCAB_SIZE, save_checkpoint
from tests.parity import ThreadedShards
from worker.engine import resolve
from worker.engine.engine import build_engine
from worker.engine.loaded import LoadedModel
from worker.settings import WorkerSettings

SIZES = dict(vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
LONG = 1 << 16
# 2 * 2 heads * 16 features * 4 bytes are 256 bytes a token, 4 KiB a block of 16.
BLOCK_BYTES = 4096
LLAMA = transformers.LlamaConfig(
    **SIZES, intermediate_size=48, max_position_embeddings=LONG, eos_token_id=2
)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path, LLAMA)
    return tmp_path


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the free memory is 100 blocks."""
    monkeypatch.setattr(resolve, "free_memory_bytes", lambda device: 200 * BLOCK_BYTES)


def settings_for(folder: Path, **changes: object) -> WorkerSettings:
    values = dict(device="cpu", dtype="float32", threads=1, block_size=16, memory_fraction=0.5)
    return WorkerSettings(model_id=str(folder), max_batch_size=2, **values | changes)


def loaded(folder: Path, **changes: object) -> LoadedModel:
    return build_engine(settings_for(folder, **changes))


def test_length_is_what_fits(llama: Path, memory: None) -> None:
    model = loaded(llama)
    assert model.layout.num_blocks == 100 and model.max_total_tokens == 1600
    assert model.engine._tables._table.shape == (2, 100)


def test_length_that_was_asked_for_is_kept_or_refused(llama: Path, memory: None) -> None:
    assert loaded(llama, max_total_tokens=1000).max_total_tokens == 1000
    with pytest.raises(FleetError, match="must hold one sequence of 1601 tokens"):
        loaded(llama, max_total_tokens=1601)


def test_what_is_of_no_use_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "free_memory_bytes", lambda device: 31 * BLOCK_BYTES)
    with pytest.raises(FleetError, match="must hold one sequence of 256 tokens"):
        loaded(llama)
    monkeypatch.setattr(resolve, "free_memory_bytes", lambda device: 32 * BLOCK_BYTES)
    assert loaded(llama).max_total_tokens == 256
    with pytest.raises(FleetError, match="must hold one sequence of 301 tokens"):
        loaded(llama, max_input_tokens=300)


def test_length_is_what_the_given_cache_holds(llama: Path, memory: None) -> None:
    assert loaded(llama, max_batch_total_tokens=500).max_total_tokens == 496


def test_model_with_a_cache_of_its_own(tmp_path: Path, memory: None) -> None:
    config = transformers.StableLmConfig(
        **SIZES,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=LONG,
        eos_token_id=2,
    )
    save_checkpoint(tmp_path, config)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w7"}))
    model = loaded(tmp_path)
    assert model.served_by == "transformers-padded"
    assert model.layout.num_blocks == 50, "each needs two, because a batch is a copy"
    assert model.max_total_tokens == 800 and model.eos_tokens == (2, 7)


def test_encoder_decoder_keeps_a_block_for_its_second_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.T5Config(
        vocab_size=VOCAB_SIZE, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    save_checkpoint(tmp_path / "other", LLAMA)
    (tmp_path / "other/tokenizer.json").rename(tmp_path / "tokenizer.json")
    monkeypatch.setattr(resolve, "free_memory_bytes", lambda device: 200 * BLOCK_BYTES)
    model = loaded(tmp_path)
    assert model.layout.num_blocks == 100 and model.max_total_tokens == 99 * 16


def test_shards_agree(llama: Path, memory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    fitting = resolve.resolve_fitting_tokens
    monkeypatch.setattr(
        "worker.engine.engine.resolve_fitting_tokens",
        lambda *given, **named: lengths.append(fitting(*given, **named)) or lengths[-1],
    )
    ThreadedShards(settings_for(llama), 2).close()
    assert lengths == [3200, 3200], "each has half of the heads, and here all of the memory"


def test_the_tokenizer_may_name_another_end(llama: Path) -> None:
    (llama / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w7"}))
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 2000]}))
    assert loaded(llama, max_total_tokens=64).eos_tokens == (3, 7)


def test_cache_on_a_cpu_grows_only_into_spare_memory(llama: Path) -> None:
    assert loaded(llama, max_total_tokens=64).has_spare_memory is has_spare_memory
