"""Parts of the experiments on learning: what is held out, cells that resume, prefixes of a document, tables."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from statistics import stdev

import decomposition
import numpy as np
import pytest
import related_prefixes
import untie_the_knots
from lib.cells import Cell, grid, measured_once, restore, results, run_cells
from lib.corpus import files_of, held_out_packages
from lib.learning import beginnings, copies, tokenizer_of
from lib.prefixes import BEGINNING, Text, prefixes, rows_of, standard_error
from lib.script import Row
from longring.data.config import TokenizerConfig
from longring.data.lock import held
from longring.data.prepare.train_tokenizer import train_tokenizer
from longring.launch.config import load_recipe


def test_files_are_found_once_and_bad_ones_are_counted(tmp_path):
    files = {"a/x.py": b"x = 1", "a/__pycache__/x.py": b"no", "b.py": b"b", "c/empty.py": b" \n", "c/d/bad.py": b"\xff"}
    for name, content in {**files, "__editable___finder.py": b"no"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    left_out = Counter()
    found = list(files_of(tmp_path, 0, left_out))
    assert sorted((one.package, one.path, one.text) for one in found) == [("a", "a/x.py", "x = 1"), ("b", "b.py", "b")]
    assert left_out == {"empty": 1, "not UTF-8": 1}
    assert {one.package for one in files_of(tmp_path, 2, Counter())} == {"b"}, "a package that does not fit is left out"


def test_held_out_packages_are_several_and_within_their_share():
    sizes = {f"package{number}": 10 + number % 7 for number in range(200)} | {"large": 900}
    found = held_out_packages(sizes, 0.1)
    taken, room = sum(sizes[name] for name in found), 0.1 * sum(sizes.values())
    assert room - max(sizes[name] for name in sizes if name != "large") < taken <= room
    assert "large" not in found


def test_cells_with_a_result_or_another_process_are_left_alone(tmp_path):
    cells = grid(["one", "two, more"], seeds=2)
    assert [cell.name for cell in cells] == ["one-0", "one-1", "two_more-0", "two_more-1"]
    seen = []

    def measure(cell: Cell):
        seen.append(cell)
        if cell == cells[3]:
            raise InterruptedError
        return {"loss": cell.seed}

    with held(tmp_path / "results" / "two_more-0.lock"), pytest.raises(InterruptedError):
        run_cells(tmp_path, cells, measure)
    assert seen == [cells[0], cells[1], cells[3]]
    found = [(row["arm"], row["seed"], row["loss"]) for row in results(tmp_path, cells)]
    assert found == [("one", 0, 0), ("one", 1, 1)]
    run_cells(tmp_path, cells[:3], measure)
    assert seen[3:] == [cells[2]]


def test_a_directory_goes_on_from_a_record_of_another(tmp_path):
    cells = grid(["one", "two"], seeds=2)
    run_cells(tmp_path / "a", cells[:2], lambda cell: {"loss": cell.seed})
    rows = list(results(tmp_path / "a", cells))
    (tmp_path / "record.json").write_text(json.dumps({"rows": rows, "seconds": {"one": 0.5}}))
    run_cells(tmp_path / "b", cells[:1], lambda cell: {"loss": 7})
    restore(tmp_path / "b", tmp_path / "record.json", cells, ["seconds"])
    run_cells(tmp_path / "b", cells[:3], lambda cell: {"loss": 8})
    assert [row["loss"] for row in results(tmp_path / "b", cells)] == [7, 1, 8], "what a directory has stays"
    assert measured_once(tmp_path / "b", "seconds", dict) == {"one": 0.5}
    with pytest.raises(SystemExit, match=r"has cells \[\('one', 0\), \('one', 1\)\].* name its own"):
        restore(tmp_path / "c", tmp_path / "record.json", grid(["two"], seeds=2))
    with pytest.raises(SystemExit, match=r"has no \['data'\].* name another"):
        restore(tmp_path / "c", tmp_path / "record.json", cells, ["data"])
    assert not (tmp_path / "c").exists()


def test_beginnings_are_the_largest_length_that_fits(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tokenizer.json").write_bytes(train_tokenizer([], TokenizerConfig(vocab_size=257)))
    documents = ["a" * 3, "b" * 4, "c" * 9, "<|endoftext|>"]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    found = list(beginnings(tmp_path / "held_out.jsonl", tokenizer_of(tmp_path, "data"), (4, 8)))
    assert [len(one["tokens"]) for one in found] == [4, 8, 8]
    assert len(set(found[2]["tokens"])) > 1, "the name of the boundary token is text"


def checkpoint(tokens: int, loss: float, gain: float = 2.0, right: float = 0.9):
    tasks = [{"task": "copy_text", "length": 512, "gain": gain, "tokens": right, "exact": 0.0}]
    tasks.append({"task": "needle_single_1", "length": 512, "gain": None, "tokens": 0.5, "exact": 0.0})
    buckets = [{"length": 512, "loss": loss}]
    return {"tokens": tokens, "seconds": tokens / 10, "loss": loss, "tasks": tasks, "buckets": buckets}


def test_the_gate_needs_the_order_of_the_tokens_and_not_their_set_alone():
    assert copies(checkpoint(0, 1.0), 512)
    assert not copies(checkpoint(0, 1.0, gain=0.9), 512)
    assert not copies(checkpoint(0, 1.0, right=0.4), 512)


def test_a_loss_is_reached_between_two_checkpoints():
    rows = [checkpoint(100, 3.0), checkpoint(200, 2.0), checkpoint(300, 1.5)]
    assert decomposition.reached(rows, 2.25, "tokens") == pytest.approx(175)
    assert decomposition.reached(rows, 1.75, "seconds") == pytest.approx(25)
    assert decomposition.reached(rows, 1.0, "tokens") is None


def test_arms_are_compared_with_the_baseline_of_their_seed():
    losses = {"concat": [2.0, 3.0], "grow-p2": [1.5, 2.6]}
    rows = [
        {"arm": arm, "seed": seed, "checkpoints": [checkpoint(100, 4.0), checkpoint(200, loss)]}
        for arm, of_seeds in losses.items()
        for seed, loss in enumerate(of_seeds)
    ]
    grow, concat = decomposition.summary(rows, decomposition.CASES["full"].arms)
    assert (grow["arm"], grow["seeds"], grow["passed"]) == ("grow-p2", 2, 2)
    assert grow["less"] == pytest.approx((-0.45, 0.05 * 2**0.5))
    assert concat["less"] == (0, 0)
    assert grow["tokens_to_baseline"][0] == pytest.approx(
        ((100 + 100 * 2 / 2.5) / 200 + (100 + 100 * 1 / 1.4) / 200) / 2
    )


def test_related_documents_are_of_one_package_and_the_others_of_another_with_their_lengths():
    all_texts = [
        Text(package, f"{package}/{number % 2}", f"{package}/{number % 2}/{number}.py", [number] * (250 + 6 * number))
        for package in ("a", "b", "c")
        for number in range(6)
    ] + [Text("d", "d", f"d/{number}.py", [number] * 1000) for number in range(6)]
    counts = (1, 3)
    targets, found = prefixes(all_texts, counts, limit=3)
    assert len({target.package for target in targets}) == 3 and min(len(one.tokens) for one in targets) >= 2 * BEGINNING
    of = {(one.target, one.kind, len(one.before)): one.before for one in found}
    for number, target in enumerate(targets):
        assert of[number, "none", 0] == []
        for count in counts:
            related, others = of[number, "related", count], of[number, "other", count]
            assert target not in related and {text.package for text in related} == {target.package}
            assert [text.package for text in others] == [others[0].package] * count != [target.package] * count
            if target.package != "d":
                assert related[-1].folder == target.folder, "the nearest document stands next to the target"
                assert others[0].package != "d", "its documents are four times as long"
                gaps = [abs(len(a.tokens) - len(b.tokens)) for a, b in zip(related, others, strict=True)]
                assert max(gaps) <= 6
    boundary, length = 99, 8192
    tokens, starts, parts = rows_of(targets, found, boundary, length)
    for row, start, part, one in zip(tokens, starts, parts, found, strict=True):
        ids = targets[one.target].tokens
        assert row[1:][part == 1].tolist() == ids[:BEGINNING]
        assert row[1:][part == 2].tolist() == [*ids[BEGINNING:], boundary]
        assert row[start] == boundary and (row[:start] == boundary).all()
        stream = [boundary]
        for text in [*one.before, targets[one.target]]:
            stream += [*text.tokens, boundary]
        assert row[start:].tolist() == stream


def test_the_standard_error_counts_packages_and_not_their_documents():
    values = np.array([1.0, 2.0, 4.0, 7.0])
    each = standard_error(values, np.array(["a", "b", "c", "d"]))
    assert each == pytest.approx(stdev(values) / 2), "one document in each package: that of independent values"
    doubled = standard_error(np.repeat(values, 3), np.repeat(np.array(["a", "b", "c", "d"]), 3))
    assert doubled == pytest.approx(each), "documents that are alike within a package add nothing"


def evaluated(arm: str, seed: int, lengths: Sequence[int], gain: float) -> Row:
    tasks = [
        {"task": task, "length": length, "gain": gain, "tokens": 0.25 if task == "backtrace" else 0.75, "exact": 0.0}
        for length in lengths
        for task in ("copy_text", "needle_single_1", "backtrace")
    ]
    buckets = [{"length": length, "loss": 3.0 + seed} for length in lengths]
    return {"arm": arm, "seed": seed, "loss": 3.0 + seed, "buckets": buckets, "tasks": tasks}


def test_gains_of_related_documents_are_over_the_seeds_of_an_order(capsys):
    case = related_prefixes.CASES["full"]
    gains = {"path": [0.25, 0.75], "random": [0.5]}
    rows = [
        {
            **evaluated(arm, seed, (512, 2048, case.context), gain=[2.0, 0.5][seed]),
            "alone": 3.5,
            "behind": [
                {
                    "documents": count,
                    "related": 3.0,
                    "other": 3.0 + gain,
                    "gain": gain,
                    "later_gain": gain / 2,
                    "standard_error": 0.125,
                }
                for count in case.before
            ],
        }
        for arm, of_seeds in gains.items()
        for seed, gain in enumerate(of_seeds)
    ]
    path, random = related_prefixes.summary(rows, case)
    assert (path["arm"], path["seeds"], path["passed"]) == ("path", 2, 1)
    assert [one["documents"] for one in path["behind"]] == list(case.before)
    assert path["behind"][0]["gain"] == pytest.approx((0.5, 0.125**0.5))
    assert path["behind"][0]["over_random"] == (-0.25, None), "seed 1 has no random order"
    assert random["behind"][-1]["gain"] == (0.5, None) and random["behind"][-1]["standard_error"] == 0.125
    related_prefixes.show(rows, case)
    assert max(map(len, capsys.readouterr().out.splitlines())) < 80


def test_scores_after_an_extension_are_by_share_and_length(capsys):
    case = untie_the_knots.CASES["full"]
    rows = [evaluated(arm, seed, case.lengths, gain=2.0 * seed) for arm in case.arms[2:] for seed in range(2)]
    lines = untie_the_knots.summary(rows, case)
    assert [(line["arm"], line["length"]) for line in lines] == [(a, n) for a in case.arms[2:] for n in case.lengths]
    assert {(line["seeds"], line["passed"]) for line in lines} == {(2, 1)}
    assert lines[0]["loss"] == pytest.approx((3.5, 0.5**0.5)) and lines[0]["copying"] == pytest.approx((1, 2**0.5))
    assert (lines[0]["needle"], lines[0]["backtrace"]) == ((0.75, 0), (0.25, 0))
    untie_the_knots.show(rows, case)
    assert max(map(len, capsys.readouterr().out.splitlines())) < 80
    more = {line["arm"]: line["more_needles"] for line in lines}
    assert more == {"share 0": None, "share 0.3": (0, 0), "share 0.8": (0, 0)}


@pytest.mark.parametrize("size", untie_the_knots.CASES)
def test_every_size_of_an_experiment_has_recipes_that_load(size):
    case = decomposition.CASES[size]
    for arm in case.arms:
        load_recipe(decomposition.RECIPE, [*decomposition.settings_of(case, arm), f"train.steps={case.steps}"])
    load_recipe(decomposition.RECIPE, [*decomposition.short_settings(case), f"train.steps={case.short_steps}"])
    case = related_prefixes.CASES[size]
    for arm in case.arms:
        load_recipe(related_prefixes.RECIPE, [*related_prefixes.settings_of(case, arm), f"train.steps={case.steps}"])
    load_recipe(related_prefixes.RECIPE, [*related_prefixes.short_settings(case), f"train.steps={case.short_steps}"])
    case = untie_the_knots.CASES[size]
    load_recipe(untie_the_knots.RECIPE, [*untie_the_knots.short_data(case), f"train.steps={case.steps}"])
    load_recipe(untie_the_knots.RECIPE, [*untie_the_knots.long_data(case), f"train.steps={case.long_steps}"])
