"""One tile of attention, forward and backward, against fp64 written out."""

from __future__ import annotations

import pytest
import torch
from errors import assert_as_exact_as, torch_attention, with_gradients
from longring.kernels.attention import (
    attention,
    attention_backward,
    attention_forward,
    reference_attention,
    row_delta,
    zeros_fp32,
)
from longring.kernels.layout import SeqLayout, causal_relation
from longring.kernels.merge import merge_
from torch import Tensor

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# Flash kernels on CUDA take 16 bit only.
CASES = [(d, t) for d in DEVICES for t in (torch.float32, torch.bfloat16) if (d, t) != ("cuda", torch.float32)]


def inputs(dtype, device, *, batch=2, tokens=96, heads=4, kv_heads=4, dim=32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens * heads + kv_heads)
    shapes = [(batch, tokens, heads, dim), *[(batch, tokens, kv_heads, dim)] * 2, (batch, tokens, heads, dim)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


@pytest.mark.parametrize(("device", "dtype"), CASES)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tokens", [1, 63, 96])
def test_whole_sequence(device, dtype, kv_heads, tokens):
    q, k, v, dout = inputs(dtype, device, tokens=tokens, kv_heads=kv_heads)
    layout = SeqLayout.contiguous(tokens)
    written_out = lambda *x: reference_attention(*x, layout, layout)[0]  # noqa: E731
    exact = with_gradients(written_out, torch.float64, q, k, v, dout)
    plain = with_gradients(torch_attention, dtype, q, k, v, dout)
    got = with_gradients(lambda *x: attention(*x, layout), dtype, q, k, v, dout)
    if tokens == 1:  # one visible key: dq and dk are zero but for rounding, which has no relative error
        for name in ("dq", "dk"):
            assert got.pop(name).abs().max() <= 1e-2
            del plain[name], exact[name]
        torch.testing.assert_close(got["out"].double(), exact["out"], rtol=0, atol=0)
        return
    assert_as_exact_as(got, plain, exact, factor=2)


@pytest.mark.parametrize(("device", "dtype"), CASES)
def test_tiles_add_up_to_the_whole(device, dtype):
    """Front and back queries, tile by tile, merged: out, lse and gradients of the whole sequence."""
    q, k, v, dout = inputs(dtype, device, kv_heads=2)
    half = q.shape[1] // 2
    front, back, whole = SeqLayout(((0, half),)), SeqLayout(((half, 2 * half),)), SeqLayout.contiguous(2 * half)
    written_out = lambda *x: reference_attention(*x, whole, whole)[0]  # noqa: E731
    exact = with_gradients(written_out, torch.float64, q, k, v, dout)
    plain = with_gradients(torch_attention, dtype, q, k, v, dout)
    exact_lse = reference_attention(q.double(), k.double(), v.double(), whole, whole)[1]

    out_front, lse_front = attention_forward(q[:, :half], k[:, :half], v[:, :half], front, front)
    own, lse = attention_forward(q[:, half:], k[:, half:], v[:, half:], back, back)
    own = own.to(torch.float32).clone()
    merge_(own, lse, *attention_forward(q[:, half:], k[:, :half], v[:, :half], back, front))
    out = torch.cat([out_front.float(), own], dim=1)
    lse = torch.cat([lse_front, lse], dim=2)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=2e-6 if dtype is torch.float32 else 2e-2)

    # Gradients add into buffers that already hold something.
    total = [torch.ones_like(zeros_fp32(x)) for x in (q, k, v)]
    delta = row_delta(dout, out.to(dtype))
    for rows, columns, queries, keys in [
        (slice(0, half), slice(0, half), front, front),
        (slice(half, None), slice(half, None), back, back),
        (slice(half, None), slice(0, half), back, front),
    ]:
        attention_backward(
            dout[:, rows], q[:, rows], k[:, columns], v[:, columns], lse[:, :, rows], delta[:, :, rows], queries, keys,
            into=(total[0][:, rows], total[1][:, columns], total[2][:, columns]),
        )  # fmt: skip
    got = {"out": out, "dq": total[0] - 1, "dk": total[1] - 1, "dv": total[2] - 1}
    assert_as_exact_as(got, plain, exact, factor=2)


def test_rows_without_gradient_get_none():
    q, k, v, dout = inputs(torch.float32, "cpu")
    dout[:, 5] = 0
    got = with_gradients(lambda *x: attention(*x, SeqLayout.contiguous(96)), torch.float32, q, k, v, dout)
    assert not got["dq"][:, 5].any()
    assert torch.isfinite(got["dq"]).all()


def test_merge_is_stable_for_extreme_results():
    """A part whose weight is nothing (or everything) leaves the running result alone (or replaces it)."""
    out, part = torch.ones(1, 3, 1, 2), torch.full((1, 3, 1, 2), 5.0)
    lse = torch.tensor([[[0.0, 1e4, -1e4]]])
    merge_(out, lse, part, torch.tensor([[[0.0, -1e4, 1e4]]]))
    assert out[0, :, 0, 0].tolist() == [3.0, 1.0, 5.0]
    torch.testing.assert_close(lse, torch.tensor([[[0.6931472, 1e4, 1e4]]]))


@pytest.mark.parametrize(
    ("queries", "keys", "relation"),
    [
        (((0, 4), (12, 16)), ((0, 4), (12, 16)), "causal"),
        (((12, 16),), ((0, 4), (8, 12)), "full"),
        (((4, 8), (8, 12)), ((0, 4),), "full"),
        (((0, 4),), ((4, 8),), "none"),
    ],
)
def test_relation(queries, keys, relation):
    assert causal_relation(SeqLayout(queries), SeqLayout(keys)) == relation


def test_bad_shapes_and_layouts_are_named():
    q, k, v, _ = inputs(torch.float32, "cpu", heads=4, kv_heads=3)
    whole = SeqLayout.contiguous(96)
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3 kv heads"):
        attention(q, k, v, whole)
    with pytest.raises(ValueError, match="do not fit layouts of 95 queries"):
        attention(q, k, v, SeqLayout.contiguous(95))
    q = q[:, :, :3]
    with pytest.raises(ValueError, match="neither full, diagonal nor empty"):
        attention_forward(q, k, v, SeqLayout(((1, 97),)), whole)
    with pytest.raises(ValueError, match="ascend"):
        SeqLayout(((4, 8), (0, 4)))
