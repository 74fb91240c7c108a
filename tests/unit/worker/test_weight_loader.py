"""Weights arrive whole, cut for each shard; and what does not fit is named."""

import json
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from worker.layers.build import Build
from worker.layers.embedding import VocabularyEmbedding, VocabularyHead
from worker.layers.linear import ColumnLinear, MergedColumnLinear, QkvLinear, RowLinear
from worker.parallel.group import Shard
from worker.weights.files import ModelFilesError, ModelFolder, find_model
from worker.weights.loader import load_weights
from worker.weights.matching import WeightError
from worker.weights.pieces import WeightNames, of_modules
from worker.weights.progress import Progress
from worker.weights.scratch import Scratch

CPU = torch.device("cpu")
HIDDEN, HEADS, KV_HEADS, DIM, VOCAB = 6, 4, 2, 3, 7


class Toy(nn.Module):
    """One of each kind of layer."""

    def __init__(self, shard: Shard, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        build = Build(dtype=dtype, shard=shard)
        self.embedding = VocabularyEmbedding(VOCAB, HIDDEN, build)
        self.qkv = QkvLinear(
            HIDDEN, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, build=build, has_bias=True
        )
        self.output = RowLinear(HEADS * DIM, HIDDEN, build, has_bias=True)
        self.gate_up = MergedColumnLinear(HIDDEN, [("gate", 8), ("up", 8)], build)
        self.plain = ColumnLinear(HIDDEN, 8, build)
        self.head = VocabularyHead(HIDDEN, VOCAB, build)


NAMES = WeightNames(
    table={
        "model.embed.weight": "embedding.weight",
        **{f"model.{part}.weight": f"qkv.weight:{part}" for part in "qkv"},
        **{f"model.{part}.bias": f"qkv.bias:{part}" for part in "qkv"},
        "model.o.weight": "output.weight",
        "model.o.bias": "output.bias",
        "model.gate.weight": "gate_up.weight:gate",
        "model.up.weight": "gate_up.weight:up",
        "model.plain.weight": "plain.weight",
        "head.weight": "head.weight",
    },
    aliases={"head.weight": "model.embed.weight"},
    ignored=(".inv_freq",),
    prefix="model.",
)


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {
        "model.embed.weight": (VOCAB, HIDDEN),
        "model.q.weight": (HEADS * DIM, HIDDEN),
        "model.k.weight": (KV_HEADS * DIM, HIDDEN),
        "model.v.weight": (KV_HEADS * DIM, HIDDEN),
        "model.q.bias": (HEADS * DIM,),
        "model.k.bias": (KV_HEADS * DIM,),
        "model.v.bias": (KV_HEADS * DIM,),
        "model.o.weight": (HIDDEN, HEADS * DIM),
        "model.o.bias": (HIDDEN,),
        "model.gate.weight": (8, HIDDEN),
        "model.up.weight": (8, HIDDEN),
        "model.plain.weight": (8, HIDDEN),
        "head.weight": (VOCAB, HIDDEN),
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def load(
    folder: Path, values: dict[str, torch.Tensor], shard: Shard = Shard(), **options: object
) -> Toy:
    save_file(values, folder / "model.safetensors")
    toy = Toy(shard, **options)
    load_weights(toy, NAMES, ModelFolder(folder).weight_files(), CPU)
    return toy


def test_one_shard_computes_the_plain_products(tmp_path: Path) -> None:
    values = tensors()
    toy = load(tmp_path, values)
    x = torch.randn(5, HIDDEN)
    qkv = [x @ values[f"model.{part}.weight"].T + values[f"model.{part}.bias"] for part in "qkv"]
    torch.testing.assert_close(toy.qkv(x), torch.cat(qkv, dim=-1))
    torch.testing.assert_close(toy.head(x), x @ values["head.weight"].T)
    y = torch.randn(5, HEADS * DIM)
    torch.testing.assert_close(
        toy.output(y), y @ values["model.o.weight"].T + values["model.o.bias"]
    )
    assert torch.equal(toy.embedding(torch.tensor([3, 6])), values["model.embed.weight"][[3, 6]])


@pytest.mark.parametrize("size", [2, 4])
def test_shards_sum_and_join_to_the_whole(tmp_path: Path, size: int) -> None:
    """The collectives themselves are tested with processes; here their work is done by hand."""
    values = tensors()
    toys = [load(tmp_path, values, Shard(rank, size)) for rank in range(size)]
    x, y = torch.randn(5, HIDDEN), torch.randn(5, HEADS * DIM)
    share = HEADS * DIM // size
    summed = sum(
        toy.output.product(y[:, i * share : (i + 1) * share]) for i, toy in enumerate(toys)
    )
    torch.testing.assert_close(summed, y @ values["model.o.weight"].T + values["model.o.bias"])
    joined = torch.cat([toy.head.product(x) for toy in toys], dim=-1)[:, :VOCAB]
    torch.testing.assert_close(joined, x @ values["head.weight"].T)
    heads = HEADS // size
    for rank, toy in enumerate(toys):
        kv_heads = [0, 1] if size == 1 else [rank * KV_HEADS // size]
        rows = {"q": range(rank * heads * DIM, (rank + 1) * heads * DIM)}
        rows["k"] = rows["v"] = [head * DIM + i for head in kv_heads for i in range(DIM)]
        expected = [
            x @ values[f"model.{part}.weight"][list(rows[part])].T
            + values[f"model.{part}.bias"][list(rows[part])]
            for part in "qkv"
        ]
        torch.testing.assert_close(toy.qkv(x), torch.cat(expected, dim=-1))
        gate, up = (values[f"model.{part}.weight"].chunk(size)[rank] for part in ("gate", "up"))
        torch.testing.assert_close(toy.gate_up(x), torch.cat((x @ gate.T, x @ up.T), dim=-1))


def test_a_tied_head_uses_the_embedding_unless_the_files_have_one(tmp_path: Path) -> None:
    values = tensors()
    del values["head.weight"]
    toy = load(tmp_path, values)
    x = torch.randn(2, HIDDEN)
    torch.testing.assert_close(toy.head(x), x @ values["model.embed.weight"].T)
    assert torch.equal(toy.embedding(torch.tensor([1])), values["model.embed.weight"][[1]])


def test_bfloat16_is_packed_and_stays_close(tmp_path: Path) -> None:
    values = tensors()
    toy = load(tmp_path, values, dtype=torch.bfloat16)
    for num_rows in (1, 3, 40):
        x = torch.randn(num_rows, HIDDEN).bfloat16()
        expected = x.float() @ values["model.plain.weight"].bfloat16().float().T
        torch.testing.assert_close(toy.plain(x).float(), expected, atol=0.05, rtol=0.02)


def test_names_may_lack_the_prefix_and_useless_tensors_are_passed_over(tmp_path: Path) -> None:
    values = {name.removeprefix("model."): value for name, value in tensors().items()}
    toy = load(tmp_path, values | {"layers.0.rotary.inv_freq": torch.ones(2)})
    assert toy.qkv.product is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.k.weight": None}, "missing: model.k.weight"),
        ({"model.embed.weight": None, "head.weight": None}, "missing: head.weight"),
        ({"extra.weight": torch.ones(2)}, "unexpected: extra.weight"),
        (
            {"model.up.weight": torch.ones(8, 5)},
            r"wrong shape: model.up.weight is \(8, 5\).*\(8, 6\)",
        ),
        ({"k.weight": torch.ones(6, 6)}, "stored twice: model.k.weight"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, change: dict, message: str) -> None:
    values = {name: value for name, value in (tensors() | change).items() if value is not None}
    with pytest.raises(WeightError, match=message):
        load(tmp_path, values)


def test_several_files_with_an_index(tmp_path: Path) -> None:
    values = tensors()
    names = list(values)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, members in parts.items():
        save_file({name: values[name] for name in members}, tmp_path / file)
    index = {"weight_map": {name: file for file, members in parts.items() for name in members}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    toy = Toy(Shard())
    load_weights(toy, NAMES, ModelFolder(tmp_path).weight_files(), CPU)
    x = torch.randn(2, HIDDEN)
    torch.testing.assert_close(toy.plain(x), x @ values["model.plain.weight"].T)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(
        ModelFilesError, match="lacks weight files that its index names: b.safetensors"
    ):
        ModelFolder(tmp_path).weight_files()


def test_a_file_that_is_damaged_is_named(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for damaged, message in (
        (whole[:-8], "model.safetensors ends too early"),
        (whole[:60], "is no safetensors file"),
        (b"", "is no safetensors file"),
        (b"\xff" * 200, "is no safetensors file: a header of"),
        (whole.replace(b'"F32"', b'"F99"'), "unknown type F99"),
        (whole.replace(b"[7,6]", b"[7,5]"), "a shape that does not fit its bytes"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(ModelFilesError, match=message):
            load_weights(Toy(Shard()), NAMES, [file], CPU)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_tensors_of_many_blocks(
    tmp_path: Path, is_transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of two rows and a bit, and rows that are longer than a block."""
    monkeypatch.setattr("worker.weights.tensor_file.BLOCK_BYTES", 5 * HIDDEN * 2)
    test_fused_and_transposed_files_are_the_same_layer(tmp_path, "heads", HEADS, is_transposed, 2)
    test_shards_sum_and_join_to_the_whole(tmp_path, 4)


def test_what_fails_in_a_thread_is_told_and_ends_the_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object) -> None:
        raise ValueError("no room")

    monkeypatch.setattr("worker.layers.linear.Linear.seal", fail)
    with pytest.raises(ValueError, match="no room"):
        load(tmp_path, tensors())


def test_threads_of_a_load_leave_torch_as_it_was(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        load(tmp_path, tensors())
        with ThreadPoolExecutor(1) as pool:  # a new thread asks what counts for new threads
            assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)


def test_a_load_tells_how_far_it_is(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    said: list[str] = []
    progress = Progress(said.append, is_terminal=True)
    files = [tmp_path / "model.safetensors"]
    load_weights(Toy(Shard()), NAMES, files, CPU, progress=progress)
    assert said[0] == "Loading 1 file, 0.0 GB ..."
    assert any("100 %" in line for line in said)


def test_scratch_memory_is_used_again_once_nobody_uses_it() -> None:
    scratch = Scratch()
    first = scratch.empty((4, 100), torch.float32)
    address = first.data_ptr()
    view = first.detach()[1]
    del first
    second = scratch.empty((4, 100), torch.float32)
    assert second.data_ptr() != address
    del view
    assert scratch.empty((8, 10), torch.bfloat16).data_ptr() != address, "too large for that"
    third = scratch.empty((8, 60), torch.bfloat16)
    assert third.data_ptr() == address
    assert third.shape == (8, 60)


def test_scratch_memory_ends_with_the_load() -> None:
    """Also when a tensor of it lives on, because a backend keeps its weight as it is."""
    tracemalloc.start()
    try:
        scratch = Scratch()
        kept, packed = (scratch.empty((2**20,), torch.float32) for _ in range(2))
        del packed
        assert tracemalloc.get_traced_memory()[0] > 7 * 2**20
        del scratch
        assert 4 * 2**20 <= tracemalloc.get_traced_memory()[0] < 5 * 2**20
        del kept
        assert tracemalloc.get_traced_memory()[0] < 2**20
    finally:
        tracemalloc.stop()


def test_shards_must_divide_the_heads() -> None:
    build = Build(dtype=torch.float32, shard=Shard(0, 3))
    with pytest.raises(ValueError, match="attention heads must be divisible .* Given: 4 and 3"):
        QkvLinear(HIDDEN, num_heads=4, num_kv_heads=2, head_dim=3, build=build)


def test_a_folder_that_is_no_model_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match="no config.json"):
        find_model(str(tmp_path)).config()
    with pytest.raises(ModelFilesError, match="there is no folder"):
        find_model(str(tmp_path / "absent"))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelFilesError, match="has no model.safetensors and no index"):
        find_model(str(tmp_path)).weight_files()


def test_a_model_that_is_not_cached_is_one_sentence_when_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelFilesError, match="nobody/nothing is not in the hub's cache"):
        find_model("nobody/nothing", cache_dir=str(tmp_path))
    with pytest.raises(ModelFilesError, match="neither a folder nor a hub id"):
        find_model("no//thing", cache_dir=str(tmp_path))


class Fused(nn.Module):
    """A QKV linear and a row linear, for files with other layouts."""

    def __init__(self, shard: Shard, kv_heads: int, is_transposed: bool) -> None:
        super().__init__()
        build = Build(dtype=torch.float32, shard=shard)
        self.qkv = QkvLinear(
            HIDDEN,
            num_heads=HEADS,
            num_kv_heads=kv_heads,
            head_dim=DIM,
            build=build,
            has_bias=True,
            is_transposed=is_transposed,
        )
        self.output = RowLinear(HEADS * DIM, HIDDEN, build, is_transposed=is_transposed)


def fused_parts(values: dict[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    """Tensors with rows as the layout has them, from `q`, `k` and `v` with a row a feature."""
    if layout == "heads":
        heads = torch.stack([values[part].unflatten(0, (-1, DIM)) for part in "qkv"], dim=1)
        return {"heads": heads.flatten(0, 2)}
    if layout == "qkv":
        return {"qkv": torch.cat([values[part] for part in "qkv"])}
    return {"q": values["q"], "kv": torch.cat([values["k"], values["v"]])}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(
    ("layout", "kv_heads"), [("heads", HEADS), ("qkv", HEADS), ("qkv", 1), ("kv", 2), ("kv", 1)]
)
def test_fused_and_transposed_files_are_the_same_layer(
    tmp_path: Path, layout: str, kv_heads: int, is_transposed: bool, size: int
) -> None:
    torch.manual_seed(0)
    num_rows = {"q": HEADS * DIM, "k": kv_heads * DIM, "v": kv_heads * DIM}
    weights = {part: torch.randn(rows, HIDDEN) for part, rows in num_rows.items()}
    biases = {part: torch.randn(rows) for part, rows in num_rows.items()}
    output = torch.randn(HIDDEN, HEADS * DIM)
    files = {f"{name}.weight": value for name, value in fused_parts(weights, layout).items()}
    files["o.weight"] = output
    if is_transposed:
        files = {name: value.T.contiguous() for name, value in files.items()}
    files |= {f"{name}.bias": value for name, value in fused_parts(biases, layout).items()}
    save_file(files, tmp_path / "model.safetensors")
    names = [name.split(".")[0] for name in files if name.endswith("bias")]
    table = of_modules({name: f"qkv:{name}" for name in names}) | {"o.weight": "output.weight"}
    x, y = torch.randn(3, HIDDEN), torch.randn(3, HEADS * DIM)
    summed = torch.zeros(3, HIDDEN)
    for rank in range(size):
        fused = Fused(Shard(rank, size), kv_heads, is_transposed)
        load_weights(fused, WeightNames(table), ModelFolder(tmp_path).weight_files(), CPU)
        first, heads = rank * HEADS // size, HEADS // size
        first_kv, local_kv = rank * kv_heads // size, max(1, kv_heads // size)
        shares = {"q": (first, heads), "k": (first_kv, local_kv), "v": (first_kv, local_kv)}
        expected = [
            (x @ weights[part].T + biases[part])[:, start * DIM : (start + count) * DIM]
            for part, (start, count) in shares.items()
        ]
        torch.testing.assert_close(fused.qkv(x), torch.cat(expected, dim=-1))
        summed += fused.output.partial(y[:, first * DIM : (first + heads) * DIM])
    torch.testing.assert_close(summed, y @ output.T)
