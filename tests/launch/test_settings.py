"""Settings from outside: every number has a range, a text stays in its line, and a file that is no recipe is named."""

from __future__ import annotations

import copy
import json
import math
import re
import shlex
import time
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import pytest
from annotated_types import Interval
from helpers.faulty import start
from hypothesis import given
from hypothesis import strategies as st
from longring.launch import cli
from longring.launch.config import Recipe, load_recipe
from longring.launch.settings import MAX_BYTES, from_tree, read_toml

DEMO = Path(__file__).parents[2] / "launch" / "recipes" / "demo.toml"
TREE = read_toml(DEMO)
RANGE = re.compile(r"must be (at least|above) \S+ and (at most|below) \S+$")
NONSENSE = (
    *(math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324, 0, -1, 1, 2, 0.5, 1.5),
    *(2**31, 2**63 - 1, 2**63, -(2**63), 2**64, 10**400),
)


def numbers(hint: Any, path: str) -> Iterator[tuple[str, Interval | None]]:
    """Yield the dotted key and the range of every number below a type; None where no range stands with the number."""
    if get_origin(hint) is Annotated:
        yield path, next(part for part in get_args(hint) if isinstance(part, Interval))
    elif hint in (int, float):
        yield path, None
    elif is_dataclass(hint):
        for name, inner in get_type_hints(hint, include_extras=True).items():
            yield from numbers(inner, f"{path}.{name}".lstrip("."))
    elif get_origin(hint) is dict:
        yield from numbers(get_args(hint)[1], f"{path}.web")
    elif get_origin(hint) is tuple:
        pair = "" if get_args(hint)[-1] is Ellipsis else ",0"
        yield from numbers(get_args(hint)[0], f"{path}[0{pair}]")
    elif get_origin(hint) in (Union, UnionType):
        for inner in get_args(hint):
            yield from numbers(inner, path)


NUMBERS = dict(numbers(Recipe, ""))


def with_setting(key: str, value: object) -> dict[str, Any]:
    """Return the demo's recipe as tables, with one value; the key `a.b[0]` is the list `a.b` of one number."""
    tree = copy.deepcopy(TREE)
    name, *lists = key.replace("]", "").split("[")
    *tables, name = name.split(".")
    table = tree
    for part in tables:
        table = table.setdefault(part, {})
    for numbers_in in reversed(lists):
        value = [value] * (1 + numbers_in.count(","))
    table[name] = value
    return tree


def test_every_number_of_a_recipe_has_a_range_with_two_finite_ends():
    assert len(NUMBERS) >= 70
    for key, bounds in NUMBERS.items():
        assert bounds is not None, f"{key}: write Annotated[..., Interval(...)]"
        assert len(ends_of(bounds)) == 2 and all(map(math.isfinite, ends_of(bounds))), key


def ends_of(bounds: Interval | None) -> list[Any]:
    assert bounds is not None
    return [end for end in (bounds.ge, bounds.gt, bounds.le, bounds.lt) if end is not None]


def is_inside(value: float, bounds: Any) -> bool:
    low = value >= bounds.ge if bounds.ge is not None else value > bounds.gt
    return low and (value <= bounds.le if bounds.le is not None else value < bounds.lt)


@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_outside_its_range_is_refused_in_one_line(key):
    bounds, ends, refused = NUMBERS[key], ends_of(NUMBERS[key]), 0
    for value in (*NONSENSE, *ends, *(end - 1 for end in ends), *(end + 1 for end in ends)):
        said = ""
        try:
            from_tree(Recipe, with_setting(key, value), source="recipe.toml")
        except ValueError as error:
            said = str(error)
        if is_inside(value, bounds):
            assert not (RANGE.search(said) and f" {key.partition('[')[0]} = " in said), said
        else:
            refused += 1
            assert said.startswith(f"recipe.toml: {key.partition('[')[0]} = ") and RANGE.search(said), (value, said)
            assert "\n" not in said and len(said) < 300
    assert refused >= 6


@pytest.mark.parametrize(
    "setting",
    [
        *("train.clip_grad_norm=nan", "model.norm_epsilon=-1", "model.rope_base=0", "slurm.min_free_memory_gb=nan"),
        *("train.learning_rate=inf", "train.beta1=1.5", "train.beta2=1.5", "model.init_std=nan"),
        *("train.steps=9223372036854775808", "faults.hang_minutes=nan", "slurm.min_free_disk_gb=inf"),
        *("curriculum.shares={web=nan}", "curriculum.odds=[inf]", "knots.chunk_odds=[nan]"),
    ],
)
def test_nonsense_is_one_line_of_the_command(capsys, setting):
    assert cli.main(["plan", str(DEMO), setting]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{setting.partition('=')[0]}" in error
    assert RANGE.search(error.strip())


ENDS = {
    "lowest": (
        *("train.beta1=0", "train.beta2=0", "train.weight_decay=0", "train.clip_grad_norm=0", "train.seed=0"),
        *("model.rope_base=1", "model.norm_epsilon=1e-300", "model.init_std=1e-30", "train.learning_rate=1e-30"),
        *("train.min_learning_rate=0", "loader.workers=0", "loader.prefetch_batches=1", "curriculum.cycles=1"),
    ),
    "highest": (
        *(f"train.seed={2**63 - 1}", "train.clip_grad_norm=1e9", "model.rope_base=1e12", "model.norm_epsilon=1"),
        *("faults.hang_minutes=525600", "faults.spike_window_steps=100000"),
        *("train.keep_checkpoints=99999999", "train.checkpoint_every_steps=99999999", "train.beta1=0.9999999"),
        *("curriculum.odds=[1e60, 1e60, 1e60, 1e60]", "loader.window_tokens=1125899906842624"),
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("ends", ENDS)
def test_a_recipe_at_the_ends_of_its_ranges_trains(recipe_file, tmp_path, ends):
    settings = ["train.steps=2", "train.warmup_steps=0", *ENDS[ends], f"run_directory={tmp_path}/run"]
    output = tmp_path / "output.txt"
    assert start(1, recipe_file, settings, output).wait() == [0], output.read_text()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_blank_lines_are_read_in_time_linear_in_their_number(tmp_path):
    """2^17 of them take 0.02 s; in quadratic time they would take 15 s, and the largest file a quarter of an hour."""
    (tmp_path / "a.toml").write_text("\n" * 2**17 + "x = 1")
    begun = time.process_time()
    assert read_toml(tmp_path / "a.toml") == {"x": 1}
    assert time.process_time() - begun < 2


FILES = {
    "deep arrays": (b"x = " + b"[" * 100_000, "nested too deeply"),
    "deep tables": (b"x = " + b"{a=" * 100_000, "nested too deeply"),
    "a deep key": (b"a" + b".a" * 20_000 + b" = 1", "a line has more than 100 dots"),
    "more than is read": (b"# comment\n" * MAX_BYTES, f"has more than {MAX_BYTES} bytes"),
    "an integer of 10,000 digits": (b"x = " + b"9" * 10_000, "an integer has too many digits"),
    "UTF-16": ("x = 1".encode("utf-16"), "can't decode"),
    "Latin-1": ('x = "café"'.encode("latin-1"), "can't decode"),
    "a zero byte": (b"x = 1\0", "not valid TOML"),
    "a key with a line break": (b'"a\\nb" = 1', r"'a\nb': unknown key"),
    "a table with a line break": (
        DEMO.read_bytes() + b'\n[slurm.options]\n"a\\nb" = "1"',
        r"slurm.options.'a\nb': must consist of letters",
    ),
    "a key of a million letters": (b"a" * 1_000_000 + b" = 1", "unknown key"),
    "a value of a million letters": (b'run_directory = 1\nx = "' + b"a" * 1_000_000 + b'"', "x: unknown key"),
    "a path that no file system has": (b'run_directory = "' + b"a" * 300 + b'"', "at most 3000 and 200; shorten it"),
    "a hexadecimal integer of 40,000 bits": (b"run_directory = 0x" + b"f" * 10_000, "an integer of 40000 bits"),
    "a date": (b"run_directory = 2026-11-21", "must be of type str"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_a_recipe_is_one_line(capsys, tmp_path, name):
    content, said = FILES[name]
    file = tmp_path / "recipe.toml"
    file.write_bytes(content)
    assert cli.main(["plan", str(file)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1 and len(error) < 1000


def test_a_file_that_may_not_be_read_and_a_folder_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"does not exist; name a TOML file"):
        read_toml(tmp_path)
    file = tmp_path / "recipe.toml"
    file.write_text("")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"recipe\.toml: cannot be read: Permission denied; make it readable"):
        read_toml(file)


@given(
    st.text(max_size=30), st.sampled_from(["run_directory", "data.directory", "data.tokenizer.path", "order.encoder"])
)
def test_a_text_of_a_recipe_stays_in_its_line(text, key):
    tree = with_setting(key, f"x{text}")
    if len(f"x{text}".splitlines()) == 1 and text.isprintable():
        from_tree(Recipe, tree)
    elif len(f"x{text}".splitlines()) > 1:
        with pytest.raises(ValueError, match="holds a line break or another control character; remove it") as error:
            from_tree(Recipe, tree)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps=" + "9" * 10_000, "an integer has too many digits; give a simpler value"),
        ("train.steps=" + "[" * 100_000, "nested too deeply; give a simpler value"),
        ("data.sources={a" + ".a" * 200 + "=1}", "a line has more than 100 dots; give a simpler value"),
        ("parallel.zero_stage=1.0", "parallel.zero_stage = 1.0: must be one of 0, 1, 2, 3"),
        ("curriculum.shares.a b=1", r"curriculum.shares.'a b': must consist of letters"),
    ],
)
def test_an_override_that_cannot_be_read_is_one_short_line(override, said):
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        load_recipe(DEMO, [override])
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("evaluate.tasks=[copy", """evaluate.tasks = '[copy': must be a list of words, such as ["copy"]"""),
        (
            "evaluate.tasks=needle, copy",
            """evaluate.tasks = 'needle, copy': must .* words, such as ["needle", "copy"]""",
        ),
        ("evaluate={tasks='uuid'}", """evaluate.tasks = 'uuid': must be a list of words, such as ["uuid"]"""),
        ("model.layer_pattern=window", """model.layer_pattern = 'window': must be a list of names, such as ["full"]"""),
        ("train.profile_ranks=all", "train.profile_ranks = 'all': must be a list of numbers, such as [1, 2]"),
    ],
)
def test_a_value_that_is_no_list_is_told_how_to_write_one(override, said):
    pattern = "^command line: " + re.escape(said).replace(r"\.\*", ".*") + "; in a shell, put it between single quotes$"
    with pytest.raises(ValueError, match=pattern) as error:
        load_recipe(DEMO, [override])
    key, _, rest = str(error.value).removeprefix("command line: ").partition(" = ")
    example = re.findall(r"such as (\[.*\])", rest)[0]
    [word] = shlex.split(f"{key}='{example}'")  # as a shell hands it on
    tables: Any = load_recipe(DEMO, [word])
    for part in key.split("."):
        tables = getattr(tables, part)
    assert list(tables) == json.loads(example)


def test_a_message_names_the_command_line_for_its_values_alone(tmp_path):
    file = tmp_path / "recipe.toml"
    for text, overrides, source in (
        ("steps = -1", [], file),
        ("steps = -1", ["train.seed=1"], file),
        ("steps = 1", ["train.steps=-1"], "command line"),
        ("steps = 1", ["train={steps=-1, learning_rate=1.0, global_batch_tokens=2048}"], "command line"),
        ("stepz = 1", ["train.steps=1"], file),
        ("steps = 1", ["train.stepz=1"], "command line"),
        ("steps = 1", ["trian.steps=1"], "command line"),
        ("steps = 1", ["curriculum.shares.web=2"], "command line"),
        ("steps = 1.5", ["curriculum.shares.web=0.5"], file),
        ("steps = 1", ["data.sources.web={kynd=1}"], "command line"),
    ):
        file.write_text(re.sub(r"^steps = .*$", text, DEMO.read_text(), flags=re.MULTILINE))
        with pytest.raises(ValueError, match=f"^{re.escape(str(source))}: "):
            load_recipe(file, overrides)


def test_a_path_below_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    overrides = ["data.directory=~/data", "data.tokenizer.path=~/a b/tokenizer.json", "data.source.kind=json"]
    recipe = load_recipe(DEMO, [*overrides, "data.source.path=~/corpus/**/*.jsonl", "run_directory=a~/b"])
    assert recipe.data.directory == f"{tmp_path}/data"
    assert recipe.data.tokenizer.path == f"{tmp_path}/a b/tokenizer.json"
    assert recipe.data.source.path == f"{tmp_path}/corpus/**/*.jsonl"
    assert recipe.run_directory == "a~/b"


def test_shares_name_score_bins():
    tree = with_setting("curriculum.shares", {"web.0": 0.5, "web.2@128": 0.1})
    binned = {"kind": "json", "path": "a", "score_field": "quality", "score_edges": [1, 2]}
    del tree["data"]["source"]
    tree["data"]["sources"] = {"web": binned}
    recipe = from_tree(Recipe, tree)
    assert recipe.curriculum.shares == {"web.0": 0.5, "web.2@128": 0.1}
