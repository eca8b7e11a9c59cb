"""Bytes of activations that a rank keeps for the backward, and of the tensors at hand while it computes.

Operators differ by device: on a GPU liger's kernels keep their input and little else; torch's own, on a CPU, keep fp32
copies (`model/fused.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from ...model.loss import token_slice
from ..config import Recipe


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of activations of one micro-batch on one rank."""

    layer: int
    """Activations that one layer keeps."""
    layers: int
    """Activations that all layers keep, on the device."""
    host: int
    """Activations in the memory of the host."""
    around: int
    """Activations that the final norm and the loss keep."""
    kept_logits: int
    """Logits that are kept."""
    loss_workspace: int
    """Tensors of the loss at hand in its backward, the gradient of the head's weight included."""
    layer_workspace: int
    """Tensors of a layer at hand in its backward, what is computed again included."""


def activations_of(recipe: Recipe, vocab_size: int, length: int, *, on_gpu: bool) -> Activations:
    """Return the bytes of a micro-batch of the bucket of `length` tokens; `vocab_size` is the tokenizer's."""
    model, parallel, memory = recipe.model, recipe.parallel, recipe.train.memory
    itemsize, tensor, tokens = 4 if recipe.train.dtype == "float32" else 2, parallel.tensor, parallel.tokens_per_rank
    rows = model.padded_vocab_size(vocab_size) // tensor  # of the output head on this rank
    q, kv = (heads * model.head_dim // tensor for heads in (model.num_heads, model.num_kv_heads))
    ffn, hidden = model.ffn_hidden_size // tensor, model.hidden_size
    # Elements of the residual stream of each token that this rank has.
    stream = hidden / tensor if parallel.sequence_parallel else hidden
    norm = _norm(stream, itemsize, on_gpu)
    x = itemsize * stream

    # Bytes a token and layer.
    attention = itemsize * (2 * q + 2 * kv) + 4 * model.num_heads // tensor  # q, k, v, out, lse
    if length < parallel.tokens_per_rank:  # several sequences: the projection takes out in another order
        attention += 0 if memory.activations in ("recompute_layer", "offload") else itemsize * q
    before = norm + _qk_norm(recipe, q, kv, itemsize, on_gpu)
    mlp = itemsize * ffn * 3  # gate and up, and their SwiGLU
    mlp_workspace = itemsize * ffn * 2  # the gradient of gate and up
    after = norm + (mlp if not memory.mlp_tile_tokens else 0)
    kept = {
        "keep": before + attention + after,
        "recompute_mlp": before + attention + x,
        "recompute_layer": x + attention,
        "offload": x + attention,
    }[memory.activations]
    again = {"keep": 0, "recompute_mlp": after}.get(memory.activations, x + itemsize * q + after)
    workspace = tokens * (again + 2 * x)
    if memory.mlp_tile_tokens:
        # One tile; the gradients of three weights, as fp32 sums and rounded; the gradient of SwiGLU's input.
        tile = min(memory.mlp_tile_tokens, tokens)
        workspace += tile * (mlp + mlp_workspace) + 3 * hidden * ffn * (4 + itemsize) + tokens * x
    else:
        workspace += tokens * mlp_workspace
    # The last layer stays, and on a GPU the layer before the one at hand is already there.
    stay = min(model.num_layers, 1 + on_gpu) if memory.activations == "offload" else model.num_layers

    kept_logits, loss_workspace = _loss(recipe, rows, itemsize, on_gpu=on_gpu)
    # The loss keeps an int64, a bool and four fp32 numbers of each token: 25 bytes.
    return Activations(
        layer=int(tokens * kept),
        layers=int(tokens * kept * stay),
        host=int(tokens * kept * (model.num_layers - 1)) if stay < model.num_layers else 0,
        around=int(tokens * (norm + (itemsize * hidden if parallel.sequence_parallel else 0) + 25)),
        kept_logits=kept_logits,
        loss_workspace=loss_workspace,
        layer_workspace=int(workspace),
    )


def _loss(recipe: Recipe, rows: int, itemsize: int, *, on_gpu: bool) -> tuple[int, int]:
    """Return the bytes of the logits that are kept, and of the tensors of the loss at hand in its backward.

    `rows` is the number of rows of the output head on this rank.
    """
    tokens, hidden = recipe.parallel.tokens_per_rank, recipe.model.hidden_size
    kept_tokens, slice_tokens = kept_logit_tokens(recipe, rows, itemsize, on_gpu=on_gpu)
    head = rows * hidden
    # In fp32 kept logits become their own gradient, and with one slice the only product is the gradient of the weight.
    of_slice = 0 if itemsize == 4 and kept_tokens == tokens else slice_tokens * rows
    dweight = 0 if itemsize == 4 and slice_tokens == tokens else 4 * head
    # The backward has dlogits in fp32 and in the model's dtype, or these and the product for the weight's gradient.
    # On a GPU logits become their gradient in place, whatever the dtype.
    widened = 0 if on_gpu or itemsize == 4 else 4
    slice_workspace = of_slice * (itemsize + widened)
    product = of_slice * itemsize + head * itemsize
    # The backward has the gradient of the head in fp32, that of x, and the larger of the two sums above.
    # The forward has a slice beside the logits that are kept, which is in fp32 but on a GPU.
    workspace = max(
        (widened or itemsize) * of_slice, dweight + itemsize * tokens * hidden + max(slice_workspace, product)
    )
    return kept_tokens * rows * itemsize, workspace


def kept_logit_tokens(recipe: Recipe, rows: int, itemsize: int, *, on_gpu: bool) -> tuple[int, int]:
    """Return the number of tokens of a micro-batch whose logits are kept, and of a slice of tokens."""
    tokens, size = recipe.parallel.tokens_per_rank, token_slice(rows, itemsize if on_gpu else 4)
    fitting = int(recipe.train.memory.kept_logits_gb * 1e9) // (itemsize * rows)
    # A slice is kept whole or computed again whole.
    return tokens if fitting >= tokens else fitting // size * size, min(tokens, size)


def _norm(stream: float, itemsize: int, on_gpu: bool) -> float:
    """Return the bytes a token that a norm keeps, with its input or its result, whichever a product needs."""
    if on_gpu:
        return 2 * itemsize * stream + 4  # 4: 1 / root mean square in fp32
    # torch keeps the normalized input in fp32, and where that is no fp32 its copy.
    return (4 + 4 + itemsize) * stream + 4


def _qk_norm(recipe: Recipe, q: int, kv: int, itemsize: int, on_gpu: bool) -> float:
    """Return the bytes a token that the norms of q and k keep."""
    if recipe.model.qk_norm == "none":
        return 0
    return itemsize * (2 * q + 2 * kv) if on_gpu else 8 * (q + kv)
