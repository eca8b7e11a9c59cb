"""Cases of attention that several benchmarks time, and their inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from longring.kernels.layout import SeqLayout
from longring.kernels.mask import Mask, make_mask
from torch import Tensor

from .script import Size


class Case(NamedTuple):
    """One attention: q has shape [batch, tokens, heads, head_dim], k and v have `kv_heads` heads."""

    mask: str
    tokens: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    flex: bool = False
    """Time FlexAttention as well: it is compiled anew for each case, which takes longer than everything else."""


def document_tokens(tokens: int) -> tuple[int, ...]:
    """Return the lengths of packed documents, log-uniform from tokens / 128 to tokens / 4, equal at every call."""
    generator = torch.Generator().manual_seed(tokens)
    found, left = [], tokens
    while left:
        drawn = int(tokens / 128 * 32 ** torch.rand((), generator=generator).item())
        found.append(min(left, max(1, drawn)))
        left -= found[-1]
    return tuple(found)


def layout_of(case: Case) -> SeqLayout:
    """Return the layout of the whole sequence."""
    packed = document_tokens(case.tokens) if case.mask == "documents" else (case.tokens,)
    return SeqLayout.packed(packed)


def mask_of(case: Case, device: str) -> Mask:
    """Return the mask of all queries and all keys; "documents" is causal within each document."""
    whole = layout_of(case)
    return make_mask(whole, whole, causal=case.mask != "full", device=device)


def inputs(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k and v, which require gradients, and dout: [batch, tokens, heads or kv_heads, head_dim]."""
    generator = torch.Generator(device).manual_seed(0)
    shape = {"generator": generator, "device": device, "dtype": getattr(torch, case.dtype)}
    q, k, v, dout = (
        torch.randn((case.batch, case.tokens, heads, case.head_dim), **shape)
        for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)
    )
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


def cuda_cases(size: Size) -> list[Case]:
    """Return the cases for a GPU: those of the bars first, the longest last, where a deadline may cut them off."""

    def case(mask: str, tokens: int, head_dim: int, grouped: bool, flex: bool = False) -> Case:
        heads = 2048 // head_dim
        return Case(
            mask, tokens, max(1, 16384 // tokens), heads, heads // 8 if grouped else heads, head_dim, "bfloat16", flex
        )

    found = [case("causal", 16384, 128, False, True), case("documents", 16384, 128, False, True)]
    if size != "full":
        return found[:1] if size == "smallest" else found
    found += [case("causal", 16384, d, grouped, True) for d, grouped in ((128, True), (64, False), (64, True))]
    found += [case("documents", 16384, d, grouped, True) for d, grouped in ((128, True), (64, False))]
    found += [case("full", 16384, d, grouped, d == 128 and not grouped) for d in (128, 64) for grouped in (False, True)]
    for tokens in (2048, 8192, 32768):
        found += [
            case(mask, tokens, d, grouped)
            for mask in ("causal", "full")
            for d in (128, 64)
            for grouped in (False, True)
        ]
    found += [case("documents", 65536, 128, grouped, not grouped) for grouped in (False, True)]
    for mask in ("documents", "causal", "full"):
        found += [case(mask, 131072, d, grouped) for d in (128, 64) for grouped in (False, True)]
    return found


def cpu_cases(size: Size) -> list[Case]:
    """Return the cases for a CPU."""
    if size == "smallest":
        return [Case(mask, 128, 1, 4, 2, 32, "float32") for mask in ("causal", "documents")]
    quick = size == "quick"
    return [
        Case(mask, tokens, 1, 8, kv_heads, 64, dtype)
        for tokens in ((2048,) if quick else (1024, 2048, 4096))
        for mask in (("causal", "documents") if quick else ("causal", "full", "documents"))
        for dtype in ("float32", "bfloat16")
        for kv_heads in (8, 1)
    ]


def cases_here(size: Size) -> tuple[list[Case], str, str]:
    """Return the cases, the device and the backend of this machine."""
    if torch.cuda.is_available():
        return cuda_cases(size), "cuda", "triton"
    return cpu_cases(size), "cpu", "torch_cpu"
