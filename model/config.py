"""The sizes and constants of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from annotated_types import Interval

LayerPattern = tuple[Literal["full", "window", "full_no_rope"], ...]

LOGIT_BYTES = 512 * 2**20
"""The largest number of bytes of one slice's fp32 logits on a rank; a bf16 model also holds a bf16 copy of them.

It is small beside the weight's fp32 gradient at sizes that matter (2 GiB for 131,072 rows of 4,096). It is not smaller,
since every slice reads and writes that gradient once: with these rows a slice is 1,024 tokens, and its three products
take 500 FLOPs per byte moved, where a GPU balances at 200 to 300.
"""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Change of the RoPE frequencies for contexts longer than those of the original training.

    Raises ValueError for a setting that `kind` does not take, and for one that it lacks.
    """

    kind: Literal["none", "linear", "ntk", "llama3", "yarn"] = "none"
    """Rule of the change. linear divides all frequencies by `factor` (arXiv 2306.15595); ntk multiplies the base by
    factor ** (d / (d - 2)), d = head_dim; llama3 divides the frequencies that turn less than low_frequency_factor times
    in `original_tokens`, and blends up to high_frequency_factor (Llama 3.1); yarn blends between beta_slow and
    beta_fast turns, along the index of the frequency (arXiv 2309.00071)."""
    factor: Annotated[float, Interval(ge=1, le=1e6)] = 1.0
    """Ratio of the new context length to the original one."""
    original_tokens: Annotated[int, Interval(ge=0, le=2**40)] = 0
    """Context length of the original training in tokens; llama3 and yarn need it."""
    low_frequency_factor: Annotated[float, Interval(gt=0, le=1e6)] = 1.0
    """llama3: number of turns in original_tokens below which a frequency is divided by `factor`."""
    high_frequency_factor: Annotated[float, Interval(gt=0, le=1e6)] = 4.0
    """llama3: number of turns in original_tokens above which a frequency stays as it is."""
    beta_fast: Annotated[float, Interval(gt=0, le=1e6)] = 32.0
    """yarn: number of turns in original_tokens above which a frequency stays as it is."""
    beta_slow: Annotated[float, Interval(gt=0, le=1e6)] = 1.0
    """yarn: number of turns in original_tokens below which a frequency is divided by `factor`."""
    truncate: bool = True
    """yarn: Round the indices at which the blend begins and ends outwards to integers."""
    attention_factor: Annotated[float, Interval(ge=0, le=1e3)] = 0.0
    """yarn: factor of cos and sin, so that scores grow by its square. 0: 0.1 ln(factor) + 1, the paper's."""
    full_layers_only: bool = False
    """Leave RoPE in windowed layers as it is (OLMo 3)."""

    def __post_init__(self) -> None:
        taken = _TAKEN[self.kind]
        for setting in fields(self)[1:]:  # all but kind
            if setting.name not in taken and (value := getattr(self, setting.name)) != setting.default:
                raise ValueError(
                    f"model.rope_scaling.{setting.name} = {value}: has no effect with model.rope_scaling.kind = "
                    f"{self.kind!r}, which takes {', '.join(taken) or 'no other setting'}; remove it, or set another "
                    "kind"
                )
        if "original_tokens" in taken and not self.original_tokens:
            raise ValueError(
                f"model.rope_scaling.original_tokens = 0: model.rope_scaling.kind = {self.kind!r} needs it; set it to "
                "the context length of the original training"
            )
        for low, high in (("low_frequency_factor", "high_frequency_factor"), ("beta_slow", "beta_fast")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(
                    f"model.rope_scaling.{low} = {getattr(self, low)}: must be below model.rope_scaling.{high} = "
                    f"{getattr(self, high)}; lower it"
                )


_TAKEN: dict[str, tuple[str, ...]] = {
    "none": (),
    "linear": ("factor", "full_layers_only"),
    "ntk": ("factor", "full_layers_only"),
    "llama3": ("factor", "original_tokens", "low_frequency_factor", "high_frequency_factor", "full_layers_only"),
    "yarn": (
        *("factor", "original_tokens", "beta_fast", "beta_slow", "truncate", "attention_factor", "full_layers_only"),
    ),
}
"""Settings of each kind of scaling."""

UNSCALED = RopeScaling()


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Memory of activations and logits between forward and backward, and what is computed twice or copied for it."""

    activations: Literal["keep", "recompute_mlp", "recompute_layer", "offload"] = "keep"
    """Activations of a layer that are kept for its backward. keep: all; recompute_mlp: all but those of SwiGLU and its
    norm; recompute_layer: its input, q, k, v and the result of attention; offload: the same, in the memory of the host.
    Attention is never computed twice, and sends nothing twice."""
    mlp_tile_tokens: Annotated[int, Interval(ge=0, le=2**30)] = 0
    """Number of tokens of a micro-batch for which SwiGLU has its intermediate activations at a time; its backward
    computes them again. 0: all tokens."""
    kept_logits_gb: Annotated[float, Interval(ge=0, le=1e5)] = 1.0
    """Gigabytes of logits that a rank keeps from the forward for the backward; beyond it they are computed again."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder with RMSNorm, RoPE, grouped-query attention and SwiGLU; without further settings Llama's.

    `model/families/` has the settings of published models. Raises ValueError for sizes that do not divide each other as
    needed, and for settings that contradict each other.
    """

    num_layers: Annotated[int, Interval(ge=1, le=10_000)]
    """Number of transformer layers."""
    hidden_size: Annotated[int, Interval(ge=1, le=2**20)]
    """Width of the residual stream."""
    num_heads: Annotated[int, Interval(ge=1, le=2**16)]
    """Number of query heads."""
    num_kv_heads: Annotated[int, Interval(ge=1, le=2**16)]
    """Number of key-value heads; must divide num_heads (equal: multi-head attention, 1: multi-query attention)."""
    head_dim: Annotated[int, Interval(ge=0, le=2**16)] = 0
    """Number of dims of one head, even. 0: hidden_size / num_heads, which is what the attribute then holds."""
    ffn_hidden_size: Annotated[int, Interval(ge=1, le=2**22)]
    """Width of the two inner projections of SwiGLU."""
    qkv_bias: bool = False
    """Add a bias to the projections to q, k and v (Qwen 2.5)."""
    qk_norm: Literal["none", "head", "projection"] = "none"
    """RMSNorm of q and k before RoPE (arXiv 2302.05442): of each head, with one weight for all heads (Qwen 3), or of
    all heads together (OLMo 2)."""
    norm_order: Literal["before", "after"] = "before"
    """Position of the norms of a layer: before attention and SwiGLU, or after them, before their result is added to the
    residual stream (OLMo 2, arXiv 2501.00656)."""
    tied_head: bool = False
    """Use the embedding's weight as that of the output head (arXiv 1608.05859)."""
    vocab_size: Annotated[int, Interval(ge=0, le=2**30)] = 0
    """Least number of tokens of embedding and head; published models have more than their tokenizers. 0: the
    tokenizer's."""
    rope_base: Annotated[float, Interval(ge=1, le=1e12)] = 100_000.0
    """Base of the RoPE frequencies; increase it with the context (1e5 for 8k tokens, 5e6 for 128k)."""
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    layer_pattern: LayerPattern = ("full",)
    """Kinds of the layers, repeated up to the last: "full" sees the whole context, "window" sees window_tokens, and
    "full_no_rope" is "full" without RoPE (arXiv 2501.18795). ["window", "window", "window", "full"] is OLMo 3."""
    window_tokens: Annotated[int, Interval(ge=0, le=2**30)] = 0
    """Attention window of the layers "window" in tokens, the query included; 0: there are none."""
    norm_epsilon: Annotated[float, Interval(gt=0, le=1)] = 1e-5
    """Constant added to the mean square in RMSNorm."""
    init_std: Annotated[float, Interval(gt=0, le=10)] = 0.02
    """Standard deviation of initial weights, divided by sqrt(2 num_layers) for projections into the residual stream."""
    z_loss: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Weight of the squared logarithm of the softmax's denominator in the loss that is trained (arXiv 2204.02311), such
    as 1e-4. Reported losses are without it."""

    @staticmethod
    def translated(tree: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return settings in today's terms: `full_attention_every = n` of earlier recipes is a pattern of n layers."""
        every = tree.get("full_attention_every")
        # Anything else is left as it is, and refused as an unknown key.
        if type(every) is not int or not 1 <= every <= 10_000 or "layer_pattern" in tree:
            return tree
        rest = {key: value for key, value in tree.items() if key != "full_attention_every"}
        return {**rest, "layer_pattern": ["window"] * (every - 1) + ["full"]}

    def __post_init__(self) -> None:
        if not self.head_dim:
            if self.hidden_size % self.num_heads:
                raise ValueError(
                    f"model.hidden_size = {self.hidden_size} over model.num_heads = {self.num_heads}: the quotient, "
                    "the head dim, must be an even integer; change one of them, or set model.head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if self.head_dim % 2:
            raise ValueError(
                f"model.head_dim = {self.head_dim}: must be even, since RoPE rotates pairs of dims; set it to "
                f"{self.head_dim + 1}"
            )
        if self.num_heads % self.num_kv_heads:
            divisor = max(count for count in range(1, self.num_kv_heads + 1) if self.num_heads % count == 0)
            raise ValueError(
                f"model.num_kv_heads = {self.num_kv_heads}: must divide model.num_heads = {self.num_heads}; set it to "
                f"{divisor}"
            )
        if not self.layer_pattern:
            raise ValueError("model.layer_pattern = []: names no layer; set it to ['full']")
        # A window without windowed layers, or windowed layers without a window, is a mistake in the recipe.
        if (self.window_tokens > 0) != ("window" in self.layer_pattern):
            raise ValueError(
                f"model.window_tokens = {self.window_tokens} with model.layer_pattern of "
                f"{', '.join(sorted(set(self.layer_pattern)))}: windowed layers need both, the first above 0 and "
                "'window' in the second; without windowed layers set 0 and ['full']"
            )
        # YaRN divides by the logarithm of the base, NTK by head_dim - 2.
        if self.rope_scaling.kind == "yarn" and self.rope_base == 1:
            raise ValueError("model.rope_base = 1: yarn needs a base above 1; raise it")
        if self.rope_scaling.kind == "ntk" and self.head_dim == 2:
            raise ValueError("model.head_dim = 2: ntk has no frequency to change; set it to 4 or more")

    def kind_of(self, layer: int) -> Literal["full", "window", "full_no_rope"]:
        """Return the kind of a layer (counted from 0)."""
        return self.layer_pattern[layer % len(self.layer_pattern)]

    def attention_window(self, layer: int) -> int | None:
        """Return the attention window of a layer (counted from 0) in tokens, or None for the whole context."""
        return self.window_tokens if self.kind_of(layer) == "window" else None

    def rope_scaling_of(self, layer: int) -> RopeScaling | None:
        """Return the RoPE scaling of a layer (counted from 0), or None for a layer without RoPE."""
        kind = self.kind_of(layer)
        if kind == "full_no_rope":
            return None
        return UNSCALED if kind == "window" and self.rope_scaling.full_layers_only else self.rope_scaling

    def num_tokens(self, vocab_size: int) -> int:
        """Return the number of tokens that the softmax is over, with a tokenizer of `vocab_size` tokens."""
        return max(vocab_size, self.vocab_size)

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Return the rows of embedding and head: `num_tokens` up to a multiple of 128, for tensor parallelism."""
        return -(-self.num_tokens(vocab_size) // 128) * 128
