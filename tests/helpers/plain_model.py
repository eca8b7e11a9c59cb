"""A Llama-like decoder in plain PyTorch on one process, which shares no code with LongRing: the reference of runs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from longring.model.config import ModelConfig
from torch import Tensor


def plain_losses(
    w: dict[str, Tensor], rows: Tensor, m: ModelConfig, positions: Tensor | None = None, vocab_size: int | None = None
) -> Tensor:
    """Return the loss of every token, [b, L], of whole rows [b, L + 1], in the dtype of the weights.

    RoPE rotates by `positions` [b, L]; None: 0 to L - 1. The head's rows from `vocab_size` on are padding; None: none.
    """
    tokens, targets = rows[:, :-1], rows[:, 1:]
    g, d, length = m.num_heads // m.num_kv_heads, m.head_dim, tokens.shape[1]
    norm = lambda x, weight: x * (x.square().mean(-1, keepdim=True) + m.norm_epsilon).rsqrt() * weight  # noqa: E731
    positions = torch.arange(length)[None] if positions is None else positions
    angle = positions.double()[..., None] * m.rope_base ** -(torch.arange(0, d, 2).double() / d)
    cos, sin = (t.to(w["norm.weight"].dtype)[:, :, None] for t in (angle.cos(), angle.sin()))

    def rope(x: Tensor) -> Tensor:
        a, b = x[..., : d // 2], x[..., d // 2 :]
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    x = w["embedding.weight"][tokens]
    behind = torch.arange(length)[:, None] - torch.arange(length)
    for i in range(m.num_layers):
        unseen = behind < 0
        if m.layer_pattern[i % len(m.layer_pattern)] == "window":
            unseen = unseen | (behind >= m.window_tokens)
        p = {name.removeprefix(f"blocks.{i}."): value for name, value in w.items() if name.startswith(f"blocks.{i}.")}
        qkv = norm(x, p["attention_norm.weight"]) @ p["attention.qkv.weight"].T
        qkv = qkv.reshape(*qkv.shape[:2], m.num_kv_heads, g + 2, d)
        q = rope(qkv[:, :, :, :g].reshape(*qkv.shape[:2], m.num_heads, d))
        k, v = (x.repeat_interleave(g, 2) for x in (rope(qkv[:, :, :, g]), qkv[:, :, :, g + 1]))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(d)
        seen = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(unseen, -math.inf).softmax(-1), v)
        x = x + seen.flatten(2) @ p["attention.out.weight"].T
        gate, up = (norm(x, p["mlp_norm.weight"]) @ p["mlp.gate_up.weight"].T).chunk(2, -1)
        x = x + (gate * torch.sigmoid(gate) * up) @ p["mlp.down.weight"].T
    logits = norm(x, w["norm.weight"]) @ w["head.weight"][:vocab_size].T
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
