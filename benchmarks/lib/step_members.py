"""A training step of one model by LongRing, by transformers and by plain torch, with equal weights and batches."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from longring.model.config import ModelConfig
from longring.model.families.read import PublishedModel
from longring.model.families.weights import to_theirs, weights_of
from longring.model.weights import fill_weights
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .one_rank import RECIPE

SEED, RATE, CLIP, BETAS, DECAY = 0, 1e-3, 1.0, (0.9, 0.95), 0.1

Step = Callable[[], float]
"""A step on the batch of the case, always the same; it returns this rank's mean loss before the update."""


class Case(NamedTuple):
    """One model and one batch."""

    width: int
    layers: int
    vocab_size: int
    tokens: int
    """Length of a sequence; every rank has one of the batch."""
    ranks: int

    @property
    def model(self) -> ModelConfig:
        """Settings of the model: heads of 64, two queries a kv head, SwiGLU of three widths."""
        heads = self.width // 64
        return ModelConfig(
            num_layers=self.layers,
            hidden_size=self.width,
            num_heads=heads,
            num_kv_heads=heads // 2,
            ffn_hidden_size=3 * self.width,
        )

    @property
    def published(self) -> PublishedModel:
        """The same as a Llama of transformers."""
        return PublishedModel(
            family="llama", config=self.model, vocab_size=self.vocab_size, max_tokens=self.tokens, other={}
        )

    def rows(self) -> Tensor:
        """Return the batch, int64 `[ranks, tokens + 1]`."""
        generator = torch.Generator().manual_seed(SEED)
        return torch.randint(self.vocab_size, (self.ranks, self.tokens + 1), generator=generator)

    def weights(self) -> dict[str, Tensor]:
        """Return LongRing's initial weights, fp32, by the names of transformers."""
        tree, weights = nn.Module(), weights_of(self.published)
        for weight in weights:
            *path, leaf = weight.ours.split(".")
            module = tree
            for name in path:
                if not hasattr(module, name):
                    module.add_module(name, nn.Module())
                module = getattr(module, name)
            module.register_parameter(leaf, nn.Parameter(torch.empty(weight.shape, device="meta")))
        fill_weights(tree, self.model, SEED, torch.device("cpu"), torch.float32)
        return {name: t for w in weights for name, t in to_theirs(w, tree.get_parameter(w.ours).data).items()}


def rank() -> int:
    """Return the rank of this process."""
    return int(os.environ["RANK"])


def longring(case: Case, context_parallel: int = 1) -> Step:
    """Return LongRing's step, with each sequence over `context_parallel` ranks: ZeRO 1, or ZeRO 0 on one rank."""
    from longring.launch.build import bucket_layouts, build_engine
    from longring.launch.config import load_recipe
    from longring.launch.grids.decide import decide_grids
    from longring.parallel.mesh import join
    from longring.parallel.zero import set_learning_rate

    model, length = case.model, case.tokens
    shape = {name: getattr(model, name) for name in ("num_layers", "hidden_size", "num_heads", "num_kv_heads")}
    settings = [f"model.{name}={value}" for name, value in (shape | {"ffn_hidden_size": model.ffn_hidden_size}).items()]
    settings += [f"data.min_bucket_tokens={length}", f"data.max_bucket_tokens={length}", f"train.seed={SEED}"]
    settings += [f"train.learning_rate={RATE}", f"train.clip_grad_norm={CLIP}", f"train.weight_decay={DECAY}"]
    settings += [f"train.beta1={BETAS[0]}", f"train.beta2={BETAS[1]}", "run_directory=nowhere"]
    settings += [f"parallel.tokens_per_rank={length // context_parallel}", f"parallel.zero_stage={case.ranks > 1:d}"]
    recipe = load_recipe(RECIPE, [*settings, f"train.global_batch_tokens={length * case.ranks}"])
    mesh = join(recipe.parallel, context_parallel)
    engine = build_engine(recipe, case.vocab_size, mesh)
    set_learning_rate(engine, RATE)
    layout = bucket_layouts(recipe, mesh, [length], decide_grids(recipe, mesh, [length]))[length]
    # A micro-batch is one sequence of each replica.
    batches = case.rows().view(context_parallel, layout.num_replicas, 1, length + 1).numpy()

    def step() -> float:
        total = 0.0
        for rows in batches:
            losses = engine(*layout.model_inputs(rows[layout.replica], None, mesh.device))
            loss = losses.mean()
            engine.backward(loss)
            engine.step()
            total += loss.item() / context_parallel
        return total

    return step


def over_all_ranks(case: Case) -> Step:
    """Return LongRing's step, with each sequence over all ranks."""
    return longring(case, case.ranks)


def transformers(case: Case) -> Step:
    """Return the step of transformers' Llama, with its own loss, sdpa and torch's fused AdamW."""
    from longring.model.families.write import write_config
    from transformers import LlamaConfig, LlamaForCausalLM

    tree: Any = write_config(case.published)
    model = LlamaForCausalLM._from_config(LlamaConfig(**tree), attn_implementation="sdpa")
    model.load_state_dict(case.weights())
    model.train()
    return torch_step(
        case, model, lambda m, tokens, targets: m(tokens, labels=targets, shift_labels=targets, use_cache=False).loss
    )


def torch_fused(case: Case) -> Step:
    """Return the step of a Llama of plain torch, with its fused AdamW."""
    return torch_step(case, PlainLlama(case), _plain_loss)


def torch_foreach(case: Case) -> Step:
    """Return the step of a Llama of plain torch, with its AdamW over lists of tensors."""
    return torch_step(case, PlainLlama(case), _plain_loss, fused=False)


def _plain_loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def torch_step(
    case: Case, model: nn.Module, loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor], fused: bool = True
) -> Step:
    """Return a step as one writes it in torch: DDP over several ranks, clipping by the norm, and AdamW."""
    if case.ranks > 1:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(model)
    decayed = {fused_: [p for p in model.parameters() if (p.dim() > 1) is fused_] for fused_ in (True, False)}
    groups = [{"params": decayed[True]}, {"params": decayed[False], "weight_decay": 0.0}]
    kind = {"fused": True} if fused else {"foreach": True}
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, weight_decay=DECAY, **kind)
    rows = case.rows()[rank()][None]

    def step() -> float:
        loss = loss_of(model, rows[:, :-1], rows[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


class PlainLlama(nn.Module):
    """Llama of torch's own modules, under the names of transformers."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        m = self.config = case.model
        layers = [_PlainLayer(m) for _ in range(m.num_layers)]
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(case.vocab_size, m.hidden_size),
                "layers": nn.ModuleList(layers),
                "norm": nn.RMSNorm(m.hidden_size, m.norm_epsilon),
            }
        )
        self.lm_head = nn.Linear(m.hidden_size, case.vocab_size, bias=False)
        angles = torch.arange(case.tokens).double()[:, None] * m.rope_base ** -(
            torch.arange(0, m.head_dim, 2).double() / m.head_dim
        )
        both = torch.cat([angles, angles], -1)  # [tokens, d]
        self.rope = both.cos().float(), both.sin().float()
        self.load_state_dict(case.weights())

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits `[b, s, vocabulary]` of tokens `[b, s]`."""
        x = self.model["embed_tokens"](tokens)
        for layer in self.model["layers"]:  # type: ignore[union-attr]
            x = layer(x, *self.rope)
        return self.lm_head(self.model["norm"](x))


class _PlainLayer(nn.Module):
    def __init__(self, m: ModelConfig) -> None:
        super().__init__()
        self.head_dim = m.head_dim
        q, kv, hidden, inner = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim, m.hidden_size, m.ffn_hidden_size

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False)

        sizes = {"q_proj": (hidden, q), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (q, hidden)}
        self.self_attn = nn.ModuleDict({name: linear(*size) for name, size in sizes.items()})
        sizes = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
        self.mlp = nn.ModuleDict({name: linear(*size) for name, size in sizes.items()})
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(hidden, m.norm_epsilon) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.input_layernorm(x)
        q, k, v = (
            self.self_attn[name](h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = (y * cos + torch.cat([-y.chunk(2, -1)[1], y.chunk(2, -1)[0]], -1) * sin for y in (q, k))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.self_attn["o_proj"](out.transpose(1, 2).flatten(2))
        h = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](h)) * self.mlp["up_proj"](h))
