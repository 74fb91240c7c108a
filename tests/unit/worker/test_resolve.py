"""What settings leave open: threads, the longest sequence, and the tokens that end a text."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models

from worker.engine import resolve
from worker.engine.plan import KvCacheLayout
from worker.engine.resolve import (
    resolve_eos_tokens,
    resolve_fitting_tokens,
    resolve_max_total_tokens,
    resolve_min_total_tokens,
    set_threads,
)
from worker.models.config import ConfigError, ModelConfig
from worker.parallel.group import Shard
from worker.settings import WorkerSettings
from worker.weights.files import ModelFolder
from worker.weights.tokenizer_files import read_tokenizer_files

HF = dict(
    architectures=["LlamaForCausalLM"],
    vocab_size=10,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=4096,
)


def settings(**given: object) -> WorkerSettings:
    return WorkerSettings(model_id="of the test", **given)


def config(**changes: object) -> ModelConfig:
    return ModelConfig.from_hf(HF | changes)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """On 8 usable cores, where torch would take 6: the number of threads, last set last."""
    counts = [6]
    monkeypatch.setattr(resolve, "num_usable_cores", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: counts[-1])
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    return counts


@pytest.mark.parametrize(
    ("asked", "num_cores", "num_shards", "expected"),
    [
        (None, 8, 1, 6),  # torch's own choice is of physical cores: never more
        (None, 3, 1, 3),
        (None, 8, 4, 2),
        (None, 8, 2, 4),
        (None, 2, 4, 1),
        (7, 2, 1, 7),
    ],
)
def test_threads(
    threads: list[int],
    monkeypatch: pytest.MonkeyPatch,
    asked: int | None,
    num_cores: int,
    num_shards: int,
    expected: int,
) -> None:
    monkeypatch.setattr(resolve, "num_usable_cores", lambda: num_cores)
    shard = Shard(0, num_shards, local_size=num_shards)
    set_threads(settings(threads=asked), shard)
    assert threads[-1] == expected


def yarn(**changes: object) -> dict[str, object]:
    return dict(type="yarn", factor=4.0, original_max_position_embeddings=32768) | changes


@pytest.mark.parametrize(
    ("changes", "default", "longest"),
    [
        (dict(), 4096, 4096),
        (dict(max_position_embeddings=32768, rope_scaling=yarn()), 32768, 131072),
        (dict(max_position_embeddings=40960, rope_scaling=yarn()), 40960, 131072),
        (dict(max_position_embeddings=131072, rope_scaling=yarn()), 131072, 131072),
        (dict(rope_scaling=dict(type="linear", factor=4.0)), 4096, 16384),
        (dict(rope_scaling=dict(type="dynamic", factor=2.0)), 8192, 8192),
        (
            dict(
                max_position_embeddings=131072,
                rope_scaling=yarn(rope_type="llama3", factor=8.0),
            ),
            131072,
            131072,
        ),
    ],
)
def test_longest_sequence_that_may_be_asked_for(changes: dict, default: int, longest: int) -> None:
    facts = config(**changes)
    assert resolve_max_total_tokens(settings(), facts) == default
    asked = settings(max_total_tokens=longest)
    assert resolve_max_total_tokens(asked, facts) == longest
    with pytest.raises(ConfigError, match=f"must be <= {longest},.* Given: {longest + 1}"):
        resolve_max_total_tokens(replace(asked, max_total_tokens=longest + 1), facts)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (dict(), 256),
        (dict(max_total_tokens=4000), 4096),  # as resolved
        (dict(max_input_tokens=1000), 1001),
        (dict(max_input_tokens=10), 256),
        (dict(max_input_tokens=9000), 4096),
    ],
)
def test_what_must_fit(given: dict, expected: int) -> None:
    assert resolve_min_total_tokens(settings(**given), 4096) == expected


def test_short_models_need_no_more_than_their_length() -> None:
    assert resolve_min_total_tokens(settings(), 100) == 100


def test_length_is_lowered_to_what_fits(caplog: pytest.LogCaptureFixture) -> None:
    layout = KvCacheLayout(num_blocks=20, block_size=32, num_slots=4)
    assert resolve_fitting_tokens(640, layout) == 640 and not caplog.records
    assert resolve_fitting_tokens(641, layout) == 640
    assert resolve_fitting_tokens(640, layout, tables_per_sequence=2) == 608
    first, _ = [record.getMessage() for record in caplog.records]
    assert "640 tokens, not the model's 641" in first and "--max-total-tokens" in first


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    """A tokenizer whose turns end with <end>, token 4; token 12 is beyond the model's 10."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "far": 12}, unk_token="a"))
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer.add_special_tokens([AddedToken("<x>"), AddedToken("<end>", special=True)])
    assert tokenizer.token_to_id("<end>") == 4
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return ModelFolder(tmp_path)


def ends(folder: ModelFolder, *, generation: object, named: object) -> tuple[int, ...]:
    files = {"generation_config.json": {"eos_token_id": generation}}
    files["tokenizer_config.json"] = {"eos_token": named}
    for name, content in files.items():
        (folder.path / name).write_text(json.dumps(content))
    return resolve_eos_tokens(folder, config(eos_token_id=1), read_tokenizer_files(folder))


@pytest.mark.parametrize(
    ("generation", "named", "expected"),
    [
        (None, None, (1,)),
        (None, "</s>", (1,)),
        ([3, 1], "</s>", (3, 1)),
        (None, "<end>", (1, 4)),
        (None, {"content": "<end>", "special": True}, (1, 4)),
        ([4, 1], "<end>", (4, 1)),
        (None, "<unheard of>", (1,)),
    ],
)
def test_ends_of_a_text(
    folder: ModelFolder,
    caplog: pytest.LogCaptureFixture,
    generation: object,
    named: object,
    expected: tuple[int, ...],
) -> None:
    assert ends(folder, generation=generation, named=named) == expected
    assert not caplog.records


@pytest.mark.parametrize(
    ("generation", "named", "expected"),
    [([10, 2], None, (2,)), ([-1, 2], None, (2,)), (300, "<end>", (4,)), (2, "far", (2,))],
)
def test_ends_that_are_no_tokens_of_the_model(
    folder: ModelFolder,
    caplog: pytest.LogCaptureFixture,
    generation: object,
    named: object,
    expected: tuple[int, ...],
) -> None:
    caplog.set_level(logging.WARNING)
    assert ends(folder, generation=generation, named=named) == expected
    assert len(caplog.records) == 1
