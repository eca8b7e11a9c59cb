"""Out, lse and gradients of a tile, for every backend and mask, against attention by its definition in fp64."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from helpers.errors import assert_as_exact_as
from helpers.lanes import by_lane
from helpers.plain_attention import exact_attention, torch_attention, visible_pairs
from longring.kernels import backends, triton_attention
from longring.kernels.attention import (
    attention,
    attention_backward,
    attention_forward,
    case_of,
    no_result,
    row_delta,
    zeros_fp32,
)
from longring.kernels.backends import BACKENDS, Selection, choose_backend
from longring.kernels.blocks import architecture
from longring.kernels.case import Case, Kind, Task
from longring.kernels.layout import SeqLayout
from longring.kernels.mask import make_mask
from longring.kernels.torch_attention import CUDNN, forward
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
S = 70  # not a multiple of any block size; the interpreter's blocks have 32 queries and 16 keys
ALIGNED = 64  # a multiple of both
BATCH = 2 if DEVICE == "cuda" else 1  # interpreted kernels take as long as they have sequences and heads
PACKED = SeqLayout.packed((20, 1, 30, 19))


def tile(queries, keys, documents=(0,), **kind):
    return SeqLayout(queries, documents), SeqLayout(keys, documents), kind


MASKS = {
    "causal": tile(((0, S),), ((0, S),)),
    "causal aligned": tile(((0, ALIGNED),), ((0, ALIGNED),)),
    "full": tile(((0, S),), ((0, S),), causal=False),
    "documents": (PACKED, PACKED, {}),
    "documents, full": (PACKED, PACKED, {"causal": False}),
    "window": tile(((0, S),), ((0, S),), window=13),
    "window, documents": (PACKED, PACKED, {"window": 7}),
    "one query": tile(((69, 70),), ((0, 70),)),
    "earlier keys": tile(((100, 170),), ((0, 70),)),
    "offset": tile(((33, 103),), ((0, 70),)),
    # Zigzag: an early and a late chunk of one rank against those of another, cut by documents; some queries see no key.
    "zigzag": tile(((0, 20), (60, 80)), ((20, 60),)),
    "zigzag, documents": tile(((10, 30), (60, 90)), ((0, 10), (30, 60), (90, 110)), (0, 5, 40, 70, 100)),
    "nothing": tile(((0, 20),), ((40, 60),)),
}


def fit(backend: str, dtype: torch.dtype, head_dim: int = 32, softcap: bool = False, bands: bool = False) -> None:
    """Skip the test if the backend's own table says that it cannot compute the case here."""
    case = Case(DEVICE, architecture(torch.device(DEVICE)), dtype, head_dim, 2, softcap)
    reason = BACKENDS[backend].unfit(case)
    remedy = "needs a CUDA GPU" if reason == "runs on CUDA" else "the backend does not support it on any device"
    if str(reason).endswith("is not installed"):
        remedy = "needs a CUDA GPU with that package"
    if reason is None and bands and backend == "cudnn":
        reason = "no sliding window"
    if reason is not None:
        pytest.skip(f"{backend}: {reason}; {remedy}")


def inputs(dtype, num_queries, num_keys, *, heads=4, kv_heads=2, dim=32, batch=BATCH) -> list[Tensor]:
    """Return q, k, v, dout: q, dout `[batch, num_queries, heads, dim]`, k, v `[batch, num_keys, kv_heads, dim]`."""
    generator = torch.Generator().manual_seed(num_queries * heads + kv_heads + dim)
    shapes = [(batch, n, h, dim) for n, h in [(num_queries, heads), *[(num_keys, kv_heads)] * 2, (num_queries, heads)]]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes]


def results(function, q, k, v, dout, **options) -> dict[str, Tensor]:
    """Return out and the gradients dq, dk, dv of an attention function."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = function(q, k, v, **options)
    out.backward(dout)
    return {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}


def compare(backend: str, dtype: torch.dtype, mask_name: str, **options) -> None:
    """Assert that out and gradients err at most twice as much as torch's own attention in the same dtype."""
    shape = {name: options.pop(name) for name in ("batch", "heads", "kv_heads", "dim") if name in options}
    queries, keys, kind = MASKS[mask_name]
    q, k, v, dout = inputs(dtype, queries.num_tokens, keys.num_tokens, **shape)
    visible = visible_pairs(queries, keys, **kind).to(DEVICE)
    mask = make_mask(queries, keys, device=DEVICE, **kind)
    double = [x.double() for x in (q, k, v, dout)]
    exact = results(lambda q, k, v, **o: exact_attention(q, k, v, visible, **o)[0], *double, **options)
    plain = results(lambda q, k, v, **o: torch_attention(q, k, v, visible, **o), q, k, v, dout, **options)
    got = results(lambda q, k, v, **o: attention(q, k, v, mask, backend=backend, **o), q, k, v, dout, **options)
    for name, gradient in exact.items():
        # With one visible key dq and dk are exactly 0; their rounding errors scale with dout v.
        if gradient.abs().max() < 1e-12:
            assert got[name].abs().max() <= 8 * torch.finfo(dtype).eps * dout.shape[-1]
            plain[name] = got[name] = exact[name]
    assert_as_exact_as(got, plain, exact, factor=2)

    _, lse = attention_forward(q, k, v, mask, backend=backend, **options)
    exact_lse = exact_attention(q, k, v, visible, **options)[1]
    assert lse.dtype == torch.float32
    # LongRing's backends sum probabilities in fp32: an lse of up to 10 is rounded by 1e-6 at each of a few steps.
    # torch's operators round each probability to dtype first, which changes the logarithm of the sum.
    atol = 1e-5 if backend in ("triton", "reference") else torch.finfo(dtype).eps / 2
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=max(atol, 1e-5))


# Every mask in fp32 with 2 kv heads, and three masks with all heads in fp32 and bf16; the rest of the product is slow.
MATRIX = list(product([4, 2, 1], DTYPES, MASKS))
THREE = ["documents", "window, documents", "zigzag, documents"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kv_heads", "dtype", "mask_name"),
    by_lane(
        MATRIX,
        quick=[(2, torch.float32, "window, documents"), (2, torch.bfloat16, "zigzag, documents")],
        slow=[
            (kv_heads, dtype, mask_name)
            for kv_heads, dtype, mask_name in MATRIX
            if dtype == torch.float16 or (mask_name not in THREE and (kv_heads != 2 or dtype != torch.float32))
        ],
    ),
    ids=str,
)
def test_masks_and_heads(backend, mask_name, dtype, kv_heads):
    fit(backend, dtype, bands="window" in mask_name)
    if backend == "triton" and kv_heads != 2 and dtype != torch.float32 and DEVICE == "cpu":
        pytest.skip("interpreted kernels are slow: 16 bit runs with 2 kv heads only; needs a CUDA GPU")
    compare(backend, dtype, mask_name, kv_heads=kv_heads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", by_lane([32, 64, 80, 96, 128, 192, 256], quick=[80]))
@pytest.mark.parametrize("dtype", by_lane(DTYPES, quick=[torch.bfloat16], slow=[torch.float16]), ids=str)
def test_head_dims(backend, dim, dtype):
    fit(backend, dtype, dim)
    compare(backend, dtype, "documents", batch=2, dim=dim, heads=2, kv_heads=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "mask_name", by_lane(["causal", "window, documents"], quick=["causal"], slow=["window, documents"])
)
@pytest.mark.parametrize(
    "options",
    by_lane([{"scale": 0.4}, {"softcap": 1.5}, {"scale": 0.3, "softcap": 20.0}], quick=[]),
)
def test_scale_and_softcap(backend, mask_name, options):
    fit(backend, torch.float32, softcap="softcap" in options, bands="window" in mask_name)
    compare(backend, torch.float32, mask_name, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", by_lane([torch.float32, torch.bfloat16], quick=[]), ids=str)
def test_running_result_is_extended(backend, dtype):
    """Four tiles of keys, in any order and into buffers of nan, give out, lse and gradients of the whole row."""
    fit(backend, dtype)
    q, k, v, dout = inputs(dtype, S, S)
    whole = PACKED
    visible = visible_pairs(whole, whole).to(DEVICE)
    exact = results(lambda q, k, v: exact_attention(q, k, v, visible)[0], *(x.double() for x in (q, k, v, dout)))
    plain = results(lambda q, k, v: torch_attention(q, k, v, visible), q, k, v, dout)
    running = no_result(q)
    out, lse = running
    out.fill_(torch.nan)
    tiles = [(start, stop, make_mask(whole, SeqLayout(((start, stop),), whole.document_starts), device=DEVICE))
             for start, stop in [(50, 70), (0, 16), (33, 50), (16, 33)]]  # fmt: skip
    for start, stop, mask in tiles:
        extended = attention_forward(q, k[:, start:stop], v[:, start:stop], mask, running=running, backend=backend)
        assert extended[0] is out and extended[1] is lse
    atol = 1e-5 if backend in ("triton", "reference") else torch.finfo(dtype).eps / 2
    torch.testing.assert_close(lse.double(), exact_attention(q, k, v, visible)[1], rtol=1e-5, atol=max(atol, 1e-5))

    # Gradients are added to buffers that are not zero, with the out and lse of all keys.
    dq, dk, dv = (torch.ones_like(zeros_fp32(x)) for x in (q, k, v))
    delta = row_delta(dout, out.to(dtype))
    for start, stop, mask in tiles:
        part = slice(start, stop)
        attention_backward(
            dout, q, k[:, part], v[:, part], lse, delta, mask, into=(dq, dk[:, part], dv[:, part]), backend=backend
        )
    got = {"out": out, "dq": dq - 1, "dk": dk - 1, "dv": dv - 1}
    assert_as_exact_as(got, plain, exact, factor=2)


@pytest.mark.parametrize("dtype", by_lane([torch.bfloat16, torch.float16], quick=[torch.bfloat16]), ids=str)
def test_gradients_in_16_bit_are_written(dtype):
    """Whatever the memory holds, they are the rounded sums that start from zeros."""
    layout = SeqLayout.packed((7, 33))
    mask = make_mask(layout, layout, device=DEVICE)
    q, k, v, dout = inputs(dtype, 40, 40, heads=2, kv_heads=1, dim=16, batch=1)
    out, lse = attention_forward(q, k, v, mask, backend="triton")
    sums = zeros_fp32(q), zeros_fp32(k), zeros_fp32(v)
    written = torch.full_like(q, torch.nan), torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
    for into in (sums, written):
        attention_backward(dout, q, k, v, lse, row_delta(dout, out), mask, into=into, backend="triton")
    for total, gradient in zip(sums, written, strict=True):
        assert total.any() and torch.equal(total.to(dtype), gradient)


@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_scales_that_are_not_above_0(scale):
    """The kernel takes the maximum of a row before it scales it."""
    mask = make_mask(PACKED, PACKED, device=DEVICE)
    q, k, v, _ = inputs(torch.float32, S, S, heads=1, kv_heads=1, dim=16, batch=1)
    got, expected = (attention_forward(q, k, v, mask, scale=scale, backend=x) for x in ("triton", "reference"))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.fixture
def equal_bits(backend) -> Iterator[None]:
    """Packages sum in a fixed order only if they are told to."""
    torch.use_deterministic_algorithms(backend not in ("triton", "torch_cpu", "reference"))
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.full
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend, equal_bits):
    """Views of a fused projection, tensors stored heads first, and base addresses not aligned to TMA's 16 bytes."""
    fit(backend, torch.float16)
    mask = make_mask(PACKED, PACKED, device=DEVICE)
    q, k, v, dout = inputs(torch.float16, S, S, batch=2, heads=2, kv_heads=2)
    expected = results(lambda q, k, v: attention(q, k, v, mask, backend=backend), q, k, v, dout)
    fused = torch.cat([q, k, v], dim=-1)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, dout)]
    shifted = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in (q, k, v, dout)]
    for views in ([*fused.split(32, -1), dout], heads_first, shifted):
        got = results(lambda q, k, v: attention(q, k, v, mask, backend=backend), *views)
        for name in expected:
            assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_element_is_written(backend):
    """No nan remains in the results when torch fills fresh memory with nan."""
    fit(backend, torch.bfloat16)
    queries, keys, kind = MASKS["zigzag, documents"]
    mask = make_mask(queries, keys, device=DEVICE, **kind)
    q, k, v, dout = inputs(torch.bfloat16, queries.num_tokens, keys.num_tokens, dim=80)
    torch.use_deterministic_algorithms(True)  # also fills fresh memory with nan
    try:
        assert torch.empty(4, device=DEVICE).isnan().all()
        got = results(lambda q, k, v: attention(q, k, v, mask, backend=backend), q, k, v, dout)
        _, lse = attention_forward(q, k, v, mask, backend=backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in got.values())
    assert not lse.isnan().any()
    unseeing = ~visible_pairs(queries, keys, **kind).any(1).to(DEVICE)
    assert unseeing.any() and not got["out"][:, unseeing].any() and lse[:, :, unseeing].isneginf().all()


@pytest.mark.full
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_runs_are_bit_equal(backend, equal_bits):
    fit(backend, torch.bfloat16)
    mask = make_mask(PACKED, PACKED, device=DEVICE)
    first, second = (
        results(lambda q, k, v: attention(q, k, v, mask, backend=backend), *inputs(torch.bfloat16, S, S))
        for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", ["triton", "torch_cpu"])
def test_invisible_blocks_are_not_visited(backend):
    """Keys outside all visited blocks may hold nan; a loop begins at its first visible key, not at a block boundary."""
    fit(backend, torch.float32)
    queries, keys = SeqLayout(((200, 264),), (0, 200)), SeqLayout(((0, 400),), (0, 200))
    mask = make_mask(queries, keys, device=DEVICE)
    q, k, v, dout = inputs(torch.float32, 64, 400)
    for x in (k, v):
        # A partly visible block of keys is read whole; no block has more than 128 keys.
        x[:, :72] = torch.nan
        x[:, 392:] = torch.nan
    got = results(lambda q, k, v: attention(q, k, v, mask, backend=backend), q, k, v, dout)
    assert all(x.isfinite().all() for x in got.values())
    assert not got["dk"][:, :200].any() and not got["dv"][:, 264:].any()


def test_rows_with_zero_dout_have_zero_dq():
    q, k, v, dout = inputs(torch.float32, S, S)
    dout[:, 5] = 0
    got = results(lambda q, k, v: attention(q, k, v, make_mask(PACKED, PACKED, device=DEVICE)), q, k, v, dout)
    assert not got["dq"][:, 5].any()
    assert got["dq"].isfinite().all()


def test_reference_is_exact_in_fp64():
    queries, keys, kind = MASKS["zigzag, documents"]
    q, k, v, dout = inputs(torch.float64, queries.num_tokens, keys.num_tokens)
    visible, mask = visible_pairs(queries, keys, **kind).to(DEVICE), make_mask(queries, keys, device=DEVICE, **kind)
    exact = results(lambda q, k, v: exact_attention(q, k, v, visible, softcap=3.0)[0], q, k, v, dout)
    got = results(lambda q, k, v: attention(q, k, v, mask, softcap=3.0, backend="reference"), q, k, v, dout)
    for name in exact:
        torch.testing.assert_close(got[name], exact[name], rtol=0, atol=1e-12)


def far(x: Tensor, dim: int) -> Tensor:
    """Return x with a stride of 2^30 elements in `dim`, in memory that is reserved but not touched between them."""
    strides = list(x.contiguous().stride())
    strides[dim] = 2**30
    storage = torch.empty(2**30 * (x.shape[dim] - 1) + x.numel(), dtype=x.dtype)
    return storage.as_strided(x.shape, strides).copy_(x)


@pytest.mark.skipif(
    DEVICE == "cuda", reason="CUDA allocates all memory that is addressed; benchmarks/gpu_check.py tests it there"
)
@pytest.mark.parametrize("dim", by_lane([0, 1, 2], quick=[1]), ids=["batch", "rows", "heads"])
@pytest.mark.parametrize("dtype", by_lane([torch.float16, torch.float32], quick=[torch.float16]), ids=str)
def test_offsets_beyond_32_bits(dim, dtype):
    """Inputs, running results and gradient buffers may span 2^31 elements and more in any dim."""
    mask = make_mask(SeqLayout.contiguous(3), SeqLayout.contiguous(3))
    q, k, v, dout = inputs(dtype, 3, 3, heads=3, kv_heads=3, dim=16, batch=3)

    def run(move) -> list[Tensor]:
        out, lse = no_result(q)
        running = (move(out), lse)
        qkv = move(q), move(k), move(v)
        out, lse = attention_forward(*qkv, mask, running=running, backend="triton")
        into = move(zeros_fp32(q)), move(zeros_fp32(k)), move(zeros_fp32(v))
        delta = triton_attention.row_delta(move(dout), out)
        attention_backward(move(dout), *qkv, lse, delta, mask, into=into, backend="triton")
        triton_attention.merge_(out, lse.clone(), move(dout).unsqueeze(0), lse.unsqueeze(0))
        return [out, lse, delta, *into]

    for got, expected in zip(run(lambda x: far(x, dim)), run(lambda x: x), strict=True):
        assert torch.equal(got, expected)


def test_backend_choice_is_logged_once_with_reasons(caplog):
    backends._choose.cache_clear()
    q = torch.zeros(1, 4, 2, 32)
    case = case_of(q, q)
    with caplog.at_level(logging.INFO, logger=backends.__name__):
        assert [choose_backend(case) for _ in range(3)] == ["torch_cpu"] * 3
        assert choose_backend(case_of(q.double(), q, softcap=2.0)) == "reference"
    assert caplog.messages == [
        "attention of float32 on cpu, head dim 32: torch_cpu",
        "attention of float64 on cpu, head dim 32, softcap: reference (torch_cpu: no softcap; "
        "triton: bfloat16, float16 and float32 only; cudnn: runs on CUDA; flash: runs on CUDA; "
        "flash_3: runs on CUDA; flash_4: runs on CUDA; cudnn_flex: runs on CUDA; gluon: runs on CUDA)",
    ]
    assert choose_backend(case, "reference") == "reference"
    unfit = (
        r"'flash': cannot compute float32 on cpu, head dim 32 \(runs on CUDA\); set backend = \"auto\" \(in a recipe"
    )
    with pytest.raises(ValueError, match=unfit):
        choose_backend(case, "flash")
    with pytest.raises(
        ValueError, match="'tritn': must be one of auto, torch_cpu, triton, cudnn, flash, flash_3, flash_4, "
    ):
        choose_backend(case, "tritn")


def test_cudnn_is_refused_by_name_where_algorithms_must_be_deterministic():
    q = torch.zeros(1, 4, 2, 32, dtype=torch.bfloat16)
    on_gpu = {"device": "cuda", "arch": "sm_90"}
    assert choose_backend(case_of(q, q)._replace(**on_gpu), "cudnn") == "cudnn"
    torch.use_deterministic_algorithms(True)
    try:
        case = case_of(q, q)._replace(**on_gpu)
    finally:
        torch.use_deterministic_algorithms(False)
    with pytest.raises(
        ValueError, match=r"'cudnn': cannot compute .* \(its backward has no fixed order of sums in torch"
    ):
        choose_backend(case, "cudnn")
    assert choose_backend(case) == "triton", "the advice of the error"


def test_bad_shapes_raise():
    q, k, v, _ = inputs(torch.float32, S, S, heads=4, kv_heads=3)
    with pytest.raises(ValueError, match="4 query heads over 3 kv heads: the number of query heads must be a multiple"):
        attention(q, k, v, make_mask(PACKED, PACKED, device=DEVICE))
    short = SeqLayout.contiguous(S - 1)
    with pytest.raises(ValueError, match="must fit the mask of 69 queries and 69 keys"):
        attention(q, k, v, make_mask(short, short, device=DEVICE))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_queries_and_keys_of_two_kinds_are_refused(backend):
    """A kernel would read beyond the smaller tensor."""
    q, k, v, _ = inputs(torch.float32, S, S, heads=4, kv_heads=2)
    mask = make_mask(PACKED, PACKED, device=DEVICE)
    attention(q, k, v, mask, backend=backend)
    for unlike in (
        (torch.cat([q, q]), k, v),  # another batch
        (q, k[..., :16], v[..., :16]),  # another head dim
        (q, k.double(), v.double()),
        (q, k, v.double()),
        (q[0], k[0], v[0]),
    ):
        advice = "of one batch, head dim and dtype; expand or cast those that differ"
        with pytest.raises(ValueError, match=advice):
            attention(*unlike, mask, backend=backend)
    with pytest.raises(ValueError, match="4 query heads over 0 kv heads.*; repeat the heads of k and v until it is"):
        attention(q, k[:, :, :0], v[:, :, :0], mask, backend=backend)
    with pytest.raises(ValueError, match="softcap = -1.0: must be at least 0; leave it out for none"):
        attention(q, k, v, mask, softcap=-1.0, backend=backend)


def test_window_error_names_a_backend_that_computes_it():
    """The error is raised before the operator runs, so it needs no GPU; `triton` then computes the same tile."""
    queries, keys, kind = MASKS["window"]
    mask = make_mask(queries, keys, device=DEVICE, **kind)
    q, k, v, _ = inputs(torch.float32, S, S)
    with pytest.raises(ValueError, match='cudnn.*: cannot .*; set backend = "triton"'):
        forward(CUDNN, q, k, v, mask, 1.0, 0.0, None)
    assert attention(q, k, v, mask, backend="triton").isfinite().all()


def test_a_selection_gives_each_kind_of_tile_to_its_backend(monkeypatch):
    """`longring train` passes on what it has measured as one text, through torch.compile too."""
    called: list[tuple[str, str]] = []

    def noted(name):
        exact = BACKENDS["reference"]
        return exact._replace(
            forward=lambda *given: called.append((name, "forward")) or exact.forward(*given),
            backward=lambda *given: called.append((name, "backward")) or exact.backward(*given),
        )

    for name in ("torch_cpu", "cudnn", "flash"):
        monkeypatch.setitem(BACKENDS, name, noted(name))
    chosen: dict[tuple[Task, Kind], str] = {
        ("forward", "causal"): "cudnn",
        ("backward", "causal"): "flash",
        ("continued", "causal"): "torch_cpu",
    }
    text = str(Selection("torch_cpu", chosen))
    assert text == "torch_cpu; forward causal: cudnn; backward causal: flash"
    assert Selection.parse(text) == ("torch_cpu", {("forward", "causal"): "cudnn", ("backward", "causal"): "flash"})
    assert Selection.parse("triton") == ("triton", {})
    q, k, v, dout = inputs(torch.float32, S, S)
    for name in ("causal", "documents"):
        queries, keys, kind = MASKS[name]
        mask = make_mask(queries, keys, device=DEVICE, **kind)
        results(lambda q, k, v, mask=mask: attention(q, k, v, mask, backend=text), q, k, v, dout)
    attention_forward(q, k, v, make_mask(*MASKS["causal"][:2], device=DEVICE), running=no_result(q), backend=text)
    assert called == [("cudnn", "forward"), ("flash", "backward"), ("torch_cpu", "forward"), ("torch_cpu", "backward"),
                      ("torch_cpu", "forward")]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["forward", "forward causal:cudnn", "forward round: cudnn", "forward causal: x",
     "forward causal: cudnn; forward causal: flash"],
)  # fmt: skip
def test_a_text_that_is_no_selection_is_an_error_that_names_its_part(text):
    with pytest.raises(ValueError, match=f"{text.split('; ')[-1]!r} names no backend of a kind of tile, or a second"):
        Selection.parse(f"triton; {text}")


def test_a_tile_that_the_chosen_backend_cannot_compute_goes_to_the_default(monkeypatch):
    """Heads divided among ranks are fewer than those with which backends were measured."""
    monkeypatch.setitem(BACKENDS, "flash", BACKENDS["flash"]._replace(unfit=lambda case: f"{case.num_kv_heads} heads"))
    mask = make_mask(*MASKS["causal"][:2], device=DEVICE)
    q = torch.zeros(1, S, 2, 32, device=DEVICE)
    backends._fits.cache_clear()
    selection = Selection("torch_cpu", {("forward", "causal"): "flash"})
    assert selection.of_tile(case_of(q, q), "forward", mask) == "torch_cpu"
    monkeypatch.setitem(BACKENDS, "flash", BACKENDS["flash"]._replace(unfit=lambda case: None))
    backends._fits.cache_clear()
    assert selection.of_tile(case_of(q, q), "forward", mask) == "flash"
    backends._fits.cache_clear()
