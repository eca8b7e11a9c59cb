"""Bytes of weights, gradients and optimizer state that a rank holds under DeepSpeed's ZeRO, by kind.

The numbers are those of the three classes that DeepSpeed takes: `BF16_Optimizer` for ZeRO 1 with fp32 sums of bf16
gradients, `DeepSpeedZeroOptimizer` for the rest of ZeRO 1 and for 2, and `DeepSpeedZeroOptimizer_Stage3`; and of
`parallel/zero.py` for ZeRO 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...parallel.config import ZeroConfig
from ..config import Recipe

ITEMSIZES = {"float32": 4, "bfloat16": 2}
"""Bytes of an element by the name of its dtype."""
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


@dataclass(frozen=True)
class States:
    """Bytes of weights, gradients and optimizer state that one of `ranks` data-parallel ranks holds."""

    recipe: Recipe
    sizes: Sizes
    ranks: int
    on_gpu: bool

    @property
    def _stage(self) -> int:
        return self.recipe.parallel.zero_stage

    @property
    def _zero(self) -> ZeroConfig:
        return self.recipe.parallel.zero

    @property
    def _itemsize(self) -> int:
        """Bytes of an element in train.dtype."""
        return ITEMSIZES[self.recipe.train.dtype]

    @property
    def _sum_itemsize(self) -> int:
        """Bytes of an element of a sum of gradients."""
        return ITEMSIZES[self.recipe.train.gradient_dtype]

    @property
    def _part(self) -> int:
        """Elements of this rank, where ZeRO divides them."""
        return math.ceil(self.sizes.all / self.ranks)

    @property
    def _stepped(self) -> int:
        """Elements that AdamW steps at once: ZeRO 3 goes by sub-groups."""
        if self._stage == 3:
            return min(self._part, self._zero.sub_group_size)
        return self._part if self._stage else self.sizes.all

    @property
    def _on_host(self) -> bool:
        return self._zero.offload_optimizer == "cpu"

    @property
    def _flat(self) -> bool:
        """Whether DeepSpeed takes `BF16_Optimizer`, which keeps the fp32 sums of all gradients in one tensor."""
        return self._stage == 1 and self._itemsize < self._sum_itemsize and not self._on_host

    @property
    def _all_weights(self) -> int:
        """Weights between steps, in train.dtype, wherever they are."""
        if self._stage < 3:
            return self._itemsize * self.sizes.all
        among = self._zero.zero_hpz_partition_size
        second_copy = math.ceil(self.sizes.all / among) if among > 1 else 0
        return self._itemsize * (self._part + second_copy)

    @property
    def _all_moments(self) -> int:
        """AdamW's two moments and an fp32 copy of the weights, wherever they are.

        ZeRO 0 steps the model's own weights if they are fp32, without a copy.
        """
        if self._stage == 0:
            return self.sizes.all * (8 if self._itemsize == 4 else 12)
        return self._part * 12

    @property
    def weights(self) -> int:
        """Weights between steps, in train.dtype."""
        return 0 if self._zero.offload_param == "cpu" else self._all_weights

    @property
    def gathered(self) -> int:
        """Weights that ZeRO 3 has gathered by the end of the forward.

        Weights that lie d elements before that end are used again 2 d later, and stay gathered if that is within the
        reuse distance.
        """
        if self._stage < 3:
            return 0
        near = self._zero.stage3_max_reuse_distance // 2
        reused = near + self._zero.stage3_prefetch_bucket_size + self.sizes.layer_matrix
        return self._itemsize * min(self.sizes.all, self._zero.stage3_max_live_parameters, reused)

    @property
    def gradients(self) -> int:
        """Sums of gradients between micro-batches."""
        if self._stage >= 2:
            return 0 if self._on_host else self._sum_itemsize * self._part
        return self._sum_itemsize * self.sizes.all

    @property
    def moments(self) -> int:
        """AdamW's moments and the fp32 weights that it steps."""
        return 0 if self._on_host else self._all_moments

    @property
    def buckets(self) -> int:
        """Buffers in which ZeRO sums gradients during the backward.

        ZeRO 2 sums over ranks in the model's dtype, ZeRO 3 in that of the sum; ZeRO 1 stages what it has. With AdamW on
        the host a gradient's sum comes back through one more buffer.
        """
        back = self._itemsize * self.sizes.largest if self._on_host else 0
        if self._stage == 0 or self._flat:
            return back
        itemsize = self._itemsize if self._stage == 2 else self._sum_itemsize
        number = 1 + self._zero.overlap_comm if self._stage < 3 else 1
        return number * itemsize * self._zero.reduce_bucket_size + back

    @property
    def gradient_workspace(self) -> int:
        """A gradient of the largest matrix of a layer, and its copies until it is in the sum.

        It is there in train.dtype, in that of the sum where they differ, and where ZeRO 3 scatters it.
        """
        copies = (self._itemsize < self._sum_itemsize) + (self._stage == 3)
        return self.sizes.layer_matrix * (self._itemsize + self._sum_itemsize * copies)

    @property
    def update_gradients(self) -> int:
        """Gradients while the weights are updated: AdamW reads fp32."""
        if self._stage == 0:
            return self.sizes.all * (4 if self._sum_itemsize == 4 else self._sum_itemsize + 4)
        if self._flat or self._on_host:
            return self.gradients
        if self._stage == 3:  # one sub-group in fp32 at a time
            return self._sum_itemsize * self._part + 4 * self._stepped
        beside = self._sum_itemsize * self._part if self._itemsize == self._sum_itemsize else 0  # sums in train.dtype
        return 4 * self._part + beside

    @property
    def sum_workspace(self) -> int:
        """Copy of gradients that are summed over ranks after the backward."""
        if self._stage or self.ranks == 1:
            return 0
        return self._sum_itemsize * min(self.sizes.all, WHOLE_SUM)

    @property
    def summed_part(self) -> int:
        """This rank's part of the summed gradients, while all gradients are still there."""
        if self._stage != 1 or self._flat or self._on_host:
            return 0
        return self._sum_itemsize * self._part

    @property
    def update_workspace(self) -> int:
        """Tensors of AdamW beside its state.

        On a GPU torch's AdamW takes the square roots of all that it steps at once; on a CPU and the host it is fused.
        """
        return 4 * self._stepped if self.on_gpu and not self._on_host else 0

    @property
    def host(self) -> int:
        """Optimizer state and weights that are offloaded to the memory of the host.

        Beside the moments there are gradients in fp32, which AdamW reads there, and where they are summed over
        micro-batches; ZeRO 1 and 2 keep the part of the weights in train.dtype and a gradient there as well, and ZeRO 2
        another part.
        """
        weights = self._all_weights if self._zero.offload_param == "cpu" else 0
        if not self._on_host:
            return weights
        if self._stage == 3:
            sums = self._sum_itemsize * self._part
        else:
            sums = self._itemsize * (self._part * (2 if self._stage == 2 else 1) + self.sizes.largest)
        return weights + self._all_moments + 4 * self._part + sums
