"""The compiled kernels against the torch operations that they stand for."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.kernels.cpu.choices import greedy_choice
from worker.kernels.cpu.library import cpu_kernels, cpu_library
from worker.kernels.cpu.products import int8_product, packed_product
from worker.quantization.int8 import quantize_rows

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}


@pytest.fixture(params=DTYPES, ids=str)
def kernels(request: pytest.FixtureRequest):
    found = cpu_kernels(CPU, request.param)
    assert found is not None, "the kernels were not built: pip install --editable ."
    return found


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    bound = TOLERANCE[actual.dtype] * max(1.0, expected.float().abs().max().item())
    assert (actual.float() - expected.float()).abs().max().item() <= bound


@pytest.mark.parametrize("shape", [(1, 576), (33, 64), (7, 3, 128), (600, 512)])
def test_rms_norm(kernels, num_threads, shape):
    x = torch.randn(shape).mul(3).to(kernels.dtype)
    weight = torch.randn(shape[-1]).to(kernels.dtype)
    expected = F.rms_norm(x.float(), (shape[-1],), None, 1e-5).to(kernels.dtype) * weight
    assert_near(kernels.rms_norm(x, weight, 1e-5), expected)


def test_rms_norm_of_rows_apart(kernels):
    x = torch.randn(5, 96).to(kernels.dtype)[:, :64]
    weight = torch.ones(64, dtype=kernels.dtype)
    assert_near(kernels.rms_norm(x, weight, 1e-6), F.rms_norm(x, (64,), weight, 1e-6))


@pytest.mark.parametrize("dim", [32, 64, 128])
def test_rotation_is_that_of_torch(kernels, num_threads, dim):
    x = torch.randn(700, 5, 128).to(kernels.dtype)[:, :4, :dim]
    cos, sin = (torch.randn(700, 1, dim).to(kernels.dtype) for _ in range(2))
    expected = x * cos
    expected.addcmul_(x.roll(dim // 2, dims=-1), sin)
    kernels.rotate_(x, cos, sin)
    assert_near(x, expected)


@pytest.mark.parametrize("shape", [(1, 32), (40, 3072)])
def test_gated_silu(kernels, num_threads, shape):
    x = torch.randn(shape).mul(8).to(kernels.dtype)
    gate, up = x.chunk(2, dim=-1)
    assert_near(kernels.silu_gated(x), F.silu(gate) * up)


def test_silu_of_extreme_numbers(kernels):
    gate = torch.tensor([0.0, -1e4, 1e4, -100, 100, float("nan"), -88, 88] * 2)
    x = torch.cat((gate, torch.ones(16))).to(kernels.dtype)[None]
    torch.testing.assert_close(
        kernels.silu_gated(x), F.silu(x[:, :16]), equal_nan=True, rtol=1e-2, atol=1e-30
    )


def gathered_attention(q, rows, blocks, keep, mask, scale):
    """The same by gathering: softmax(q kᵀ scale + mask) v in float64."""
    num_sequences, num_heads, dim = q.shape
    kv_heads = rows.shape[2] // 2
    tokens = rows[blocks].view(num_sequences, -1, 2 * kv_heads, dim)[:, keep].double()
    keys, values = tokens.transpose(1, 2).split(kv_heads, dim=1)
    queries = q.double().view(num_sequences, kv_heads, -1, dim)
    scores = queries @ keys.transpose(2, 3) * scale
    if mask is not None:
        scores = scores + mask.double()
    return (scores.softmax(-1) @ values).reshape(num_sequences, num_heads * dim)


@settings(deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from(DTYPES),
    num_sequences=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 5, 7, 16]),
    dim=st.sampled_from([16, 48, 64, 80, 128, 256]),
    num_tokens=st.integers(1, 200),
    skipped=st.integers(0, 31),
    mask_kind=st.sampled_from(["none", "rows", "heads"]),
    seed=st.integers(0, 10_000),
)
def test_paged_decode(
    dtype, num_sequences, kv_heads, group, dim, num_tokens, skipped, mask_kind, seed
):
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=random).to(dtype)

    block_size = 32
    keep = slice(skipped, skipped + num_tokens)
    num_blocks = -(-keep.stop // block_size)
    total = num_sequences * num_blocks + 3
    rows = normal(total, block_size, 2 * kv_heads, dim)
    blocks = torch.randperm(total, generator=random)[: num_sequences * num_blocks]
    q = normal(num_sequences, kv_heads * group + 2, dim)[:, : kv_heads * group]
    mask = None
    if mask_kind != "none":
        heads = (1, 1) if mask_kind == "rows" else (kv_heads, group)
        mask = normal(num_sequences, *heads, num_tokens)
        mask[torch.rand(mask.shape, generator=random) < 0.3] = float("-inf")
        mask[..., num_tokens // 2] = 0  # every query sees a key
    kernels = cpu_kernels(CPU, dtype)
    attended = torch.empty(num_sequences, kv_heads * group * dim, dtype=dtype)
    kernels.paged_decode(attended, q, rows, blocks, keep, mask, dim**-0.5)
    assert_near(attended, gathered_attention(q, rows, blocks, keep, mask, dim**-0.5))


def test_paged_decode_of_much_work_uses_threads_and_changes_nothing(kernels):
    rows = torch.randn(200, 32, 4, 64).to(kernels.dtype)
    q = torch.randn(8, 6, 64).to(kernels.dtype)
    blocks = torch.randperm(200)
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(torch.empty(8, 6 * 64, dtype=kernels.dtype))
        kernels.paged_decode(results[-1], q, rows, blocks, slice(0, 800), None, 0.125)
    torch.set_num_threads(1)
    assert torch.equal(*results)


@settings(deadline=None, max_examples=60)
@given(
    num_queries=st.integers(1, 150),
    num_before=st.integers(0, 140),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 7]),
    dim=st.sampled_from([64, 128, 256]),
    mask_kind=st.sampled_from(["none", "rows", "heads"]),
    is_paged=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_prompt_attention(num_queries, num_before, kv_heads, group, dim, mask_kind, is_paged, seed):
    kernels = cpu_kernels(CPU, torch.bfloat16)
    if not kernels.can_attend_prompts(dim):
        assert not torch.cpu._is_avx512_bf16_supported()
        return
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=random).bfloat16()

    num_keys = num_before + num_queries
    q = normal(num_queries, kv_heads * group + 2, dim)[:, : kv_heads * group]
    tokens = normal(num_keys, 2 * kv_heads + 1, dim)[:, : 2 * kv_heads]
    mask = None
    if mask_kind != "none":
        heads = () if mask_kind == "rows" else (group, kv_heads)
        mask = normal(*heads, num_queries, num_keys)
        mask[torch.rand(mask.shape, generator=random) < 0.2] = float("-inf")
        queries = torch.arange(num_queries)
        mask[..., queries, queries + num_before] = 0  # every query sees itself
    kv, blocks = tokens, None
    if is_paged:
        num_blocks = -(-num_keys // 16)
        kv = normal(num_blocks + 3, 16, 2 * kv_heads, dim)
        blocks = torch.randperm(num_blocks + 3, generator=random)[:num_blocks]
        filled = kv[blocks].flatten(0, 1)
        filled[:num_keys] = tokens
        kv[blocks] = filled.view(num_blocks, 16, 2 * kv_heads, dim)
    attended = torch.empty(num_queries, kv_heads * group * dim, dtype=torch.bfloat16)
    kernels.prompt_attention(attended, q, kv, blocks, num_keys, mask, dim**-0.5)

    keys, values = tokens.double().transpose(0, 1).split(kv_heads)  # [kv_heads, keys, d]
    queries = q.double().view(num_queries, kv_heads, group, dim).permute(2, 1, 0, 3)
    scores = queries @ keys.transpose(1, 2) * dim**-0.5  # [group, kv_heads, n, keys]
    if mask is not None:
        scores = scores + mask.double()
    is_later = torch.arange(num_keys) > torch.arange(num_queries)[:, None] + num_before
    weights = scores.masked_fill(is_later, float("-inf")).softmax(-1)
    expected = (weights @ values).permute(2, 1, 0, 3).flatten(1)
    assert_near(attended, expected)


def test_sum(kernels, num_threads):
    x, y = (torch.randn(700, 576).to(kernels.dtype) for _ in range(2))
    expected = x + y
    kernels.add_(x, y)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("num_rows", [1, 2, 5, 6, 7, 32, 97, 200])
@pytest.mark.parametrize("shape", [(64, 16), (576, 576), (50, 30), (131, 4098)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_matrix_product(num_threads, num_rows, shape, has_bias):
    num_outputs, num_inputs = shape
    weight = torch.randn(shape).div(num_inputs**0.5).bfloat16()
    bias = torch.randn(num_outputs).bfloat16() if has_bias else None
    x = torch.randn(num_rows, num_inputs + 2).bfloat16()[:, :num_inputs]
    product = packed_product(weight, bias)
    if torch.cpu._is_amx_tile_supported() or not torch.cpu._is_avx512_bf16_supported():
        assert product is None  # oneDNN's is the faster one, or the only one
        return
    expected = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    assert_near(product(x), expected)
    # A row's result depends neither on how many others there are nor on its place among them.
    assert torch.equal(product(x[-1:]), product(x)[-1:])


@pytest.mark.parametrize("num_rows", [1, 2, 5, 6, 7, 32, 97])
@pytest.mark.parametrize("shape", [(64, 16), (576, 576), (50, 30), (131, 1027)])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_product(num_threads, num_rows, shape, has_bias, dtype):
    weight = quantize_rows(torch.randn(shape))
    bias = torch.randn(shape[0]) if has_bias else None
    levels = torch.randint(-127, 128, (num_rows, shape[1] + 2))[:, : shape[1]]
    levels[:, 3] = 127
    levels[0] = 0
    x = (levels / 8).to(dtype)  # no number lies between two levels
    product = int8_product(weight.values, weight.scales / 127, bias)
    if torch.cpu._is_amx_tile_supported() or not torch.cpu._is_avx512_bf16_supported():
        assert product is None  # oneDNN's is the faster one, or the only one
        return
    expected = levels.double() @ weight.values.double().t() * weight.scales.double() / 8
    if bias is not None:
        expected = expected + bias.double()
    assert_near(product(x), expected)
    assert torch.equal(product(x[-1:]), product(x)[-1:])


def test_int8_product_takes_float16():
    weight = quantize_rows(torch.randn(64, 32))
    product = int8_product(weight.values, weight.scales / 127, None)
    x = torch.randn(3, 32).half()
    if product is not None:
        assert product(x).dtype == torch.float16
        assert torch.equal(product(x), product(x.float()).half())


def test_int8_product_of_broken_rows_is_not_a_number():
    weight = quantize_rows(torch.randn(64, 32))
    product = int8_product(weight.values, weight.scales / 127, None)
    x = torch.randn(3, 32)
    x[1, 5] = float("nan")
    if product is not None:
        assert product(x).isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 15, 16, 1000, 49_152])
def test_greedy_choice(num_threads, size, dtype):
    logits = torch.randn(5, size + 3).mul(4).to(dtype)[:, :size]
    logits[2, size // 2 :] = logits[2].max()  # the first among equals
    tokens, chosen, log_total = greedy_choice(logits)
    exact = logits.float()
    assert torch.equal(tokens, exact.argmax(dim=-1))
    assert torch.equal(chosen, exact.amax(dim=-1))
    torch.testing.assert_close(log_total, exact.logsumexp(dim=-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_greedy_choice_of_broken_logits_is_not_a_number(dtype):
    logits = torch.randn(4, 100).to(dtype)
    logits[0, 7] = float("nan")
    logits[1, 7] = float("inf")
    logits[2] = -float("inf")
    logits[3, 7] = -float("inf")  # one that is only masked
    assert greedy_choice(logits)[2].isnan().tolist() == [True, True, True, False]


def test_library_is_one_that_this_processor_can_run():
    assert cpu_library() is not None
