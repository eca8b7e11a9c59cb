"""Time of a training step by part: FLOPs and bytes against the limits of a device, attention by its grids' prices.

Every matrix product takes the longer of its FLOPs and its bytes (the roofline), every other operator its bytes. ZeRO's
and tensor parallelism's messages take their bytes over the links that they cross. What a GPU does beside computing is
hidden as far as the computing beside it lasts; on CPUs everything takes its turn. Launches of kernels, the loader and
saves are left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from ...model.config import ModelConfig
from ...model.loss import token_slice
from ...parallel.cp.cost import Speed
from ...parallel.cp.topology import Topology
from ..config import Recipe
from ..flops import ModelFlops, visible_pairs
from ..grids.choice import GridChoice, attention_shape
from .device import Device
from .links import Links, gather_s

ADAMW_BYTES = 80
"""Bytes that a step of torch's AdamW moves for each fp32 weight, pass by pass: decay 8, first moment 12, second 8 + 12,
root 8, bias 8, epsilon 8, update 16."""
FUSED_ADAMW_BYTES = 28
"""The same in one pass: weight, gradient and two moments read, three of them written."""
NORM_AND_CLIP_BYTES = 12
"""Bytes that the gradient norm and clipping move for each fp32 gradient."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step on a rank by part, none of which lies beneath another: they add up."""

    products: float
    """Matrix products of layers and head, forward and backward."""
    attention: float
    """Attention's own computing."""
    operators: float
    """Norms, RoPE, SwiGLU, residuals, loss, and sums of gradients: bytes."""
    again: float
    """Products and operators that are computed again to save memory."""
    ring: float
    """Exposed messages of attention over several ranks."""
    tensor: float
    """Exposed messages of tensor parallelism."""
    zero: float
    """Exposed messages of ZeRO: sums of gradients and gathers of weights."""
    host: float
    """Exposed copies to and from the host, and AdamW there."""
    update: float
    """AdamW on the device, with norm and clipping."""
    hidden: float = 0.0
    """Messages and copies beneath computing, no part of the total."""

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.by_part().values())

    @property
    def exposed(self) -> float:
        """Seconds of messages and copies during which nothing is computed."""
        return self.ring + self.tensor + self.zero + self.host

    def by_part(self) -> dict[str, float]:
        """Return the seconds by part, without those that are hidden."""
        return {part.name: getattr(self, part.name) for part in fields(self) if part.name != "hidden"}


def time_of(
    recipe: Recipe,
    world_size: int,
    length: int,
    vocab_size: int,
    device: Device,
    links: Links,
    grids: Sequence[GridChoice] = (),
) -> StepTime:
    """Return the time of a step on the bucket of `length` tokens, each sequence one document.

    `vocab_size` is the tokenizer's. `grids` are those of the layer kinds of this bucket, priced on the device and the
    links; none for a bucket that fits one rank, or for a lower bound. Raises ValueError if that many ranks cannot train
    the recipe.
    """
    micro_batches = recipe.accumulation_steps(world_size)
    one = _MicroBatch(recipe, world_size, vocab_size, device, links)
    attention, ring = _attention(recipe, length, device.attention, grids)
    forward, backward = one.forward(), one.backward()
    again = one.again()
    # What one micro-batch computes in each pass, beneath which messages may lie.
    cover = forward.seconds + attention.forward, backward.seconds + again.seconds + attention.backward
    tensor, tensor_hidden = one.tensor_messages()
    zero, zero_hidden = one.zero_messages(micro_batches, *cover)
    copies, copies_hidden = one.activation_copies(*cover)
    update, on_host = one.update()
    return StepTime(
        products=micro_batches * (forward.products + backward.products),
        attention=micro_batches * (attention.forward + attention.backward),
        operators=micro_batches * (forward.operators + backward.operators + one.sums_of_gradients()),
        again=micro_batches * again.seconds,
        ring=micro_batches * ring,
        tensor=micro_batches * tensor,
        zero=zero,
        host=micro_batches * copies + on_host,
        update=update,
        hidden=micro_batches * (tensor_hidden + copies_hidden) + zero_hidden,
    )


@dataclass(frozen=True)
class _Passes:
    """Seconds of attention of all layers in one micro-batch."""

    forward: float
    backward: float


def _attention(recipe: Recipe, length: int, speed: Speed, grids: Sequence[GridChoice]) -> tuple[_Passes, float]:
    """Return the seconds of a micro-batch's attention, and of its exposed messages.

    A bucket over several ranks without grids has equal work on all of them, and no messages: less than any grid.
    """
    model, shape = recipe.model, attention_shape(recipe)
    layers = Counter(model.attention_window(layer) for layer in range(model.num_layers))  # window → number of layers
    taken = {choice.kind.window: choice.taken for choice in grids}
    forward = backward = exposed = 0.0
    for window, count in layers.items():
        if window in taken:
            priced = taken[window]
            forward += count * priced.passes["forward"].compute_s
            backward += count * priced.passes["backward"].compute_s
            exposed += count * priced.exposed_s
            continue
        whole, parallel = float(visible_pairs(np.float64(length), window)), recipe.parallel
        # Visible pairs that a rank computes in a micro-batch.
        pairs = whole * parallel.sequences_per_replica(length) / parallel.context_parallel(length)
        unit = pairs * shape.head_dim * shape.num_heads
        # A grid decides the number of tiles; without their overhead this stays a lower bound.
        tile_s = speed.tile_s if parallel.context_parallel(length) == 1 else 0.0
        forward += count * (tile_s + 4 * unit / speed.forward_flops)
        backward += count * (tile_s + 10 * unit / speed.backward_flops)
    return _Passes(forward, backward), exposed


@dataclass(frozen=True)
class _Pass:
    """Seconds of one pass of a micro-batch without attention."""

    products: float
    operators: float

    @property
    def seconds(self) -> float:
        return self.products + self.operators


class _MicroBatch:
    """One micro-batch of a rank on a device: seconds of its passes, messages and copies."""

    def __init__(self, recipe: Recipe, world_size: int, vocab_size: int, device: Device, links: Links) -> None:
        self.model: ModelConfig = recipe.model
        self.memory, self.parallel, self.device, self.links = recipe.train.memory, recipe.parallel, device, links
        self.tokens, self.tensor_size = recipe.parallel.tokens_per_rank, recipe.parallel.tensor
        self.data_size = recipe.parallel.data_size(world_size)
        self.itemsize = 4 if recipe.train.dtype == "float32" else 2
        self.sum_itemsize = 4 if recipe.train.gradient_dtype == "float32" else 2
        model, tensor = recipe.model, recipe.parallel.tensor
        self.rows = model.padded_vocab_size(vocab_size) // tensor
        self.width, self.kv_width = (
            heads * model.head_dim // tensor for heads in (model.num_heads, model.num_kv_heads)
        )
        self.ffn = model.ffn_hidden_size // tensor
        # q and out, k and v; gate, up and down
        self.layer_parameters = model.hidden_size * (2 * self.width + 2 * self.kv_width + 3 * self.ffn)
        tables = 1 if model.tied_head else 2  # embedding, and a head of its own
        self.parameters = model.num_layers * self.layer_parameters + tables * self.rows * model.hidden_size
        # Outside the tensor-parallel layers, sequence parallelism divides tokens.
        self.hidden = model.hidden_size / (tensor if recipe.parallel.sequence_parallel else 1)

    def product(self, n: int, k: int) -> float:
        """Return the seconds of a product [tokens, k] x [k, n]; those of its two gradients have as many FLOPs."""
        flops, moved = 2.0 * self.tokens * n * k, self.itemsize * (self.tokens * (n + k) + n * k)
        return max(flops / self.device.product_flops, moved / self.device.operator_bytes_per_s)

    def operator(self, elements_per_token: float) -> float:
        """Return the seconds of reading and writing this number of elements for each token."""
        return self.itemsize * self.tokens * elements_per_token / self.device.operator_bytes_per_s

    def attention_half(self) -> float:
        """Return the seconds of the products of a layer before and after attention."""
        hidden = self.model.hidden_size
        return self.product(self.width + 2 * self.kv_width, hidden) + self.product(hidden, self.width)

    def mlp_half(self) -> tuple[float, float]:
        """Return the seconds of the two products of SwiGLU: into its width, and back."""
        return self.product(2 * self.ffn, self.model.hidden_size), self.product(self.model.hidden_size, self.ffn)

    def head(self) -> float:
        """Return the seconds of the product of the loss head."""
        return self.product(self.rows, self.model.hidden_size)

    def forward(self) -> _Pass:
        """Return the forward of a micro-batch."""
        layers = self.model.num_layers
        products = layers * (self.attention_half() + sum(self.mlp_half())) + self.head()
        operators = layers * self.operator(self._attention_elements() + self._mlp_elements())
        # A slice of logits is read or written by: its copy in fp32, largest, subtraction, exponential and sum. On a GPU
        # one kernel reads it.
        logits = self.itemsize if self.device.is_gpu else self._casts() + 24
        return _Pass(products, operators + self._logits(logits))

    def backward(self) -> _Pass:
        """Return the backward of a micro-batch, without what it computes again."""
        layers, hidden = self.model.num_layers, self.hidden
        # Each product has two gradients: of its input and of its weight.
        products = 2 * (layers * (self.attention_half() + sum(self.mlp_half())) + self.head())
        # Norms read two and write one, residuals add up two gradients; layouts of q, k, v and out are copied back.
        attention = 6 * hidden + self._layout_elements() + self._norm_elements() * 1.5
        mlp = 6 * hidden + 5 * self.ffn  # SwiGLU reads gate, up and one gradient, and writes two
        operators = layers * self.operator(attention + mlp)
        # Subtraction, exponential and factor, between casts from and to the model's dtype; on a GPU by one kernel.
        logits = 2 * self.itemsize if self.device.is_gpu else 2 * self._casts() + 24
        return _Pass(products, operators + self._logits(logits) + self._head_sums())

    def again(self) -> _Pass:
        """Return what the backward of a micro-batch computes again."""
        level, layers, (into, back) = self.memory.activations, self.model.num_layers, self.mlp_half()
        tiles, is_again = self.memory.mlp_tile_tokens > 0, level != "keep"
        # SwiGLU's result is computed again for a norm after it; in tiles, the backward then computes the rest anew.
        with_result = is_again and self.model.norm_order == "after"
        times = max(tiles, is_again) + (tiles and with_result)
        products, operators = times * into + with_result * back, times * self.operator(3 * self.ffn)
        if is_again:
            operators += self.operator(2 * self.hidden)  # the norm before SwiGLU
        if level in ("recompute_layer", "offload"):
            products += self.attention_half()
            operators += self.operator(self._attention_elements())
        kept = min(1.0, self.memory.kept_logits_gb * 1e9 / (self.itemsize * self.tokens * self.rows))
        return _Pass(layers * products + (1 - kept) * self.head(), layers * operators)

    def _logits(self, num_bytes: int) -> float:
        """Return the seconds of passes over the logits, of this number of bytes each; AdamW's are passes like these."""
        return self.tokens * self.rows * num_bytes / self.device.update_bytes_per_s

    def _casts(self) -> int:
        """Return the bytes of an element that a cast between the model's dtype and fp32 moves."""
        return 0 if self.itemsize == 4 else self.itemsize + 4

    def _norm_elements(self) -> float:
        """Return the elements that norms of q and k move for each token."""
        return 0.0 if self.model.qk_norm == "none" else 2.0 * (self.width + self.kv_width)

    def _layout_elements(self) -> float:
        """Return the elements for each token that RoPE and new layouts of q, k, v and out move in one pass."""
        q_and_k = self.width + self.kv_width
        return 2 * q_and_k + 2 * (q_and_k + self.kv_width) + 2 * self.width  # RoPE; q, k and v; out

    def _attention_elements(self) -> float:
        """Return the elements for each token of a layer's operators around attention in the forward."""
        return 5 * self.hidden + self._layout_elements() + self._norm_elements()  # norm 2 h, residual 3 h

    def _mlp_elements(self) -> float:
        """Return the elements for each token of a layer's operators around SwiGLU in the forward."""
        return 5 * self.hidden + 3 * self.ffn  # norm 2 h, residual 3 h; SwiGLU reads 2 f and writes f

    def _head_sums(self) -> float:
        """Return the seconds of adding up the gradient of the head's weight, slice by slice in fp32."""
        slices = math.ceil(self.tokens / token_slice(self.rows, self.itemsize if self.device.is_gpu else 4))
        # After the first slice a product is written and read, and the sum read and written.
        each = (slices - 1) * (2 * self.itemsize + 8) + 2 * self._casts()
        return self.rows * self.model.hidden_size * each / self.device.update_bytes_per_s

    def sums_of_gradients(self) -> float:
        """Return the seconds of adding a micro-batch's gradients to their sums."""
        return self._passes(self.itemsize) + 2 * self._passes(self.sum_itemsize)

    def _exposed(self, seconds: float, cover: float) -> tuple[float, float]:
        """Return the exposed and the hidden part of messages or copies beside `cover` seconds of computing."""
        hidden = min(seconds, cover) if self.device.is_gpu else 0.0
        return seconds - hidden, hidden

    def tensor_messages(self) -> tuple[float, float]:
        """Return the exposed and the hidden seconds of tensor parallelism's messages in a micro-batch."""
        if self.tensor_size == 1:
            return 0.0, 0.0
        layers = self.model.num_layers
        one = self._gather(self.links.all_ranks, self.tensor_size, self.itemsize * self.tokens * self.model.hidden_size)
        into, _ = self.mlp_half()
        beside = self.product(self.width + 2 * self.kv_width, self.model.hidden_size) + into
        # A layer adds up (a reduce-scatter and a gather) after attention and after SwiGLU, in each pass. With sequence
        # parallelism the backward gathers the inputs again. Of the backward, products of the weights' gradients lie
        # beside the sums of column-parallel layers, and those of the inputs' beside the second gathers.
        exposed, beneath, cover = 4 * one, 4 * one, beside
        if self.parallel.sequence_parallel:
            exposed, cover = 6 * one, 2 * beside
        again = {"keep": 0, "recompute_mlp": 2, "recompute_layer": 4, "offload": 4}[self.memory.activations] * one
        rest, hidden = self._exposed(beneath, cover)
        ends = 4 * one  # embedding and head
        return layers * (exposed + again + rest) + ends, layers * hidden

    def zero_messages(self, micro_batches: int, forward: float, backward: float) -> tuple[float, float]:
        """Return the exposed and the hidden seconds of ZeRO's messages in a step, given a micro-batch's computing."""
        zero, stage, ranks = self.parallel.zero, self.parallel.zero_stage, self.data_size
        if ranks == 1:
            return 0.0, 0.0
        if not zero.overlap_comm:
            forward = backward = 0.0
        links = self.links.data_ranks
        weights = self._gather(links, ranks, self.parameters * self.itemsize)
        half = self._gather(links, ranks, self.parameters * self.sum_itemsize)  # a sum's reduce-scatter, or its gather
        copies = 6 * self._passes(self.sum_itemsize)  # into one tensor, divided there by the ranks, and out of it
        if stage == 0:
            return 2 * half + copies, 0.0  # after the last backward, so beside no computing
        if stage < 3:
            # Sums of all gradients, in the last backward (ZeRO 1) or in each, and the weights after the update.
            exposed, hidden = self._exposed(2 * half + copies, backward)
            times = 1 if stage == 1 else micro_batches
            return times * exposed + weights, times * hidden
        sums, again = half + copies, weights
        if zero.zero_hpz_partition_size > 1:  # from a copy that fewer ranks divide
            again = self._gather(links, min(ranks, zero.zero_hpz_partition_size), self.parameters * self.itemsize)
        if zero.zero_quantized_weights:
            weights, again = weights / self.itemsize, again / self.itemsize  # int8: a byte a weight
        if zero.zero_quantized_gradients:
            sums = half / (2 * self.sum_itemsize) + copies  # int4: half a byte a gradient
        if zero.offload_param == "cpu":
            up = self.parameters * self.itemsize / ranks / self.device.host_bytes_per_s
            weights, again = weights + up, again + up
        joined = 3 * self._passes(self.itemsize)  # gathered by ranks, and each weight copied into a tensor of its own
        weights, again = weights + joined, again + joined
        both = [self._exposed(weights, forward), self._exposed(again + sums, backward)]
        return micro_batches * sum(e for e, _ in both), micro_batches * sum(h for _, h in both)

    def _passes(self, itemsize: int) -> float:
        """Return the seconds of reading, or of writing, all parameters once in elements of `itemsize` bytes."""
        return self.parameters * itemsize / self.device.operator_bytes_per_s

    def _gather(self, topology: Topology, ranks: int, num_bytes: float) -> float:
        return gather_s(topology, ranks, num_bytes, self.device.link_share)

    def activation_copies(self, forward: float, backward: float) -> tuple[float, float]:
        """Return the exposed and the hidden seconds of activations that go to the host and back in a micro-batch."""
        if self.memory.activations != "offload":
            return 0.0, 0.0
        elements = self.hidden + 2 * (self.width + self.kv_width)  # x; q, k, v and out
        layers = self.model.num_layers - 1  # the last layer's stay
        one_way = layers * self.itemsize * self.tokens * elements / self.device.host_bytes_per_s
        down, up = self._exposed(one_way, forward), self._exposed(one_way, backward)
        return down[0] + up[0], down[1] + up[1]

    def update(self) -> tuple[float, float]:
        """Return the seconds of the update on the device, and of one on the host with the copies of its gradients."""
        part = self.parameters / (self.data_size if self.parallel.zero_stage else 1)
        norm = part * NORM_AND_CLIP_BYTES / self.device.update_bytes_per_s
        if self.parallel.zero.offload_optimizer == "none":
            moved = ADAMW_BYTES if self.device.is_gpu else FUSED_ADAMW_BYTES
            moved += self._casts()  # bf16 weights are rounded from the fp32 ones
            return norm + part * moved / self.device.update_bytes_per_s, 0.0
        copies = part * (4 + self.itemsize) / self.device.host_bytes_per_s  # gradients down in fp32, weights up
        return norm, copies + part * FUSED_ADAMW_BYTES / self.device.host_update_bytes_per_s


def utilization(recipe: Recipe, vocab_size: int, length: int, tokens_per_s: float, peak: float) -> float:
    """Return the share of the peak FLOP/s that a rank reaches at `tokens_per_s` of its own, by visible pairs (MFU)."""
    flops = ModelFlops.of(recipe.model, max(recipe.model.vocab_size, vocab_size))
    return (flops.matrices(1) + flops.attention([length]) / length) * tokens_per_s / peak
