"""`.bin` to safetensors: the same tensors, complete files or none, and nothing that could run code."""

import json
import os
import pickle
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, T5Config, T5ForConditionalGeneration

from tests.checkpoints import save_checkpoint
from worker.weights.convert import convert_bin_files
from worker.weights.files import ModelFilesError, ModelFolder, bin_files, is_safetensors
from worker.weights.prepare import prepare_model

CONFIG = LlamaConfig(
    vocab_size=199,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    tie_word_embeddings=True,
)


def as_bin(folder, *, num_files=1):
    """Turn a checkpoint's safetensors into what older versions wrote; its tensors."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    if num_files == 1:
        tied = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
        torch.save(tied | tensors, folder / "pytorch_model.bin")
        return tensors
    weight_map = {}
    for number in range(num_files):
        part = names[number::num_files]
        file = f"pytorch_model-{number + 1:05}-of-{num_files:05}.bin"
        torch.save({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return tensors


def loaded(folder):
    tensors = {}
    for file in ModelFolder(folder).weight_files():
        tensors |= load_file(file)
    return tensors


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


def convert(tmp_path, state, **options):
    torch.save(state, tmp_path / "pytorch_model.bin", **options)
    out = tmp_path / "out"
    out.mkdir()
    convert_bin_files([tmp_path / "pytorch_model.bin"], out)
    assert [file.name for file in out.iterdir()] == ["model.safetensors"]
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("num_files", [1, 3])
def test_first_load_of_a_folder_converts_it_beside(tmp_path, num_files):
    save_checkpoint(tmp_path, CONFIG)
    (tmp_path / "training_args.bin").write_bytes(b"no weights")
    expected = as_bin(tmp_path, num_files=num_files)
    folder = prepare_model(str(tmp_path))
    assert folder.path == tmp_path
    assert_same(loaded(tmp_path), expected)
    assert (tmp_path / "model.safetensors.index.json").exists() == (num_files > 1)
    assert not list(tmp_path.glob(".convert*")) and not list(tmp_path.glob("*.partial"))
    files = {file: file.stat().st_mtime_ns for file in folder.weight_files()}
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o644 for file in files)
    prepare_model(str(tmp_path))
    assert files == {file: file.stat().st_mtime_ns for file in folder.weight_files()}


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "consolidated.safetensors", "sd_model.safetensors"]
)
def test_safetensors_that_are_no_weights_of_the_model_do_not_keep_it_from_converting(
    tmp_path, name
):
    save_checkpoint(tmp_path, CONFIG)
    expected = as_bin(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / name)
    folder = prepare_model(str(tmp_path))
    assert_same(loaded(folder.path), expected)
    assert load_file(tmp_path / name).keys() == {"a"}


@pytest.mark.parametrize(
    ("name", "is_weights"),
    [
        ("model.safetensors", True),
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("adapter_model.safetensors", False),
        ("model_ema.safetensors", False),
        ("onnx/model.safetensors", False),
        ("adapter.safetensors.index.json", False),
        ("model.safetensors.tmp", False),
    ],
)
def test_names_of_weights(name, is_weights):
    assert is_safetensors(name) is is_weights


def test_folder_that_may_not_be_written_is_converted_into_the_cache(tmp_path, monkeypatch):
    source, cache = tmp_path / "model", tmp_path / "cache"
    save_checkpoint(source, CONFIG)
    expected = as_bin(source)
    before = sorted(file.name for file in source.iterdir())
    # whoever runs the tests may be root, who may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    folder = prepare_model(str(source), cache_dir=str(cache))
    assert folder.path.is_relative_to(cache)
    assert sorted(file.name for file in source.iterdir()) == before
    assert_same(loaded(folder.path), expected)
    assert folder.config()["vocab_size"] == 199 and (folder.path / "tokenizer.json").is_file()
    assert prepare_model(str(source), cache_dir=str(cache)).path == folder.path


def test_who_comes_meanwhile_waits(tmp_path):
    """As the shards of a worker do."""
    save_checkpoint(tmp_path, CONFIG)
    expected = as_bin(tmp_path, num_files=2)
    threads = [threading.Thread(target=prepare_model, args=(str(tmp_path),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same(loaded(tmp_path), expected)


def test_tied_tensors_are_kept_under_their_main_name(tmp_path):
    shared = torch.randn(5, 4)
    copies = ["lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    state = {name: shared for name in copies} | {"shared.weight": shared, "b": shared.clone()}
    found = convert(tmp_path, state)
    assert_same(found, {"shared.weight": shared, "b": state["b"]})


@pytest.mark.parametrize("main", ["model.decoder.embed_tokens.weight", "transformer.wte.weight"])
def test_head_goes_before_the_embedding(tmp_path, main):
    shared = torch.randn(5, 4)
    assert set(convert(tmp_path, {"lm_head.weight": shared, main: shared})) == {main}


def test_t5_of_transformers(tmp_path):
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    model = T5ForConditionalGeneration(config)
    found = convert(tmp_path, model.state_dict())
    other = T5ForConditionalGeneration(config)
    missing, unexpected = other.load_state_dict(found, strict=False)
    assert not unexpected and not {name for name in missing if "embed_tokens" not in name} - {
        "lm_head.weight"
    }
    assert_same({name: other.state_dict()[name] for name in found}, found)


def test_views_are_stored_as_their_own_part(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    state = {"left": base[:, :3], "right": base[:, 3:], "turned": base.T, "none": torch.empty(0, 3)}
    found = convert(tmp_path, state | {"also_none": torch.empty(0, 3)})
    assert_same(found, {**state, "also_none": torch.empty(0, 3)})
    assert (tmp_path / "out/model.safetensors").stat().st_size < 1000


def test_not_a_number_is_a_value_like_others(tmp_path):
    state = {"x": torch.tensor([float("nan"), 1.0]), "n": torch.tensor(3)}
    found = convert(tmp_path, state)
    assert found["x"][0].isnan() and found["n"] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
def test_number_formats(tmp_path, dtype):
    state = {"a": torch.arange(-8, 8).to(dtype)}
    assert_same(convert(tmp_path, state), state)


def test_format_before_torch_1_6(tmp_path):
    state = {"a": torch.randn(3, 3)}
    assert_same(convert(tmp_path, state, _use_new_zipfile_serialization=False), state)


def test_nested_state(tmp_path, caplog):
    state = {"a": torch.randn(2)}
    assert_same(convert(tmp_path, {"state_dict": {**state, "steps": 3}, "epoch": 1}), state)
    assert "left out what is no tensor: steps" in caplog.text


class Malicious:
    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path, is_zip):
    bad = Malicious()
    bad.path = tmp_path / "ran"
    torch.save({"a": bad}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ModelFilesError, match="could run code"):
        convert_bin_files([tmp_path / "pytorch_model.bin"], tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", [b"", b"no pickle", pickle.dumps([1, 2], protocol=2), b"PK\x03\x04broken"]
)
def test_damaged_file_is_one_sentence_and_leaves_nothing(tmp_path, content):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ModelFilesError) as raised:
        prepare_model(str(tmp_path))
    assert "pytorch_model.bin" in str(raised.value) and "\n" not in str(raised.value)
    assert not list(tmp_path.glob("*.safetensors*")) and not list(tmp_path.glob(".convert*"))


def test_damaged_second_file_leaves_nothing(tmp_path):
    save_checkpoint(tmp_path, CONFIG)
    as_bin(tmp_path, num_files=2)
    (tmp_path / "pytorch_model-00002-of-00002.bin").write_bytes(b"PK")
    with pytest.raises(ModelFilesError):
        prepare_model(str(tmp_path))
    assert not list(tmp_path.glob("*.safetensors*"))


def test_name_in_two_files(tmp_path):
    files = [tmp_path / "pytorch_model-1.bin", tmp_path / "pytorch_model-2.bin"]
    for file in files:
        torch.save({"a": torch.ones(1)}, file)
    with pytest.raises(ModelFilesError, match="'a', as does another file"):
        convert_bin_files(files, tmp_path)


def test_index_that_names_what_is_not_there(tmp_path):
    index = {"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / "pytorch_model-1.bin").touch()
    with pytest.raises(ModelFilesError, match=r"lacks weight files .* pytorch_model-2\.bin"):
        bin_files(ModelFolder(tmp_path))


def test_what_is_written_is_read_again(tmp_path, monkeypatch):
    from worker.weights import convert

    whole, calls = convert._pieces, []

    def damaged(tensor):
        calls.append(tensor)
        return (piece + (len(calls) == 1) for piece in whole(tensor))

    monkeypatch.setattr(convert, "_pieces", damaged)
    torch.save({"a": torch.ones(4)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelFilesError, match="reads back differently"):
        convert_bin_files([tmp_path / "pytorch_model.bin"], tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["pytorch_model.bin"]


CONVERSION = """
import sys, threading
from pathlib import Path
from worker.weights.convert import convert_bin_files

def anonymous_bytes():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in l)
    return int(line.split()[1]) * 1024

before, most, is_over = anonymous_bytes(), [0], threading.Event()

def watch():
    while not is_over.wait(0.002):
        most.append(anonymous_bytes())

watcher = threading.Thread(target=watch)
watcher.start()
convert_bin_files([Path(sys.argv[1])], Path(sys.argv[2]))
is_over.set()
watcher.join()
print(len(most), max(most) - before)
"""


def test_memory_holds_no_whole_file(tmp_path):
    """What the process has for itself. Pages of the mapped file are the kernel's cache."""
    base = torch.randn(2048, 1024)
    state = {"whole": torch.randn(6144, 2048), "left": base[:, :512], "turned": base.T}
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", CONVERSION, tmp_path / "pytorch_model.bin", tmp_path / "out"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    num_samples, grown_bytes = map(int, done.stdout.split())
    assert num_samples > 5
    assert grown_bytes < 28 * 2**20, "of a file of 56 MiB"
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), state)
