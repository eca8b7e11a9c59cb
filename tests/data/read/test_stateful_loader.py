"""The loader of other trainers: its batches are those of the run's own, whatever restarts lie between."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.errors import refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from longring.data.config import DataConfig, LoaderConfig
from longring.data.curriculum_config import CurriculumConfig, RenewalConfig
from longring.data.format.manifest import open_prepared
from longring.data.prepare.prepare import prepare
from longring.data.read.batch_order import ReplicaShare
from longring.data.read.loader import Loader
from longring.data.read.mix import training_order
from longring.data.read.stateful_loader import Batch, StatefulLoader
from rich.console import Console

STEPS, BATCH_TOKENS = 6, 128
ON_DEMAND = LoaderConfig(workers=0, hash_bytes_per_s=0)
DIVISIONS = [(1, 32), (1, 64), (2, 32), (2, 16), (4, 16), (4, 8), (8, 16)]
"""Numbers of ranks, and tokens of each; three of them share the sequences of 32 tokens."""


@pytest.fixture(name="prepared")
def _prepared(make_config: Callable[..., DataConfig], words: Callable[..., str], console: Console) -> Path:
    config = make_config([words(4 + 3 * number, number) for number in range(40)], rest="pack", min_bucket_tokens=16)
    prepare(config, console)
    return Path(config.directory)


def stateful(directory: Path, rank: int = 0, num_ranks: int = 1, tokens_per_rank: int = 32, **others: Any):
    arguments = {"steps": STEPS, "global_batch_tokens": BATCH_TOKENS, "seed": 5, "config": ON_DEMAND, **others}
    return StatefulLoader(directory, rank=rank, num_ranks=num_ranks, tokens_per_rank=tokens_per_rank, **arguments)


def content(batch: Batch) -> tuple[int, list, list, tuple | None]:
    assert batch.positions.tolist() == list(range(batch.bucket))
    return batch.step, batch.tokens.tolist(), batch.labels.tolist(), batch.document_starts


@pytest.mark.full
def test_batches_are_those_of_the_runs_own_loader(prepared: Path):
    manifest = open_prepared(prepared)
    made_of: dict[str, Any] = {"steps": STEPS, "global_batch_tokens": BATCH_TOKENS, "seed": 5}
    order = training_order(manifest, CurriculumConfig(), ON_DEMAND, **made_of)
    own = Loader(manifest, order, ON_DEMAND, lambda length: ReplicaShare(1, 2, 32 // length)).batches(0, STEPS)
    found = list(map(content, stateful(prepared, rank=1, num_ranks=2)))
    several = 0
    for batch, (step, tokens, labels, starts) in zip(own, found, strict=True):
        assert (batch.step, batch.document_starts) == (step, starts)
        assert np.array_equal(batch.rows[:, :-1], tokens)
        assert np.array_equal(batch.rows[:, 1:], labels)
        several += any(len(of_row) > 1 for of_row in starts or ())
    assert several, "no sequence with several documents was read"


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_restart_goes_on_with_the_batches_of_no_restart(prepared: Path, data: st.DataObject):
    """Ranks change at ends of steps; within a step the same ranks go on."""
    num_ranks, tokens_per_rank = data.draw(st.sampled_from(DIVISIONS), "before")
    taken = data.draw(st.integers(1, STEPS * BATCH_TOKENS // (num_ranks * tokens_per_rank)), "taken")
    at_end = taken * num_ranks * tokens_per_rank % BATCH_TOKENS == 0
    after = data.draw(st.sampled_from(DIVISIONS), "after") if at_end else (num_ranks, tokens_per_rank)
    loader = stateful(prepared, data.draw(st.integers(0, num_ranks - 1), "rank"), num_ranks, tokens_per_rank)
    for batch in islice(loader, taken):
        assert batch.ranks == max(1, batch.bucket // tokens_per_rank)
    state = json.loads(json.dumps(loader.state_dict()))

    rank = data.draw(st.integers(0, after[0] - 1), "rank after")
    again, whole = stateful(prepared, rank, *after), list(map(content, stateful(prepared, rank, *after)))
    again.load_state_dict(state)
    rest = list(map(content, again))
    assert rest == whole[len(whole) - len(rest) :]
    assert len(rest) * after[0] * after[1] == STEPS * BATCH_TOKENS - state["tokens"]
    assert again.state_dict() == {**state, "tokens": STEPS * BATCH_TOKENS}
    assert list(again) == [], "the run has ended"


@pytest.mark.full
def test_advice(prepared: Path):
    """Each message is seen, and is gone once its advice is taken."""
    renewal = CurriculumConfig(renewal=RenewalConfig(rate=0.2))
    assert refused(lambda: stateful(prepared, curriculum=renewal)).endswith("`longring train` measures; set it to 0")
    stateful(prepared, curriculum=CurriculumConfig(renewal=RenewalConfig(rate=0)))
    assert refused(lambda: stateful(prepared, tokens_per_rank=16)).endswith(
        "1 ranks cannot hold sequences of 32 tokens; set it to 32"
    )
    stateful(prepared, tokens_per_rank=32)
    told = refused(lambda: stateful(prepared, num_ranks=8))
    assert told.endswith("set it, and curriculum.slot_tokens where that is set, to a multiple of 256")
    stateful(prepared, num_ranks=8, global_batch_tokens=256)

    told = refused(lambda: stateful(prepared, rank=4, num_ranks=4))
    assert told == "rank = 4: must be at least 0 and below num_ranks = 4; give this rank's own index"
    stateful(prepared, rank=3, num_ranks=4)
    for wrong in ({"steps": 0}, {"tokens_per_rank": 0}):
        assert refused(lambda wrong=wrong: stateful(prepared, **wrong)).endswith("raise the one that is 0")

    loader = stateful(prepared, num_ranks=2)
    next(iter(loader))
    state, others = loader.state_dict(), stateful(prepared, num_ranks=4)
    told = refused(lambda: others.load_state_dict(state))
    assert told.endswith("load it on as many ranks as took it, or take it at the end of a step")
    stateful(prepared, num_ranks=2).load_state_dict(state)
    others.load_state_dict({**state, "tokens": BATCH_TOKENS})
    told = refused(lambda: stateful(prepared, seed=6).load_state_dict(state))
    assert told.startswith("state_dict.seed = 5: is 6 in this loader")
    assert told.endswith("make the loader as the one whose state this is")
