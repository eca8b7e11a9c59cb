"""Masks as packed bands, and the backends of packages that compute them, with the definition in place of the package.

The fakes have the parameters that the packages' functions have and no others, so that a call with another name fails;
where a package is installed, its own signature is compared.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import band_kernels
from helpers.plain_attention import exact_attention, visible_pairs
from hypothesis import given
from hypothesis import strategies as st
from longring.kernels import backends, cudnn_flex, flash_3, flash_4, packages, reference, torch_flash, varlen
from longring.kernels.attention import (
    attention,
    attention_backward,
    attention_forward,
    no_result,
    row_delta,
    zeros_fp32,
)
from longring.kernels.backends import BACKENDS, Backend
from longring.kernels.case import Case
from longring.kernels.layout import SeqLayout
from longring.kernels.mask import Mask, make_mask
from longring.kernels.varlen import calls_of, kind_of, some_see_nothing
from torch.torch_version import TorchVersion

PACKED = SeqLayout.packed((20, 1, 30, 19))
TILES = {
    "causal": (SeqLayout.contiguous(70), SeqLayout.contiguous(70), {}),
    "whole": (SeqLayout(((80, 140),)), SeqLayout.contiguous(70), {}),
    "window": (SeqLayout.contiguous(70), SeqLayout.contiguous(70), {"window": 13}),
    "leaving a window": (SeqLayout(((60, 90),)), SeqLayout.contiguous(70), {"window": 25}),
    "documents": (PACKED, PACKED, {}),
    "documents, window": (PACKED, PACKED, {"window": 7}),
    "zigzag": (
        SeqLayout(((10, 30), (60, 90)), (0, 5, 40, 70, 100)),
        SeqLayout(((0, 10), (30, 60), (90, 110)), (0, 5, 40, 70, 100)),
        {},
    ),
}


@st.composite
def tiles(draw, num_tokens: int = 40) -> Mask:
    """Draw the mask of a tile, with arbitrary runs, documents and windows."""
    starts = (0, *sorted(draw(st.sets(st.integers(1, num_tokens - 1), max_size=6))))

    def layout() -> SeqLayout:
        edges = sorted(draw(st.sets(st.integers(0, num_tokens), min_size=2, max_size=6)))
        return SeqLayout(tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=False)), starts)

    causal = draw(st.booleans())
    window = draw(st.none() | st.integers(1, 45)) if causal else None
    return make_mask(layout(), layout(), causal=causal, window=window)


def pairs(mask: Mask) -> np.ndarray:
    """Return the visible pairs, bool [s_q, s_k]."""
    start, stop = mask.host_rows.numpy()[:, :, None]
    keys = np.arange(mask.columns.shape[1])
    return (start <= keys) & (keys < stop)


@given(tiles())
def test_calls_cover_each_visible_pair_once_and_no_row_twice(mask):
    count, rows = np.zeros(pairs(mask).shape, int), np.zeros(mask.rows.shape[1], int)
    for call in calls_of(mask):
        assert (call.left or 0) >= 0 and (call.right or 0) >= 0, "below 0 stands for no bound"
        part, rows[call.rows] = count[call.rows, call.keys], rows[call.rows] + 1
        query_starts, key_starts = [0, part.shape[0]], [0, part.shape[1]]
        if call.query_starts is not None and call.key_starts is not None:
            query_starts, key_starts = call.query_starts.tolist(), call.key_starts.tolist()
            assert np.diff(query_starts).max() == call.most_queries and np.diff(key_starts).max() == call.most_keys
        most_keys = call.most_keys or part.shape[1]
        assert max(call.left or 0, call.right or 0) < most_keys, "FlashAttention-2 takes larger bounds for none"
        for a, b, c, d in zip(query_starts, query_starts[1:], key_starts, key_starts[1:], strict=False):
            assert b > a and d > c, "no band is empty"
            band = part[a:b, c:d]
            start, stop = band_kernels.band_mask(b - a, d - c, call.left, call.right).rows.numpy()[:, :, None]
            seen = (start <= np.arange(d - c)) & (np.arange(d - c) < stop)
            assert seen.any(1).all(), "every query of a band sees a key"
            band += seen
    np.testing.assert_array_equal(count, pairs(mask))
    assert rows.max(initial=0) <= 1


def test_common_masks_are_one_call():
    whole, kinds = SeqLayout.contiguous(4096), {}
    packed = SeqLayout.packed((1000, 96, 1, 2999))
    for name, queries, window in (
        ("causal", whole, None), ("window", whole, 256), ("documents", packed, None), ("documents", packed, 256)
    ):  # fmt: skip
        mask = make_mask(queries, queries, window=window)
        [call] = calls_of(mask)
        assert (call.right, call.left) == (0, window and window - 1)
        kinds[name] = kind_of(mask)
    assert kinds == {name: name for name in kinds}
    assert kind_of(make_mask(SeqLayout(((4096, 5000),)), whole)) == "whole"


def test_what_a_mask_is_does_not_take_longer_for_many_documents(monkeypatch):
    class Bands(list):
        def __iter__(self):
            raise AssertionError("all bands are read")

    mask = make_mask(PACKED, PACKED, window=5)
    groups = [*map(Bands, varlen._groups_of(mask))]
    monkeypatch.setattr(varlen, "_groups_of", lambda mask: groups)
    assert kind_of(mask) == "documents" and not some_see_nothing(mask)


def test_rows_of_a_mask_are_read_once_for_all_layers_and_passes(definitions, monkeypatch):
    queries, keys, kind = TILES["zigzag"]
    made = make_mask(queries, keys, **kind)
    mask = Mask(made.rows, made.columns, made.host_rows.clone())
    q, k, v = (torch.ones(1, side.num_tokens, 2, 16) for side in (queries, keys, keys))

    def result(backend: str) -> torch.Tensor:
        into = (zeros_fp32(q), zeros_fp32(k), zeros_fp32(v))
        out, lse = attention_forward(q, k, v, mask, backend=backend)
        attention_backward(q, q, k, v, lse, None, mask, into=into, out=out, backend=backend)
        return torch.cat([x.flatten() for x in (out, lse, *into)])

    first = {name: result(name) for name in ("flash_4", "cudnn_flex", "torch_cpu")}
    assert some_see_nothing(mask) and all(found.isneginf().any() for found in first.values())
    mask.host_rows[0], mask.host_rows[1] = 0, 1  # whoever reads them again finds another mask
    for name, found in first.items():
        assert torch.equal(result(name), found)


def test_calls_are_made_once_for_all_layers_and_passes(monkeypatch):
    made: list[str] = []
    monkeypatch.setattr("longring.kernels.varlen._groups", lambda rows: made.append("calls") or [])
    nothing = varlen.Kernel(lambda *_: None, lambda *_: None)  # type: ignore  # is not called: there are no calls
    both = (partial(varlen.forward, nothing), partial(varlen.backward, nothing))
    monkeypatch.setitem(BACKENDS, "nothing", Backend(lambda case: None, *both))
    layout = SeqLayout.contiguous(8)
    mask = make_mask(layout, layout)
    mask = Mask(mask.rows, mask.columns, mask.host_rows.clone())  # make_mask keeps its own
    q, k, v = (torch.zeros(1, 8, 2, 16, requires_grad=True) for _ in range(3))
    for _ in range(3):
        attention(q, k, v, mask, backend="nothing").sum().backward()
    assert made == ["calls"]


def flash_module() -> types.SimpleNamespace:
    """Torch's operators of FlashAttention-2, by definition."""

    def forward(q, k, v, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale,
                window_size_left, window_size_right):  # fmt: skip
        assert is_causal == ((window_size_left, window_size_right) == (-1, 0)) and not dropout_p
        bands = (window_size_left, window_size_right, cum_seq_q, cum_seq_k)
        return *band_kernels.forward(q, k, v, bands, scale, 0.0), None, None, None

    def backward(grad_out, q, k, v, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
                 unused, *, scale, window_size_left, window_size_right):  # fmt: skip
        bands = (window_size_left, window_size_right, cum_seq_q, cum_seq_k)
        return band_kernels.backward(grad_out, q, k, v, out, logsumexp, None, bands, scale, 0.0)

    return types.SimpleNamespace(_flash_attention_forward=forward, _flash_attention_backward=backward)


def flash_3_module() -> types.ModuleType:
    """FlashAttention-3's module, by definition; the parameters are those of its functions that are called."""

    def _flash_attn_forward(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                            softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
                            softcap=0.0):  # fmt: skip
        bands = (window_size_left, window_size_right, cu_seqlens_q, cu_seqlens_k)
        return *band_kernels.forward(q, k, v, bands, softmax_scale, softcap), None, None

    def _flash_attn_backward(dout, q, k, v, out, softmax_lse,  cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
                             max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
                             window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False):  # fmt: skip
        bands = (window_size_left, window_size_right, cu_seqlens_q, cu_seqlens_k)
        grads = band_kernels.backward(dout, q, k, v, out, softmax_lse, None, bands, softmax_scale, softcap)
        for result, grad in zip((dq, dk, dv), grads, strict=True):
            result.copy_(grad)  # type: ignore[union-attr]

    return module(flash_3.MODULE, _flash_attn_forward, _flash_attn_backward)


def flash_4_module() -> types.ModuleType:
    """FlashAttention-4's module, by definition."""

    def _flash_attn_fwd(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                        softmax_scale=None, causal=False, softcap=None, window_size_left=None, window_size_right=None,
                        return_lse=False):  # fmt: skip
        assert return_lse
        bands = (window_size_left, 0 if causal else window_size_right, cu_seqlens_q, cu_seqlens_k)
        return *band_kernels.forward(q, k, v, bands, softmax_scale, softcap), None, None, None

    def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
                        window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
                        max_seqlen_k=None, deterministic=False, dlse=None):  # fmt: skip
        bands = (window_size_left, 0 if causal else window_size_right, cu_seqlens_q, cu_seqlens_k)
        return band_kernels.backward(dout, q, k, v, out, lse, dlse, bands, softmax_scale, softcap)

    return module(flash_4.MODULE, _flash_attn_fwd, _flash_attn_bwd)


def flex_modules() -> list[types.ModuleType]:
    """The modules of cuDNN's FlexAttention, by definition; a plan is the mask that it was made of."""

    def create_mask_plan(mask_func, q, k, v, *, build_backward=None):
        assert mask_func.shape == (1, 3, len(q) * q.shape[1]) and mask_func.dtype == torch.int32 and build_backward
        assert mask_func.is_contiguous() and not mask_func[:, 0].any()
        rows = mask_func[0, 1:].view(2, len(q), -1)
        assert (rows == rows[:, :1]).all(), "every sequence of the batch has the mask"
        return Mask(rows[:, 0], rows[:, 0], rows[:, 0])

    def _flex_attention_forward(q_tensor, k_tensor, v_tensor, *, mask_plan, softmax_scale=None, return_lse=False):
        out, lse = reference.forward(q_tensor, k_tensor, v_tensor, mask_plan, softmax_scale or 1.0, 0.0, None)
        unseeing = mask_plan.rows[0] >= mask_plan.rows[1]
        return out.masked_fill(unseeing[:, None, None], 7.0), lse.masked_fill(unseeing, torch.nan), None

    def _flex_attention_backward(q_tensor, k_tensor, v_tensor, o_tensor, do_tensor, lse_tensor, *, mask_plan,
                                 softmax_scale=None, deterministic=False, dlse_tensor=None):  # fmt: skip
        assert lse_tensor.isfinite().all()
        delta = (do_tensor.float() * o_tensor.float()).sum(-1).transpose(1, 2)
        delta = delta if dlse_tensor is None else delta - dlse_tensor
        grads = zeros_fp32(q_tensor), zeros_fp32(k_tensor), zeros_fp32(v_tensor)
        of_rows = (do_tensor, q_tensor, k_tensor, v_tensor, None, lse_tensor, delta, mask_plan)
        reference.backward(*of_rows, softmax_scale or 1.0, 0.0, grads)
        return tuple(x.to(q_tensor.dtype) for x in grads)

    return [
        module(cudnn_flex.PLANS, create_mask_plan),
        module(cudnn_flex.EXECUTION, _flex_attention_forward, _flex_attention_backward),
    ]


def module(name: str, *functions: Any) -> types.ModuleType:
    """Return a module with these functions."""
    made = types.ModuleType(name)
    for function in functions:
        setattr(made, function.__name__, function)
    return made


@pytest.fixture
def definitions(monkeypatch) -> Iterator[None]:
    """The definition of attention in place of all packages, and backends that run on this machine."""
    monkeypatch.setattr(torch_flash, "aten", flash_module())
    for made in (flash_3_module(), flash_4_module(), *flex_modules()):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    for name in ("flash", "flash_3", "flash_4", "cudnn_flex"):
        monkeypatch.setitem(BACKENDS, name, BACKENDS[name]._replace(unfit=lambda case: None))
    backends._choose.cache_clear()
    yield
    backends._choose.cache_clear()


@pytest.mark.parametrize("backend", ["flash", "flash_3", "flash_4", "cudnn_flex"])
@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("batch", [1, 2])
def test_packages_get_tiles_whose_results_are_those_of_the_definition(definitions, backend, name, batch):
    """In fp32, where the definition itself rounds little: a wrong band, scale, delta or row shows."""
    queries, keys, kind = TILES[name]
    mask, softcap = make_mask(queries, keys, **kind), 2.0 if backend in ("flash_3", "flash_4") else 0.0
    generator = torch.Generator().manual_seed(0)
    q, dout = torch.randn(2, batch, queries.num_tokens, 4, 16, generator=generator)
    k, v = torch.randn(2, batch, keys.num_tokens, 2, 16, generator=generator)
    options: dict[str, Any] = {"scale": 0.3, "softcap": softcap}
    visible = visible_pairs(queries, keys, **kind)
    exact_out, exact_lse = exact_attention(q, k, v, visible, **options)

    out, lse = attention_forward(q, k, v, mask, backend=backend, **options)
    torch.testing.assert_close(out.double(), exact_out, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-5)

    def gradients(backend: str, **given: Any) -> list[torch.Tensor]:
        into = (zeros_fp32(q), zeros_fp32(k), zeros_fp32(v))
        attention_backward(dout, q, k, v, lse_of_row, into=into, backend=backend, mask=mask, **given, **options)
        return list(into)

    # Continued: the row has other keys too, so that lse and delta are not those of the tile.
    running = no_result(q)
    running[0].copy_(dout)
    running[1].copy_(torch.randn(running[1].shape, generator=generator))
    found = [
        attention_forward(q, k, v, mask, running=(running[0].clone(), running[1].clone()), backend=one, **options)
        for one in (backend, "reference")
    ]
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    out_of_row, lse_of_row = found[1]
    for rest in ({"delta": row_delta(dout, out_of_row)}, {"delta": None, "out": out_of_row}):
        for got, expected in zip(gradients(backend, **rest), gradients("reference", **rest), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("backend", ["flash", "flash_4", "cudnn_flex", "reference"])
@pytest.mark.parametrize("name", ["causal", "documents", "leaving a window", "zigzag"])
def test_gradients_in_16_bit_are_written(definitions, backend, name):
    """Whatever the memory holds, they are the rounded sums that start from zeros, in one call or several."""
    queries, keys, kind = TILES[name]
    mask = make_mask(queries, keys, **kind)
    q, dout = torch.randn(2, 1, queries.num_tokens, 2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    k, v = torch.randn(2, 1, keys.num_tokens, 1, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    out, lse = attention_forward(q, k, v, mask, backend=backend)
    sums = zeros_fp32(q), zeros_fp32(k), zeros_fp32(v)
    written = torch.full_like(q, torch.nan), torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
    for into in (sums, written):
        attention_backward(dout, q, k, v, lse, None, mask, into=into, out=out, backend=backend)
    for total, gradient in zip(sums, written, strict=True):
        assert total.any() and torch.equal(total.bfloat16(), gradient)


@pytest.mark.parametrize("packed", [False, True])
def test_torch_takes_the_arguments_of_its_flash_operators(packed):
    """On meta tensors torch checks the arguments by its own schema, and tells the shapes that CUDA returns."""
    layout = SeqLayout.packed((16, 48)) if packed else SeqLayout.contiguous(64)
    [call] = calls_of(make_mask(layout, layout, window=9))
    shape = (64, 4, 32) if packed else (2, 64, 4, 32)
    q, k, v, dout = torch.empty(4, *shape, dtype=torch.bfloat16, device="meta")
    k, v = k[..., :2, :], v[..., :2, :]
    if call.query_starts is not None and call.key_starts is not None:
        call = call._replace(query_starts=call.query_starts.to("meta"), key_starts=call.key_starts.to("meta"))
    out, lse = torch_flash.KERNEL.forward(q, k, v, call, 0.3, 0.0)
    assert out.shape == q.shape and lse.shape == ((4, 64) if packed else (2, 4, 64)) and lse.dtype == torch.float32
    grads = torch_flash.KERNEL.backward(dout, q, k, v, out, lse, None, call, 0.3, 0.0)
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize(
    ("distribution", "module", "functions"),
    [
        (flash_3.DISTRIBUTION, flash_3.MODULE, flash_3.FUNCTIONS),
        (flash_4.DISTRIBUTION, flash_4.MODULE, flash_4.FUNCTIONS),
        (cudnn_flex.DISTRIBUTION, cudnn_flex.PLANS, cudnn_flex.PLAN_FUNCTIONS),
        (cudnn_flex.DISTRIBUTION, cudnn_flex.EXECUTION, cudnn_flex.FUNCTIONS),
    ],
)
def test_installed_packages_have_the_functions_that_are_called(distribution, module, functions):
    if packages.installed(distribution) is None:
        pytest.skip(f"{distribution} is not installed: run this test on a machine with a CUDA GPU and that package")
    assert packages.unfit_package(distribution, module, functions) is None


def test_a_package_is_refused_for_what_it_lacks(monkeypatch):
    def found(module: str, functions: Any) -> str | None:
        return packages.unfit_package.__wrapped__("pytest", module, functions)

    assert found("pytest", (("main", ("args", "plugins")),)) is None
    assert str(found("pytest", (("main", ("args", "dlse")),))).endswith(": main has no parameter dlse")
    assert str(found("pytest", (("mean", ()),))).endswith(": pytest has no mean")
    assert "pytest.absent cannot be imported: ModuleNotFoundError" in str(found("pytest.absent", ()))
    assert packages.unfit_package("not-a-distribution", "absent", ()) == "not-a-distribution is not installed"


def test_what_is_not_asked_for_is_not_imported(monkeypatch):
    """The choice of "auto" ends at the first backend that fits; on other devices no package is looked for."""
    monkeypatch.setattr(packages, "unfit_package", None)
    for name in ("flash_3", "flash_4", "cudnn_flex"):
        monkeypatch.setattr(f"longring.kernels.{name}.unfit_package", None)  # None: a call would raise
    case = Case("cuda", "sm_90", torch.bfloat16, 128, 8, False)
    backends._choose.cache_clear()
    assert backends._choose(case, "auto") == "triton"
    assert BACKENDS["flash_4"].unfit(case._replace(device="cpu")) == "runs on CUDA"
    backends._choose.cache_clear()


@pytest.mark.parametrize(
    ("backend", "changed", "reason"),
    [
        ("flash", {"arch": "sm_75"}, "runs on sm_80 and later, not on sm_75"),
        ("flash", {"arch": "gfx942"}, "runs on NVIDIA GPUs, not on gfx942"),
        ("flash", {"softcap": True}, "no softcap"),
        ("flash_3", {"arch": "sm_100"}, "runs on sm_90, not on sm_100"),
        ("flash_4", {"arch": "sm_80"}, "runs on sm_90 and later, not on sm_80"),
        ("flash_4", {"arch": "sm_100", "head_dim": 256}, "head dims above 128 on sm_90 only"),
        ("cudnn_flex", {"arch": "sm_120"}, "runs on sm_90, sm_100, sm_103, not on sm_120"),
        ("cudnn_flex", {"head_dim": 192}, "head dims up to 128, and 256"),
        ("cudnn", {"arch": "sm_100", "num_kv_heads": 4}, "wrong results with fewer than 8 kv heads"),
        ("cudnn", {"dtype": torch.float32}, "bfloat16 and float16 only"),
        ("cudnn", {"deterministic": True}, "its backward has no fixed order of sums in torch"),
        ("flash_4", {"arch": "sm_120", "deterministic": True}, "its backward has no fixed order of sums on sm_120"),
    ],
)
def test_known_faults_and_limits_are_told(backend, changed, reason):
    case = Case("cuda", "sm_90", torch.bfloat16, 128, 8, False)
    assert str(BACKENDS[backend].unfit(case._replace(**changed))).startswith(reason)


@pytest.mark.parametrize(
    ("version", "wrong"), [("2.9.1", False), ("2.11.0", True), ("2.11.0a0+nv26.1", True), ("2.13.0+cu130", True)]
)
def test_a_pre_release_has_the_faults_of_its_release(monkeypatch, version, wrong):
    """NVIDIA's images have such versions of torch, and torch sorts them before the release."""
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    reason = BACKENDS["cudnn"].unfit(Case("cuda", "sm_100", torch.bfloat16, 128, 4, False))
    assert (reason is not None) == wrong
