"""What sequences of a length cost: attention's share of the FLOPs, and the speed-up over one long length."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What decides a model's FLOPs."""

    name: str
    parameters: int
    """Of all matrix products of a token: layers and output head, without the embedding."""

    num_layers: int
    attention_width: int
    """Query heads times their size."""

    def token_flops(self, length: int) -> tuple[float, float]:
        """Return FLOPs of a token, forward and backward, in a causal sequence of `length` -> all, attention's.

        A parameter is 2 in the forward pass, and so is each product of a query with the (length + 1) / 2 tokens it
        sees on average, of a probability with a value; the backward pass is twice the forward.
        """
        attention = 3 * 2 * 2 * self.num_layers * self.attention_width * (length + 1) / 2
        return 6 * self.parameters + attention, attention


PAPER_1B = ModelSize(
    name="1B (24 layers of 2,048, vocabulary 50,432)",
    parameters=24 * 12 * 2048**2 + 2048 * 50_432,
    num_layers=24,
    attention_width=2048,
)
"""OpenLM-1B, the model of Dataset Decomposition's tables."""


def attention_share(model: ModelSize, tokens: Sequence[int], lengths: Sequence[int]) -> float:
    """Return attention's part of the FLOPs of so many tokens at each length."""
    costs = [model.token_flops(length) for length in lengths]
    total, attention = (sum(n * cost[part] for n, cost in zip(tokens, costs, strict=True)) for part in (0, 1))
    return attention / total


def speed_up(model: ModelSize, tokens: Sequence[int], lengths: Sequence[int]) -> float:
    """Return the FLOPs of the same tokens all at the longest length, over theirs."""
    spent = sum(n * model.token_flops(length)[0] for n, length in zip(tokens, lengths, strict=True))
    return sum(tokens) * model.token_flops(max(lengths))[0] / spent
