"""torch.compile around attention: one graph, results equal to eager ones, no new graph for new documents."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers.lanes import by_lane
from longring.kernels.attention import _attention, attention
from longring.kernels.layout import SeqLayout
from longring.kernels.mask import make_mask
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class SmallLayer(torch.nn.Module):
    """A projection, attention and an output projection; attention is an argument, as in `TransformerLayer`."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(32, 4 * 16 + 2 * 2 * 16, bias=False)
        self.out = torch.nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor, attend) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, 16)) for y in self.qkv(x).split([64, 32, 32], dim=-1))
        return torch.nn.functional.silu(self.out(attend(q, k, v).flatten(2)))


def bound_attention(document_tokens: tuple[int, ...], backend: str):
    layout = SeqLayout.packed(document_tokens)
    return partial(attention, mask=make_mask(layout, layout, device=DEVICE), backend=backend)


def loss_and_gradients(model, x: Tensor, attend) -> list[Tensor]:
    model.zero_grad()
    loss = model(x, attend).square().sum()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize(
    ("backend", "compiler"),
    by_lane(
        [("auto", "inductor"), ("triton", "aot_eager"), ("reference", "aot_eager")],
        quick=[("reference", "aot_eager")],
        slow=[("auto", "inductor")],
    ),
)
def test_compiled_equals_eager(backend, compiler):
    torch.manual_seed(0)
    torch.compiler.reset()
    model, x = SmallLayer().to(DEVICE), torch.randn(2, 40, 32, device=DEVICE)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    attend = bound_attention((10, 30), backend)
    for got, expected in zip(
        loss_and_gradients(compiled, x, attend), loss_and_gradients(model, x, attend), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_new_documents_need_no_new_graph():
    torch.compiler.reset()
    torch.manual_seed(0)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    model, x = SmallLayer().to(DEVICE), torch.randn(2, 40, 32, device=DEVICE)
    compiled = torch.compile(model, fullgraph=True, backend=count)
    for documents in [(40,), (10, 30), (1, 20, 19), (5,) * 8]:
        attend = bound_attention(documents, "auto")
        torch.testing.assert_close(compiled(x, attend), model(x, attend))
    assert len(graphs) == 1


def test_operator_passes_torch_opcheck():
    layout = SeqLayout.contiguous(12)
    mask = make_mask(layout, layout, device=DEVICE)
    q, k, v = (torch.randn(1, 12, h, 16, device=DEVICE, requires_grad=True) for h in (4, 2, 2))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    arguments = (q, k, v, mask.rows, mask.columns, mask.host_rows, 0.25, 0.0, "auto")
    torch.library.opcheck(_attention, arguments, test_utils=tests)
