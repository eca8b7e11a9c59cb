"""Bytes of weights, gradients and optimizer state that a rank holds under DeepSpeed's ZeRO, by kind.

The numbers are those of the three classes that DeepSpeed takes: `BF16_Optimizer` for ZeRO 1 with fp32 sums of bf16
gradients, `DeepSpeedZeroOptimizer` for the rest of ZeRO 1 and for 2, and `DeepSpeedZeroOptimizer_Stage3`; and of
`parallel/zero.py` for ZeRO 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import Recipe

WHOLE_SUM = 500_000_000
"""Number of elements that DeepSpeed sums at once where it has no buckets, under ZeRO 0."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of elements of the parameters on one tensor-parallel rank."""

    all: int
    """Elements of all parameters."""
    layer_matrix: int
    """Elements of the largest matrix of a layer, the projections to gate and up as one."""
    head: int
    """Elements of the output head, or of the embedding."""

    @property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(self.layer_matrix, self.head)

    @classmethod
    def of(cls, recipe: Recipe, vocab_size: int) -> Sizes:
        """Return the sizes of a model with a tokenizer of `vocab_size` tokens."""
        model, tensor = recipe.model, recipe.parallel.tensor
        hidden, width = model.hidden_size, model.num_heads * model.head_dim
        kv_width = model.num_kv_heads * model.head_dim
        head = model.padded_vocab_size(vocab_size) * hidden // tensor
        matrices = hidden * (2 * width + 2 * kv_width + 3 * model.ffn_hidden_size) // tensor
        vectors = 2 * hidden + model.qkv_bias * (width + 2 * kv_width) // tensor  # two norms; biases of q, k and v
        vectors += {"none": 0, "head": 2 * model.head_dim, "projection": (width + kv_width) // tensor}[model.qk_norm]
        matrix = max(2 * model.ffn_hidden_size, width + 2 * kv_width) * hidden // tensor
        layers = model.num_layers * (matrices + vectors)
        return cls(layers + hidden + (1 if model.tied_head else 2) * head, matrix, head)  # hidden: the final norm


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes of weights, gradients and optimizer state on one rank."""

    weights: int
    """Weights between steps, in train.dtype."""
    gathered: int
    """Weights that ZeRO 3 has gathered by the end of the forward."""
    gradients: int
    """Sums of gradients between micro-batches."""
    moments: int
    """AdamW's moments and the fp32 weights that it steps."""
    buckets: int
    """Buffers in which ZeRO sums gradients during the backward."""
    gradient_workspace: int
    """A gradient of the largest matrix of a layer, and its copies until it is in the sum."""
    update_gradients: int
    """Gradients while the weights are updated."""
    sum_workspace: int
    """Copy of gradients that are summed over ranks after the backward."""
    summed_part: int
    """This rank's part of the summed gradients, while all gradients are still there."""
    update_workspace: int
    """Tensors of AdamW beside its state."""
    host: int
    """Optimizer state and weights that are offloaded to the memory of the host."""


def states_of(recipe: Recipe, sizes: Sizes, ranks: int, *, on_gpu: bool) -> States:
    """Return the bytes of a rank of `ranks` data-parallel ones."""
    parallel, train, zero = recipe.parallel, recipe.train, recipe.parallel.zero
    stage, part = parallel.zero_stage, math.ceil(sizes.all / ranks)
    itemsize, sum_itemsize = (4 if dtype == "float32" else 2 for dtype in (train.dtype, train.gradient_dtype))
    flat = stage == 1 and itemsize < sum_itemsize and zero.offload_optimizer == "none"  # BF16_Optimizer
    on_host = zero.offload_optimizer == "cpu"
    owned = part if stage else sizes.all  # elements that this rank's AdamW steps
    # Two moments in fp32 and an fp32 copy of the weights; ZeRO 0 steps the model's own weights if they are fp32.
    moments = owned * (8 if stage == 0 and itemsize == 4 else 12)
    # On a GPU torch's AdamW takes the square roots of all that it steps at once; on a CPU and the host it is fused.
    stepped = min(part, zero.sub_group_size)  # by ZeRO 3
    update = 4 * (stepped if stage == 3 else owned) if on_gpu and not on_host else 0
    reduced = 1 + zero.overlap_comm if stage < 3 else 1  # number of buffers
    gradients = sum_itemsize * (part if stage >= 2 else sizes.all)
    # ZeRO 2 sums over ranks in buffers of the model's dtype, ZeRO 3 in those of the sum; ZeRO 1 stages what it has.
    bucket = zero.reduce_bucket_size * (itemsize if stage == 2 else sum_itemsize)
    # Weights that lie d elements before the end of the forward are used again 2 d later, and stay gathered if that is
    # within the reuse distance.
    live = min(sizes.all, zero.stage3_max_live_parameters)
    gathered = min(live, zero.stage3_max_reuse_distance // 2 + zero.stage3_prefetch_bucket_size + sizes.layer_matrix)
    among = zero.zero_hpz_partition_size
    copied = math.ceil(sizes.all / among) if among > 1 else 0  # by ZeRO 3, among fewer ranks
    weights = itemsize * (part + copied if stage == 3 else sizes.all)
    host = weights if zero.offload_param == "cpu" else 0
    if on_host:
        # Beside the moments: gradients in fp32, which AdamW reads there, and where they are summed over micro-batches;
        # ZeRO 1 and 2 keep the part of the weights in train.dtype and a gradient there as well, and one on the device.
        host += moments + 4 * part
        host += gradients if stage == 3 else itemsize * (part + sizes.largest) + (itemsize * part if stage == 2 else 0)
        gradients = sizes.all * sum_itemsize if stage == 1 else 0
    if stage == 0:
        update_gradients = sizes.all * (4 if sum_itemsize == 4 else sum_itemsize + 4)  # AdamW reads fp32
    elif flat or on_host:
        update_gradients = gradients
    elif stage < 3:  # sums in train.dtype stay beside their fp32 copy
        update_gradients = 4 * part + (sum_itemsize * part if itemsize == sum_itemsize else 0)
    else:
        update_gradients = sum_itemsize * part + 4 * stepped  # one sub-group in fp32 at a time
    # A gradient in train.dtype, in that of the sum where they differ, and where ZeRO 3 scatters it.
    gradient = itemsize + sum_itemsize * ((itemsize < sum_itemsize) + (stage == 3))
    return States(
        weights=0 if zero.offload_param == "cpu" else weights,
        gathered=itemsize * gathered if stage == 3 else 0,
        gradients=gradients,
        moments=0 if on_host else moments,
        # With AdamW on the host ZeRO 1 and 2 bring a gradient's sum back through a buffer.
        buckets=(0 if stage == 0 or flat else reduced * bucket) + (itemsize * sizes.largest if on_host else 0),
        gradient_workspace=sizes.layer_matrix * gradient,
        update_gradients=update_gradients,
        sum_workspace=sum_itemsize * min(sizes.all, WHOLE_SUM) if stage == 0 and ranks > 1 else 0,
        summed_part=sum_itemsize * part if stage == 1 and not flat and not on_host else 0,
        update_workspace=update,
        host=host,
    )
