"""Ranks, starts and checkpoints of one run have one identity; whatever differs is named before anything trains."""

from __future__ import annotations

import json
import shutil
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from helpers.faulty import SMALL, Fault, start
from helpers.lanes import by_lane
from helpers.small_checkpoint import make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from longring.data.files import sha256_of
from longring.launch import identity
from longring.launch import preflight as preflight_module
from longring.launch.agreement import LAST_SAVED, agree
from longring.launch.checkpoint.format import (
    complete_checkpoints,
    read_checkpoint_manifest,
    write_checkpoint_manifest,
)
from longring.launch.config import load_recipe
from longring.launch.preflight import preflight_together
from longring.launch.records import read_records
from longring.launch.settings import to_tree
from longring.parallel.meet import meet
from longring.parallel.world import World
from safetensors.torch import load_file
from torch._C._distributed_c10d import HashStore

EXACT = ("step", "tokens", "loss", "bucket", "cp", "learning_rate", "grad_norm")
DIFFERENCES = {
    "learning rate": ("train.learning_rate=0.01", "train.learning_rate = 0.003 on rank 0, 0.01 on rank 1:"),
    "decay": ("train.weight_decay=0.2", "train.weight_decay = 0.1 on rank 0, 0.2 on rank 1:"),
    "seed": ("train.seed=7", "train.seed = 0 on rank 0, 7 on rank 1:"),
    "clipping": ("train.clip_grad_norm=0.0", "train.clip_grad_norm = 0.5 on rank 0, 0.0 on rank 1:"),
    "steps": ("train.steps=9", "train.steps = 12 on rank 0, 9 on rank 1:"),
    "odds": ("curriculum.odds=uniform", "curriculum.odds = 'grow_p2' on rank 0, 'uniform' on rank 1:"),
    "batch": ("train.global_batch_tokens=4096", "train.global_batch_tokens = 1024 on rank 0, 4096 on rank 1:"),
    "ZeRO": ("parallel.zero_stage=0", "parallel.zero_stage = 1 on rank 0, 0 on rank 1:"),
    "dtype": ("train.dtype=bfloat16", "train.dtype = 'float32' on rank 0, 'bfloat16' on rank 1:"),
    "RoPE": ("model.rope_base=5e4", "model.rope_base = 100000.0 on rank 0, 50000.0 on rank 1:"),
    "a key that one rank has": ("parallel.cp.schedule_of={2='ring'}", "schedule_of.2 = unset on rank 0, 'ring' on"),
    "data": ("data.directory=OTHER", "SHA-256 of the data's manifest = "),
    "code": ("CODE", "SHA-256 of LongRing's code = "),
    "packages": ("PACKAGES", "torch = "),
}


def refusals(recipe_file: Path, directory: Path, by_rank: Mapping[int, Mapping[str, str]]) -> dict[str, str]:
    """Return the error of each case; `by_rank` has the setting in which a rank differs, by rank and case."""
    world = World.from_environment()
    store, rank = meet(world), world.rank
    found = {}
    for case, changed in by_rank[rank].items():
        own = changed.replace("OTHER", str(directory / "other"))
        with pytest.MonkeyPatch.context() as patch:
            if changed == "CODE":
                patch.setattr(identity, "code_hash", lambda: "f" * 64)
            elif changed == "PACKAGES":
                patch.setattr(identity, "version", lambda name: "0.1" if name == "torch" else version(name))
            recipe = load_recipe(
                recipe_file, [*SMALL, f"run_directory={directory}/run", *([own] if "=" in changed else [])]
            )
            try:
                checked = preflight_together(recipe, store, world)
            except (ValueError, OSError) as error:
                found[case] = f"{type(error).__name__}: {error}"
            else:
                found[case] = checked.identity.run
    return found


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.full)])
def test_whatever_differs_between_ranks_is_named_on_all_of_them(on_ranks, recipe_file, tmp_path, world_size):
    other = Path(shutil.copytree(recipe_file.parent / "data", tmp_path / "other"))
    (other / "manifest.json").write_text((other / "manifest.json").read_text() + "\n")
    alike = dict.fromkeys([*DIFFERENCES, "none", "elsewhere"], "")
    differing = {name: setting for name, (setting, _) in DIFFERENCES.items()}
    # The same data may lie elsewhere, and ranks may read ahead as they like.
    differing |= {"none": "", "elsewhere": "loader.workers=0"}
    by_rank = {rank: differing if rank == 1 else alike for rank in range(world_size)}
    results = on_ranks(world_size, refusals, recipe_file, tmp_path, by_rank)
    assert all(result == results[0] for result in results), "all ranks raise the same error, or have the same id"
    found = results[0]
    for case, (_, message) in DIFFERENCES.items():
        assert found[case].startswith("ValueError: "), case
        assert message in found[case]
        said = " on rank 1: all ranks must train the same; start them with one recipe, the same settings, data and code"
        assert found[case].endswith(said)
    assert len(found["none"]) == len(found["elsewhere"]) == 32
    assert not (tmp_path / "run").exists()


def failing(recipe_file: Path, directory: Path) -> list[str]:
    """Return the errors of ranks of which one or all fail their preflight, or see another checkpoint."""
    world = World.from_environment()
    store, rank = meet(world), world.rank
    said = []

    def attempt(*own: str) -> None:
        recipe = load_recipe(recipe_file, [*SMALL, f"run_directory={directory}/run", *own])
        try:
            preflight_together(recipe, store, world)
        except KeyError as error:
            said.append(f"KeyError in {traceback.extract_tb(error.__traceback__)[-1].name}")
        except (ValueError, OSError) as error:
            said.append(f"{type(error).__name__}: {error}")

    attempt(*(["data.directory=/nowhere"] if rank == 1 else []))
    attempt(*(["data.directory=/nowhere"] if rank == 0 else []))
    attempt("data.directory=/nowhere")
    with pytest.MonkeyPatch.context() as patch:

        def unreadable(*_: object) -> None:
            raise (OSError if rank else KeyError)("EIO")

        patch.setattr(preflight_module, "complete_checkpoints", unreadable)
        attempt()
    agreed = {LAST_SAVED: "step-3" if rank else "step-6"}
    try:
        agree(store, rank, world.size, agreed)
    except (ValueError, OSError) as error:
        said.append(f"{type(error).__name__}: {error}")
    return said


def test_what_fails_on_one_rank_ends_all(on_ranks, recipe_file, tmp_path):
    zeroth, first, *others = on_ranks(4, failing, recipe_file, tmp_path)
    assert all(other == first for other in others)
    assert zeroth[3] == "KeyError in unreadable", "a bug keeps its traceback"
    assert [*zeroth[:3], *zeroth[4:]] == [*first[:3], *first[4:]]
    one, zero, every, bug, older = first
    assert one.startswith("ValueError: rank 1: /nowhere/manifest.json: does not exist")
    assert zero.startswith("ValueError: rank 0: /nowhere/manifest.json: does not exist")
    assert every.startswith("ValueError: /nowhere/manifest.json: does not exist"), "no rank is named for all"
    assert bug == "CommonError: ranks 1, 2, 3: EIO", "a file that cannot be read counts as the worst error"
    assert older.startswith(
        "CommonError: last checkpoint in run_directory = 'step-6' on rank 0, 'step-3' on ranks 1, 2, 3: the ranks see "
    )
    assert "the same command continues the run" in older


def looking(recipe_file: Path, directory: Path) -> list[tuple[int, str]]:
    """Return the steps done and the id of the run by two preflights; only rank 0 may open a file of a checkpoint."""
    world = World.from_environment()
    recipe = load_recipe(recipe_file, [*SMALL, f"run_directory={directory}"])
    with pytest.MonkeyPatch.context() as patch:
        if world.rank:
            for name in ("read_checkpoint_manifest", "find_damage"):
                patch.setattr(f"longring.launch.checkpoint.format.{name}", None)
        both = [preflight_together(recipe, meet(world), world) for _ in range(2)]
    return [(checked.steps_done, checked.identity.run) for checked in both]


@pytest.mark.full
def test_one_rank_looks_into_the_last_checkpoint_for_all(on_ranks, recipe_file, tmp_path):
    """The last of two has lost a file, which other ranks do not know when they join."""
    recipe = load_recipe(recipe_file, [*SMALL, f"run_directory={tmp_path}"])
    data = sha256_of(Path(recipe.data.directory, "manifest.json"))
    for step in (3, 6):
        last = make_checkpoint(tmp_path / "checkpoints", step, data=data, recipe=to_tree(recipe))
    next(last.glob("*.safetensors")).unlink()
    run = read_checkpoint_manifest(last).state.run
    assert on_ranks(2, looking, recipe_file, tmp_path) == [[(3, run)] * 2] * 2


@settings(max_examples=60)
@given(
    world_size=st.integers(1, 12),
    data=st.data(),
)
def test_agreement_of_any_ranks(world_size, data):
    """All ranks get rank 0's entries, or the same error, which names a key that differs and all its values."""
    values = st.integers(0, 1) | st.none()
    mine = [data.draw(st.fixed_dictionaries({"a": values, "b": values})) for _ in range(world_size)]
    mine[0] = {key: value or 0 for key, value in mine[0].items()}
    store = HashStore()

    def on_rank(rank: int) -> Any:
        try:
            return agree(store, rank, world_size, mine[rank])
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(world_size) as pool:
        for _ in range(2):  # a store serves several agreements
            results = list(pool.map(on_rank, range(world_size)))
            assert all(result == results[0] for result in results)
            differing = {
                rank: key
                for rank, entries in enumerate(mine)
                for key in reversed(entries)
                if entries[key] not in (None, mine[0][key])
            }
            if not differing:
                assert results[0] == mine[0]
                continue
            key = differing[min(differing)]
            ranks = [rank for rank in sorted(differing) if differing[rank] == key]
            named = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks[:8]))}"
            assert results[0].startswith(f"{key} = {mine[0][key]!r} on rank 0, {1 - mine[0][key]!r} on {named}")


class Run:
    """A run of twelve steps, which may be started several times."""

    def __init__(self, recipe_file: Path, directory: Path, world_size: int = 2, overrides: Sequence[str] = ()) -> None:
        self.path = directory / "run"
        self.output = directory / "output.txt"
        self._recipe_file = recipe_file
        self._world_size = world_size
        self._overrides = [*SMALL, f"run_directory={self.path}", *overrides]

    def start(self, *faults: Fault, overrides: Sequence[str] = (), **options: Any) -> list[int]:
        self.output.unlink(missing_ok=True)
        words = [*self._overrides, *overrides]
        return start(self._world_size, self._recipe_file, words, self.output, faults, **options).wait()

    @property
    def said(self) -> str:
        return " ".join(self.output.read_text().split())

    @property
    def starts(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "starts.jsonl").read_text().splitlines()]

    @property
    def saved(self) -> list[str]:
        return [path.name for path in complete_checkpoints(self.path / "checkpoints")]

    @property
    def result(self) -> tuple[list[list[Any]], dict[str, Any]]:
        """The metrics of all steps, and the bytes of every tensor of the last checkpoint."""
        path = complete_checkpoints(self.path / "checkpoints")[0]
        tensors = {
            f"{file.name}/{key}": tensor.numpy().tobytes()
            for file in path.glob("*.safetensors")
            for key, tensor in load_file(file).items()
        }
        return [[step[key] for key in EXACT] for step in read_records(self.path / "metrics.jsonl")], tensors


@pytest.fixture(scope="module")
def whole(recipe_file, tmp_path_factory) -> Run:
    """A run without faults."""
    run = Run(recipe_file, tmp_path_factory.mktemp("whole"))
    assert run.start() == [0, 0]
    return run


@pytest.mark.full
def test_ranks_that_differ_end_before_they_train_and_the_run_goes_on_without_the_difference(
    recipe_file, tmp_path, whole
):
    run = Run(recipe_file, tmp_path)
    for setting in ("parallel.zero_stage=0", "train.learning_rate=0.01"):
        assert run.start(own={1: [setting]}) == [2, 2]
        assert run.said.count("error:") == 1
        assert f"{setting.partition('=')[0]} = " in run.said
        assert not run.path.exists()
    assert run.start(stop_after=4) == [0, 0]
    for setting in ("train.steps=9", "model.rope_base=5e4"):
        assert run.start(own={0: [setting]}) == [2, 2]
        assert run.saved == ["step-00000004", "step-00000003"], "nothing was trained, and nothing put aside"
    assert run.start() == [0, 0]
    assert run.result == whole.result
    assert run.start() == [0, 0]
    assert "has its 12 steps already: nothing to train" in run.said


@pytest.mark.full
def test_starts_and_checkpoints_carry_the_identity(recipe_file, tmp_path, whole):
    run = Run(recipe_file, tmp_path)
    assert run.start(stop_after=4) == [0, 0]
    (run.path / "recipe.json").unlink()
    assert run.start(overrides=["train.learning_rate=0.03"]) == [2, 2]
    assert "train.learning_rate = 0.03: was 0.003 in the 4 steps done, and step 1 would have had" in run.said
    assert run.start(overrides=["train.global_batch_tokens=4096"]) == [2, 2]
    assert "train.global_batch_tokens = 4096: was 1024 in the 4 steps done, and step 1 would have been" in run.said
    assert run.start(overrides=["train.keep_checkpoints=9", "faults.hang_minutes=5"], stop_after=5) == [0, 0]
    assert "changed since: faults.hang_minutes from 10.0 to 5.0, train.keep_checkpoints from 3 to 9" in run.said
    assert run.start(overrides=["train.keep_checkpoints=9"]) == [0, 0]
    assert run.result == whole.result
    first, second, third = run.starts
    states = [read_checkpoint_manifest(path).state for path in complete_checkpoints(run.path / "checkpoints")]
    assert {state.run for state in states} == {line["run"] for line in run.starts}
    assert first["run"] != whole.starts[0]["run"]
    assert first["identity"] != second["identity"] != third["identity"] != first["identity"]
    assert [first["changed"], third["changed"]] == [{}, {"faults.hang_minutes": {"before": 5.0, "now": 10.0}}]
    assert json.loads((run.path / "recipe.json").read_text())["train"]["keep_checkpoints"] == 9
    recorded = {state.step: state.recipe["train"]["keep_checkpoints"] for state in states}
    assert recorded == {12: 9, 9: 9, 6: 9, 5: 9, 4: 3, 3: 3}
    assert {state.code for state in states} == {identity.code_hash()}


@pytest.mark.full
def test_a_checkpoint_of_another_run_is_refused(recipe_file, tmp_path, whole):
    run = Run(recipe_file, tmp_path)
    assert run.start(stop_after=4) == [0, 0]
    foreign = run.path / "checkpoints" / "step-00000012"
    shutil.copytree(whole.path / "checkpoints" / foreign.name, foreign)
    for _ in range(2):
        assert run.start() == [2, 2]
        ids = whole.starts[0]["run"], run.starts[0]["run"]
        assert f"checkpoint {foreign}: is of run {ids[0]}, and run_directory = {run.path} has run {ids[1]};" in run.said
        assert run.saved == ["step-00000012", "step-00000004", "step-00000003"]
    shutil.rmtree(foreign)
    assert run.start() == [0, 0]
    assert run.result == whole.result


@pytest.mark.full
def test_another_version_is_told_and_not_refused(recipe_file, tmp_path, whole):
    run = Run(recipe_file, tmp_path)
    assert run.start(stop_after=4) == [0, 0]
    path = complete_checkpoints(run.path / "checkpoints")[0]
    rewrite_state(path, code="0" * 64, packages={**identity.package_versions(), "torch": "1.0"})
    assert run.start(stop_after=8) == [0, 0]
    now = identity.code_hash()[:16]
    changed = f"SHA-256 of LongRing's code from '0000000000000000' to '{now}', torch from '1.0' to "
    assert f"changed since: {changed}" in run.said
    assert run.starts[-1]["changed"]["torch"]["before"] == "1.0"
    assert run.start() == [0, 0]
    assert "changed since" not in run.said
    assert run.result == whole.result


def rewrite_state(checkpoint: Path, **state: Any) -> None:
    """Write other values into the state of a checkpoint, with the hash of the new content."""
    manifest = read_checkpoint_manifest(checkpoint)
    write_checkpoint_manifest(checkpoint, replace(manifest, state=replace(manifest.state, **state)))


DRIFTS = {
    # Under ZeRO 1 every step gathers the weights anew, so only a flip after the last step is left when it is saved.
    "2 ranks, ZeRO 1": (2, 1, Fault(1, "drift", step=6, operation="saving"), "ranks 0, 1"),
    "2 ranks, ZeRO 0": (2, 0, Fault(1, "drift", step=4, operation="summing"), "ranks 0, 1"),
    "4 ranks, ZeRO 0": (4, 0, Fault(2, "drift", step=4, operation="summing"), "rank 2"),
}


@pytest.mark.parametrize("case", by_lane(DRIFTS, quick=[], slow=["4 ranks, ZeRO 0"]))
def test_a_rank_that_drifts_is_named_and_its_step_is_not_saved(recipe_file, tmp_path, case):
    world_size, stage, fault, named = DRIFTS[case]
    overrides = [f"parallel.zero_stage={stage}"]
    run, sound = (Run(recipe_file, tmp_path / name, world_size, overrides) for name in ("drift", "sound"))
    assert sound.start() == [0] * world_size
    for _ in range(2):
        assert run.start(fault) == [74] * world_size
        assert run.said.count("error:") == 1
        assert f"error: {named}: weights after step 6 are not those of the replicas" in run.said
        assert run.saved == ["step-00000003"]
    event = json.loads((run.path / "events.jsonl").read_text().splitlines()[-1])
    assert event["event"] == "drift"
    assert event["message"].startswith(named)
    assert run.start() == [0] * world_size
    assert run.result == sound.result
