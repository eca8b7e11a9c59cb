"""The sliced loss against cross entropy in fp64, with a different gradient for each token's loss."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_grad
from helpers.dispatch import Largest, Operators
from helpers.errors import assert_as_exact_as
from helpers.lanes import by_lane
from longring.model import loss
from longring.model.config import ModelConfig
from longring.model.loss import LossHead
from longring.model.weights import fill_weights
from longring.parallel.config import ParallelConfig
from longring.parallel.mesh import join, megatron_config
from longring.parallel.zero import zero_engine
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CONFIG = ModelConfig(num_layers=1, hidden_size=32, num_heads=2, num_kv_heads=1, ffn_hidden_size=8, init_std=1.0)
VOCAB_ROWS, SEQUENCES, LENGTH = 256, 3, 14  # 42 tokens: not a multiple of 4, 8 or 16


def inputs(dtype: torch.dtype, scale: float = 0.2) -> tuple[Tensor, Tensor, Tensor]:
    """Return x `[s, b, hidden]`, targets `[b, s]` and the gradient of each loss `[b, s]`."""
    generator = torch.Generator().manual_seed(5)
    x = scale * torch.randn(LENGTH, SEQUENCES, CONFIG.hidden_size, generator=generator)
    targets = torch.randint(VOCAB_ROWS, (SEQUENCES, LENGTH), generator=generator)
    targets[0, :4] = torch.tensor([0, VOCAB_ROWS // 2 - 1, VOCAB_ROWS // 2, VOCAB_ROWS - 1])
    return x.to(dtype), targets, torch.randn(SEQUENCES, LENGTH, generator=generator)


def plain_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of every token from the whole logits, in the dtype of x (softmax in at least fp32)."""
    logits = (x @ weight.t()).transpose(0, 1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def results(losses: Tensor, x: Tensor, weight: Tensor, dlosses: Tensor) -> dict[str, Tensor]:
    dx, dweight = torch.autograd.grad(losses, [x, weight], dlosses)
    return {"losses": losses.detach(), "dx": dx, "dweight": dweight}


def new_head(tensor: int, sequence_parallel: bool, dtype: torch.dtype) -> LossHead:
    parallel = ParallelConfig(tokens_per_rank=64, tensor=tensor, sequence_parallel=sequence_parallel)
    join(parallel, 1)
    head = LossHead(CONFIG, VOCAB_ROWS, megatron_config(parallel))
    fill_weights(head, CONFIG, 0, torch.device("cpu"), dtype)
    return head


def head_results(
    tensor: int, sequence_parallel: bool, dtype: torch.dtype, scale: float, slice_tokens: int, kept_bytes: int = 0
) -> dict[str, Tensor]:
    """Return this rank's losses of all tokens, dx of its part of s, and weight and dweight of its vocabulary rows."""
    head = new_head(tensor, sequence_parallel, dtype)
    head.kept_logit_bytes = kept_bytes
    x, targets, dlosses = inputs(dtype, scale)
    if sequence_parallel:
        x = x.chunk(tensor)[torch.distributed.get_rank()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "LOGIT_BYTES", slice_tokens * 4 * VOCAB_ROWS // tensor)
        x = x.requires_grad_()
        losses = head(x, targets, greedy := torch.empty_like(targets))
        assert losses.dtype == torch.float32
        assert head.weight is not None
        return {**results(losses, x, head.weight, dlosses), "weight": head.weight.detach(), "greedy": greedy}


def all_ranks(parts: list[dict[str, Tensor]], sequence_parallel: bool) -> dict[str, Tensor]:
    """Assemble the parts of all ranks into the results that one rank alone would have."""
    for part in parts[1:]:
        assert torch.equal(part["losses"], parts[0]["losses"])
        assert torch.equal(part["greedy"], parts[0]["greedy"])
        assert sequence_parallel or torch.equal(part["dx"], parts[0]["dx"])
    whole = {name: torch.cat([part[name] for part in parts]) for name in ("dx", "weight", "dweight")}
    whole["greedy"] = parts[0]["greedy"]
    return {**whole, "losses": parts[0]["losses"]} | ({} if sequence_parallel else {"dx": parts[0]["dx"]})


# At scale 40 the logits reach several hundred, and their exponentials overflow fp32.
@pytest.mark.parametrize(("scale", "slice_tokens"), [(0.2, 1), (0.2, 4), (0.2, 64), (40.0, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tensor", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_loss_equals_plain_cross_entropy(on_ranks, tensor, sequence_parallel, dtype, scale, slice_tokens):
    parts = on_ranks(tensor, head_results, tensor, sequence_parallel, dtype, scale, slice_tokens)
    got = all_ranks(parts, sequence_parallel)
    weight, greedy = got.pop("weight"), got.pop("greedy")
    x, _, _ = inputs(dtype, scale)
    logits = (x.double() @ weight.double().t()).transpose(0, 1)  # [b, s, vocabulary]
    behind = logits.amax(-1) - logits.gather(-1, greedy[..., None])[..., 0]
    assert (behind <= 2 * torch.finfo(dtype).eps * logits.abs().amax(-1)).all(), "the largest but for rounding"
    runs = []
    for oracle_dtype in (dtype, torch.float64):
        x, targets, dlosses = inputs(dtype, scale)
        x, w = x.to(oracle_dtype).requires_grad_(), weight.to(oracle_dtype).requires_grad_()
        losses = plain_loss(x, w, targets)
        runs.append(results(losses, x, w, dlosses.to(losses.dtype)))
    plain, exact = runs
    assert_as_exact_as(got, plain, exact, factor=1.5)


def triton_results(tensor: int, vocab_size: int, kept_bytes: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return this rank's results by Triton's kernels, interpreted, and by torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "slice_softmax", lambda weight: loss.TRITON)
        got = padded_results(tensor, vocab_size, kept_bytes)
    return got, padded_results(tensor, vocab_size, kept_bytes)


@pytest.mark.parametrize(("tensor", "vocab_size", "kept_bytes"), by_lane([(1, 200, 2**20), (2, 60, 0)], quick=[]))
def test_kernels_of_triton_give_the_same_loss(on_ranks, tensor, vocab_size, kept_bytes):
    """With two ranks, the second has padding alone."""
    for got, expected in on_ranks(tensor, triton_results, tensor, vocab_size, kept_bytes):
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)


def passes_of(kept_bytes: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], int]:
    """Return the results of a head that keeps logits, and the number of products of both passes."""
    with Operators() as counted:
        found = head_results(1, False, dtype, 0.2, 8, kept_bytes)
    return found, counted.number("mm")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kept_slices", by_lane([0, 1, 4, 6], quick=[4]))
def test_logits_that_are_kept_are_not_computed_again(on_ranks, kept_slices, dtype):
    """There are 6 slices of at most 8 tokens, with three products each; in fp32, kept logits are overwritten."""
    [(none, without)] = on_ranks(1, passes_of, 0, dtype)
    [(kept, products)] = on_ranks(1, passes_of, kept_slices * 8 * dtype.itemsize * VOCAB_ROWS, dtype)
    assert without == 6 * 4
    assert products == without - kept_slices
    assert all(torch.equal(none[name], kept[name]) for name in none)


Z_LOSS = 0.05


def padded_results(tensor: int, vocab_size: int, kept_bytes: int) -> dict[str, Tensor]:
    """Return this rank's results of a head with padding and z-loss."""
    parallel = ParallelConfig(tokens_per_rank=64, tensor=tensor)
    join(parallel, 1)
    config = replace(CONFIG, z_loss=Z_LOSS)
    head = LossHead(config, vocab_size, megatron_config(parallel), kept_bytes)
    fill_weights(head, config, 0, torch.device("cpu"), torch.float32)
    x, targets, dlosses = inputs(torch.float32)
    x = x.requires_grad_()
    assert head.weight is not None
    losses = head(x, targets % vocab_size, greedy := torch.empty_like(targets))
    return {**results(losses, x, head.weight, dlosses), "weight": head.weight.detach(), "greedy": greedy}


@pytest.mark.full
@pytest.mark.parametrize("vocab_size", [200, 130, 60])  # of 256, 256 and 128 rows; the second rank has 72, 2 and none
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("kept_bytes", [0, 2**20])
def test_padding_has_no_part_and_z_loss_has_a_gradient_alone(on_ranks, kept_bytes, tensor, vocab_size):
    got = all_ranks(on_ranks(tensor, padded_results, tensor, vocab_size, kept_bytes), False)
    weight, greedy = got.pop("weight"), got.pop("greedy")
    assert greedy.max() < vocab_size
    runs = []
    for dtype in (torch.float32, torch.float64):
        x, targets, dlosses = inputs(torch.float32)
        x, w = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        losses = plain_loss(x, w[:vocab_size], targets % vocab_size)
        logs = (x @ w[:vocab_size].t()).transpose(0, 1).logsumexp(-1)
        trained = losses + Z_LOSS * logs.square()
        runs.append({**results(trained, x, w, dlosses.to(dtype)), "losses": losses.detach()})
    assert_as_exact_as(got, *runs, factor=1.5)
    assert not got["dweight"][vocab_size:].any()


def largest_tensors(slice_tokens: int) -> tuple[int, int]:
    """Return the element counts of the largest tensors made in forward and in backward."""
    head = new_head(1, False, torch.bfloat16)
    x, targets, dlosses = (
        t.repeat_interleave(32, dim) for t, dim in zip(inputs(torch.bfloat16), (0, 1, 1), strict=True)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "LOGIT_BYTES", slice_tokens * 4 * VOCAB_ROWS)
        with Largest() as forward:
            losses = head(x.requires_grad_(), targets)
        with Largest() as backward:
            losses.backward(dlosses)
    return forward.elements, backward.elements


def test_the_logits_of_all_tokens_never_exist(on_ranks):
    tokens = 32 * SEQUENCES * LENGTH
    x_elements = tokens * CONFIG.hidden_size
    assert on_ranks(1, largest_tensors, 2 * tokens) == [(tokens * VOCAB_ROWS, tokens * VOCAB_ROWS)], (
        "with one slice the mode must see the whole logits"
    )
    [(forward, backward)] = on_ranks(1, largest_tensors, 16)
    assert forward <= x_elements
    assert backward <= x_elements
    assert 16 * VOCAB_ROWS < x_elements < tokens * VOCAB_ROWS / 4


@pytest.mark.parametrize("vocab_rows", [128, 32_000, 50_304, 131_072, 2**28])
def test_slices_fill_the_budget_and_cover_the_tokens(vocab_rows):
    x, weight = torch.empty(100_000 if vocab_rows < 2**20 else 3, 0), torch.empty(vocab_rows, 0)
    slices = list(loss._token_slices(x, weight, loss.TORCH))
    sizes = [len(range(*part.indices(2**62))) for part in slices]
    assert all(before.stop == after.start for before, after in pairwise(slices))
    size = sizes[0]
    assert slices[0].start == 0
    assert set(sizes) == {size}
    assert size & (size - 1) == 0
    assert size == 1 or size * vocab_rows * 4 <= loss.LOGIT_BYTES < 2 * size * vocab_rows * 4


def under_zero3() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the results under ZeRO-3 of a head large enough for DeepSpeed to partition, and those of plain torch."""
    parallel = ParallelConfig(tokens_per_rank=64, zero_stage=3)
    mesh = join(parallel, 1)
    vocab_rows = 2**13  # times hidden_size: above DeepSpeed's stage3_param_persistence_threshold of 10^5 elements
    head = LossHead(CONFIG, vocab_rows, megatron_config(parallel))
    fill_weights(head, CONFIG, 0, torch.device("cpu"), torch.float32)
    assert head.weight is not None
    weight = head.weight.detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW(head.parameters())
    engine = zero_engine(head, optimizer, parallel, mesh, accumulation_steps=1, clip_grad_norm=0, dtype="float32")
    x, targets, dlosses = inputs(torch.float32)
    losses = engine(x.requires_grad_(), targets)
    assert head.weight.numel() == 0
    node = losses.grad_fn
    while not node.name().startswith("_LinearCrossEntropy"):
        node = node.next_functions[0][0]
    assert max(tensor.numel() for tensor in node.saved_tensors) < weight.numel(), "the graph saves the gathered weight"
    engine.backward((losses * dlosses).sum())
    got = {"losses": losses.detach(), "dx": x.grad, "dweight": safe_get_full_grad(head.weight)}
    return got, results(plain_loss(x, weight, targets), x, weight, dlosses)


def test_zero3_holds_the_weight_only_while_it_is_used(on_ranks):
    for got, plain in on_ranks(2, under_zero3):
        torch.testing.assert_close(got, plain)


def recomputed() -> list[dict[str, Tensor]]:
    head = new_head(1, False, torch.bfloat16)
    x, targets, dlosses = inputs(torch.bfloat16)
    x = x.requires_grad_()
    assert head.weight is not None
    runs = head(x, targets), checkpoint(head, x, targets, use_reentrant=False)
    return [results(losses, x, head.weight, dlosses) for losses in runs]


def test_activation_recompute_changes_nothing(on_ranks):
    [(plain, again)] = on_ranks(1, recomputed)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
