"""FLOPs of training by sequence length: the share of attention, and the speed-up over one long length."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """The sizes that decide the FLOPs of a model."""

    name: str
    """Description of the model, as it is printed."""

    parameters: int
    """Parameters of all matrix products of a token: layers and output head, without the embedding."""

    num_layers: int
    """Number of transformer layers."""
    attention_width: int
    """Number of query heads times the head dim."""

    def token_flops(self, length: int) -> tuple[float, float]:
        """Return (total, attention) FLOPs of training on one token of a causal sequence of `length` tokens.

        The forward pass takes 2 FLOPs for each parameter. In each layer it takes 2 for each element of the products of
        a query with the keys, and of a probability with the values, of the (length + 1) / 2 tokens that a query sees on
        average. The backward pass takes twice the forward pass.
        """
        attention = 3 * 2 * 2 * self.num_layers * self.attention_width * (length + 1) / 2
        return 6 * self.parameters + attention, attention


PAPER_1B = ModelSize(
    name="1B (24 layers of 2,048, vocabulary 50,432)",
    parameters=24 * 12 * 2048**2 + 2048 * 50_432,  # a layer: 4 d^2 in attention, 8 d^2 in the MLP
    num_layers=24,
    attention_width=2048,
)
"""OpenLM-1B, the model in the tables of Dataset Decomposition."""


def attention_share(model: ModelSize, tokens: Sequence[int], lengths: Sequence[int]) -> float:
    """Return the share of attention in the FLOPs of tokens[i] tokens at each of lengths[i]."""
    costs = [model.token_flops(length) for length in lengths]
    total, attention = (sum(n * cost[part] for n, cost in zip(tokens, costs, strict=True)) for part in (0, 1))
    return attention / total


def speed_up(model: ModelSize, tokens: Sequence[int], lengths: Sequence[int]) -> float:
    """Return the ratio of FLOPs with all tokens at the longest length to FLOPs with tokens[i] at each of lengths[i]."""
    spent = sum(n * model.token_flops(length)[0] for n, length in zip(tokens, lengths, strict=True))
    return sum(tokens) * model.token_flops(max(lengths))[0] / spent
