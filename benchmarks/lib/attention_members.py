"""The implementations of attention that benchmarks/attention.py times: LongRing's and torch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from longring.kernels.attention import attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from .cases import Case, layout_of, mask_of


def ours(case: Case, device: str, backend: str) -> Callable[..., Tensor]:
    """Return LongRing's attention of q, k, v."""
    return partial(attention, mask=mask_of(case, device), backend=backend)


def sdpa(case: Case, device: str, backend: SDPBackend | None) -> Callable[..., Tensor]:
    """Return torch's scaled_dot_product_attention: one of its operators, or the one that it chooses."""
    where = mask_of(case, device).rows.unsqueeze(-1) if case.mask == "documents" else None
    keys = torch.arange(case.tokens, device=device)
    options = {
        "attn_mask": None if where is None else (keys >= where[0]) & (keys < where[1]),
        "is_causal": case.mask == "causal",
        "enable_gqa": case.kv_heads != case.heads,
    }

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

    return call


def flex(case: Case, device: str) -> Callable[..., Tensor]:
    """Return FlexAttention, compiled for this case alone; its block mask is made before the clock starts."""
    starts = torch.tensor(layout_of(case).document_starts)
    document = (torch.searchsorted(starts, torch.arange(case.tokens), right=True) - 1).to(device)

    def is_causal(b, h, i, j):
        return i >= j

    def in_one_document(b, h, i, j):
        return (i >= j) & (document[i] == document[j])

    visible = {"causal": is_causal, "documents": in_one_document}.get(case.mask)
    blocks = visible and create_block_mask(visible, None, None, case.tokens, case.tokens, device=device)
    torch.compiler.reset()  # past a number of shapes torch would stop compiling
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=blocks, enable_gqa=case.kv_heads != case.heads).transpose(1, 2)

    return call


def unfit(member: str, case: Case) -> str | None:
    """Return why a member is left out of a case, where that is known beforehand."""
    if member in ("flash", "cudnn", "efficient") and case.mask == "documents":
        return "knows documents as a dense mask only, or not at all"
    if member == "efficient" and case.kv_heads != case.heads:
        return "no grouped heads"
    if member == "efficient" and case.tokens > 32768:
        return "left out above 32,768 tokens, where it would take most of the run"
    if member == "flex" and not case.flex:
        return "timed in some cases only: each is a compilation of its own"
    return None


def members_of(case: Case, device: str, backend: str) -> dict[str, Callable[[], Callable[..., Tensor]]]:
    """Return by name a function that makes each member, ours first."""
    found: dict[str, Callable[[], Callable[..., Tensor]]] = {"ours": partial(ours, case, device, backend)}
    if backend == "torch_cpu":
        name = "sdpa, dense mask" if case.mask == "documents" else "sdpa"
        return found | {name: partial(sdpa, case, device, None)}
    operators = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    found |= {name: partial(sdpa, case, device, operator) for name, operator in operators.items()}
    return found | {"flex": partial(flex, case, device)}
