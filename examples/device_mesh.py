"""Share sequences over one dim of a DeviceMesh: 2 data-parallel replicas, each a ring of 2 ranks.

torchrun --nproc-per-node 4 examples/device_mesh.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from longring import ContextParallel, CpGrid
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

NUM_TOKENS, HEADS, HEAD_DIM = 96, 4, 16
HIDDEN = HEADS * HEAD_DIM
DOCUMENTS = (0, 40, 61)
"""Positions at which documents begin: attention keeps them apart."""


class Attention(nn.Module):
    """One attention layer with learned positions; `attention` is a function of q, k, v `[b, s, h, d]`."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(NUM_TOKENS, HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)

    def forward(self, x: Tensor, positions: Tensor, attention) -> Tensor:
        """Return the layer's result for x `[b, s, hidden]`, whose tokens are at `positions` `[s]`."""
        q, k, v = self.qkv(x + self.positions(positions)).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
        return attention(q, k, v).flatten(2)


def one_process(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal attention within documents by torch's own operator."""
    document = torch.bucketize(torch.arange(NUM_TOKENS), torch.tensor(DOCUMENTS), right=True)
    visible = (document[:, None] == document).tril()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2)


def main() -> str:
    """Return loss and gradient norm of one process and of the mesh. Collective."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    # Once: the ring of this rank, and the division of sequences with these documents.
    parallel = ContextParallel(mesh.get_group("cp"), CpGrid.ring(mesh["cp"].size()))
    sequence = parallel.sequence(NUM_TOKENS, DOCUMENTS)

    torch.manual_seed(0)
    model, batch = Attention(), torch.randn(2, NUM_TOKENS, HIDDEN)  # a sequence for each replica
    positions = torch.arange(NUM_TOKENS)
    whole = model(batch, positions, one_process)
    loss = whole.square().mean()
    [expected] = torch.autograd.grad(loss, [model.qkv.weight])

    # As with torch's context_parallel: cut the buffers along their tokens, compute, gather what is wanted whole.
    replica = mesh.get_local_rank("dp")
    x, at = sequence.shard(batch[replica : replica + 1], dim=1), sequence.shard(positions, dim=0)
    out = model(x, at, sequence.attention)
    shared_loss = out.square().sum() / batch.numel()
    [gradient] = torch.autograd.grad(shared_loss, [model.qkv.weight])
    dist.all_reduce(shared_loss.detach())
    dist.all_reduce(gradient)
    assert torch.allclose(sequence.unshard(out, dim=1), whole[replica : replica + 1], atol=1e-5)
    assert torch.allclose(gradient, expected, atol=1e-5)
    return (
        f"one process  loss {loss.item():.4f}, gradient {expected.norm().item():.4f}\n"
        f"mesh (2, 2)  loss {shared_loss.item():.4f}, gradient {gradient.norm().item():.4f}"
    )


if __name__ == "__main__":
    dist.init_process_group()
    text = main()
    if dist.get_rank() == 0:
        print(text)
    dist.destroy_process_group()
