"""Every backend of `--quantize` against a plain product with the weights it stands for."""

import sys

import pytest
import torch

from worker.layers.build import Build
from worker.layers.linear import ColumnLinear, RowLinear
from worker.parallel.group import Shard
from worker.quantization import int8
from worker.quantization.four_bit import four_bit_backend, pack
from worker.quantization.int8 import Int8Weight, int8_product, quantize_rows
from worker.quantization.library import import_bitsandbytes
from worker.quantization.llm_int8 import llm_int8_backend
from worker.quantization.registry import QUANTIZATIONS, linear_backends

# Relative errors for Gaussian weights and activations: of rounding both to 8 bits, and of 4 bits.
ERRORS = {"bitsandbytes": 0.015, "bitsandbytes-nf4": 0.1, "bitsandbytes-fp4": 0.15, "int8": 0.015}


def a_weight(num_outputs: int = 96, num_inputs: int = 128, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_outputs, num_inputs, generator=torch.manual_seed(seed)) * 0.05


def rows(num_rows: int, num_inputs: int = 128, *, seed: int = 1) -> torch.Tensor:
    return torch.randn(num_rows, num_inputs, generator=torch.manual_seed(seed))


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return ((y.float() - expected).norm() / expected.norm()).item()


@pytest.fixture
def always_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    if not int8.can_pack():
        pytest.skip("this CPU has no VNNI")
    monkeypatch.setattr(int8, "PACK_FROM_WEIGHTS", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_rows", [1, 5, 70])
@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_a_product_is_near_that_of_the_whole_weight(
    name: str, num_rows: int, dtype: torch.dtype
) -> None:
    weight, x, bias = a_weight(), rows(num_rows), torch.arange(96) / 128
    backend, _ = linear_backends(name)
    expected = x @ weight.T + bias
    y = backend(weight.to(dtype), bias.to(dtype))(x.to(dtype))
    assert y.dtype == dtype
    assert y.shape == expected.shape
    assert error(y - bias, expected - bias) < ERRORS[name]
    assert error(y - bias, expected - bias) > 1e-3  # it is quantized indeed


def test_int8_computes_the_rounded_values_exactly() -> None:
    _check_int8()


def test_int8_packed_computes_the_rounded_values_exactly(always_packed: None) -> None:
    _check_int8()


def test_int8_padded_for_cuda_computes_the_rounded_values_exactly() -> None:
    _check_int8(int8._PaddedProduct)


def _check_int8(product: type | None = None) -> None:
    weight, x = a_weight(num_outputs=37, num_inputs=45), rows(6, 45)
    x[2] = 0
    quantized = quantize_rows(weight)
    assert quantized.values.abs().amax(1).tolist() == [127] * 37
    sizes = x.abs().amax(1, keepdim=True)
    rounded = (x * 127 / sizes).nan_to_num().round() * sizes / 127
    expected = rounded.double() @ (quantized.values.double() * quantized.scales[:, None]).T
    y = product(quantized, None)(x) if product else int8_product(weight, None)(x)
    torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_row_of_int8_depends_on_no_other_row(
    is_packed: bool, request: pytest.FixtureRequest
) -> None:
    if is_packed:
        request.getfixturevalue("always_packed")
    product = int8_product(a_weight().bfloat16(), None)
    x = rows(40).bfloat16()
    x[7] *= 1000
    together = product(x)
    for row in (0, 7, 39):
        assert torch.equal(together[row], product(x[row : row + 1])[0])


def test_large_weights_are_quantized_by_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = a_weight()
    expected = quantize_rows(weight)
    monkeypatch.setattr(int8, "SLICE_WEIGHTS", 10 * 128)
    sliced = quantize_rows(weight)
    assert torch.equal(sliced.values, expected.values)
    assert torch.equal(sliced.scales, expected.scales)


def test_rows_of_zeros_stay_zeros() -> None:
    """A padded vocabulary has such rows."""
    weight = a_weight()
    weight[3] = 0
    y = int8_product(weight, None)(rows(4))
    assert y.isfinite().all()
    assert not y[:, 3].any()


def test_llm_int8_has_the_values_of_bitsandbytes() -> None:
    library = import_bitsandbytes()
    weight, x = a_weight(), rows(9)
    values, sizes, _ = library.functional.int8_vectorwise_quant(weight.half())
    expected = int8.product_of(Int8Weight(values, sizes / 127), None)(x)
    assert torch.equal(llm_int8_backend()(weight, None)(x), expected)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_have_the_values_of_bitsandbytes(kind: str) -> None:
    library = import_bitsandbytes()
    weight, x = a_weight(num_outputs=64, num_inputs=192).bfloat16(), rows(9, 192).bfloat16()
    levels, state = library.functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=False, quant_type=kind
    )
    whole = library.functional.dequantize_4bit(levels, state)
    y = four_bit_backend(kind)(weight, None)(x)
    assert error(y, x.float() @ whole.float().T) < 0.005


def test_packing_puts_weights_where_the_kernel_looks() -> None:
    levels = torch.randint(0, 16, (64, 6), dtype=torch.uint8, generator=torch.manual_seed(0))
    packed = pack(levels[:, ::2] << 4 | levels[:, 1::2], 64, 6).view(2, 3, 32)
    for row, column in ((0, 0), (15, 5), (16, 0), (31, 1), (32, 4), (50, 3)):
        block, within = divmod(row, 32)
        byte = packed[block, column // 2, within % 16 * 2 + column % 2]
        assert (byte >> 4 if within >= 16 else byte & 15) == levels[row, column]


@pytest.mark.parametrize("layer_class", [ColumnLinear, RowLinear])
@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_shards_quantize_their_own_slices(name: str, layer_class: type) -> None:
    weight, x = a_weight(num_outputs=64, num_inputs=128), rows(3)
    backend, _ = linear_backends(name)
    parts = []
    for rank in range(2):
        build = Build(torch.float32, shard=Shard(rank, 2), linear_backend=backend)
        layer = layer_class(128, 64, build)
        piece = layer.pieces["weight"][""]
        layer.weight = torch.nn.Parameter(weight[piece.source].clone(), requires_grad=False)
        layer.seal()
        is_row = layer_class is RowLinear
        parts.append(layer.product(x[:, piece.source[1]] if is_row else x))
        expected = backend(weight[piece.source], None)(x[:, piece.source[1]])
        assert torch.equal(parts[-1], expected)
    y = sum(parts) if layer_class is RowLinear else torch.cat(parts, dim=1)
    assert error(y, x @ weight.T) < ERRORS[name]


def test_four_bits_refuse_a_shard_that_cuts_a_block() -> None:
    with pytest.raises(ValueError, match="multiple of that. Given: 96; use another number"):
        four_bit_backend("nf4")(a_weight(num_inputs=96), None)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="`quantize` must be one of bitsandbytes, .* Given: 'awq'"):
        linear_backends("awq")


def test_bitsandbytes_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, module)

    class Nowhere:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "bitsandbytes":
                raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(sys, "meta_path", [Nowhere, *sys.meta_path])
    with pytest.raises(ValueError, match=r"pip install 'tokenfleet\[quantize\]'"):
        import_bitsandbytes()
    assert "kernels" not in sys.modules or sys.modules["kernels"] is not None


def test_nothing_chosen_is_the_plain_product() -> None:
    assert linear_backends(None) == (None, None)
