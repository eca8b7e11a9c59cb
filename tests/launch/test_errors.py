"""Bad input ends with one error line before any rank starts, and leaves no partial files."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.faulty import start
from helpers.sandbox import Sandbox
from helpers.small_checkpoint import make_checkpoint
from longring.data.files import sha256_of
from longring.launch import cli, errors
from longring.launch import train as train_module
from longring.launch.checkpoint.format import last_good_checkpoint
from longring.launch.commands import submit as submit_module
from longring.launch.config import EvaluateConfig, load_recipe
from longring.launch.errors import IO_ERROR, NODE_USER_ERROR, USER_ERROR
from longring.launch.ranks import start as start_module
from longring.launch.run_directory import RunDirectory
from longring.launch.settings import to_tree

COMMANDS = (
    *("prepare", "plan", "order", "train", "submit", "requeue"),
    *("completion", "evaluate", "watch", "report", "checkpoints", "inspect", "topology", "import", "export"),
)


@pytest.fixture
def data(recipe_file, tmp_path) -> Path:
    """A copy of the prepared data, which the test may break."""
    return Path(shutil.copytree(recipe_file.parent / "data", tmp_path / "data"))


def error_of(capsys, *arguments: str) -> str:
    """Run a command; return the one error that it prints."""
    assert cli.main(list(arguments)) == (NODE_USER_ERROR if "--job" in arguments else USER_ERROR)
    error = capsys.readouterr().err
    assert error.count("error:") == 1
    assert "Traceback" not in error
    return " ".join(error.split())


def train_error(capsys, recipe_file: Path, tmp_path: Path, *overrides: str, ranks: int = 4) -> str:
    """Return the error of `longring train`, which leaves no run directory."""
    run = tmp_path / "run"
    error = error_of(capsys, "train", str(recipe_file), f"run_directory={run}", *overrides, "--ranks", str(ranks))
    assert not run.exists(), "no partial run directory"
    return error


def test_unknown_key(capsys, recipe_file, tmp_path):
    assert "did you mean train.steps?" in train_error(capsys, recipe_file, tmp_path, "train.stepz=1")


def test_impossible_world_size(capsys, recipe_file, tmp_path):
    error = train_error(capsys, recipe_file, tmp_path, "parallel.tokens_per_rank=128", ranks=3)
    assert "world of 3 ranks: cannot hold the longest bucket in use, 512 tokens" in error
    assert "start a multiple of 4 ranks" in error


def test_tensor_parallelism_that_does_not_divide_the_heads(capsys, recipe_file, tmp_path):
    error = train_error(capsys, recipe_file, tmp_path, "parallel.tensor=4")
    assert "parallel.tensor = 4: must divide model.num_kv_heads = 2" in error


def test_missing_data(capsys, recipe_file, tmp_path):
    error = train_error(capsys, recipe_file, tmp_path, f"data.directory={tmp_path}/nowhere")
    assert "nowhere" in error
    assert "longring prepare" in error


def test_missing_shard(capsys, recipe_file, data, tmp_path):
    shard = next(data.rglob("train*.tar"))
    shard.unlink()
    error = train_error(capsys, recipe_file, tmp_path, f"data.directory={data}")
    assert f"{shard}: missing" in error


def test_truncated_shard(capsys, recipe_file, data, tmp_path):
    shard = next(data.rglob("train*.tar"))
    whole = sha256_of(shard)
    shard.write_bytes(shard.read_bytes()[:-512])
    error = train_error(capsys, recipe_file, tmp_path, f"data.directory={data}")
    size = shard.stat().st_size
    assert f"{shard}: {size} bytes with SHA-256 {sha256_of(shard)}, {size + 512} bytes with SHA-256 {whole}" in error


def test_tokenizer_that_does_not_match_the_manifest(capsys, recipe_file, data, tmp_path):
    tokenizer = data / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("Ġ", "Ġ ", 1))
    error = train_error(capsys, recipe_file, tmp_path, f"data.directory={data}")
    assert "tokenizer.json: SHA-256 is" in error


def test_data_prepared_for_other_buckets(capsys, recipe_file, tmp_path):
    error = train_error(capsys, recipe_file, tmp_path, "data.max_bucket_tokens=256")
    assert "data.max_bucket_tokens = 256: data.directory = " in error
    assert "was made with 512" in error


def test_empty_corpus(capsys, recipe_file, tmp_path):
    (tmp_path / "empty.jsonl").write_text(json.dumps({"text": ""}) + "\n")
    data = tmp_path / "new-data"
    arguments = (f"data.directory={data}", f"data.source.path={tmp_path}/empty.jsonl")
    error = error_of(capsys, "prepare", str(recipe_file), *arguments)
    assert "data.max_bad_fraction = 0.05: 1 of 1 records of source 'documents' are bad (1 empty)" in error
    assert not list(tmp_path.glob("new-data*"))


@pytest.mark.full
def test_a_full_disk_is_an_error_of_files(capsys, recipe_file, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    data = (str(recipe_file), f"data.directory={tmp_path}/new", "data.rest=pack", "--workers", "1")
    order = ("order.mode=in_context", f"order.directory={tmp_path}/ordered")
    for command in (("prepare", *data), ("order", *data, *order)):
        with monkeypatch.context() as patch:
            patch.setattr(np, "save", fail)
            for _ in range(2):
                assert cli.main(list(command)) == IO_ERROR
                [error] = capsys.readouterr().err.splitlines()
                assert ": the disk is full" in error and "; make room, and the same command continues" in error
        assert cli.main(list(command)) == 0
        capsys.readouterr()


def test_run_directory_of_another_recipe(capsys, recipe_file, tmp_path):
    run, recipe = RunDirectory(tmp_path / "other"), load_recipe(recipe_file)
    run.create(recipe)
    data = sha256_of(recipe_file.parent / "data" / "manifest.json")
    make_checkpoint(run.checkpoints, 5, data=data, recipe=to_tree(recipe))
    before = run.recipe_file.read_text()
    error = error_of(
        capsys, "train", str(recipe_file), f"run_directory={run.path}", "train.learning_rate=0.5", "--ranks", "4"
    )
    assert "train.learning_rate = 0.5: was 0.003 in the 5 steps done, and step 1 would have had" in error
    assert run.recipe_file.read_text() == before


def test_run_directory_with_other_files(capsys, recipe_file, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("...")
    error = error_of(capsys, "train", str(recipe_file), f"run_directory={tmp_path}/thesis", "--ranks", "4")
    assert "holds other files" in error


def test_evaluate_without_a_run_or_a_checkpoint(capsys, recipe_file, tmp_path):
    assert "not a run directory" in error_of(capsys, "evaluate", str(tmp_path))
    run = RunDirectory(tmp_path / "fresh")
    run.create(load_recipe(recipe_file))
    assert "no checkpoint yet" in error_of(capsys, "evaluate", str(run.path))
    assert "only evaluate.* and parallel.* may differ from the run" in error_of(
        capsys, "evaluate", str(run.path), "train.steps=1"
    )
    checkpoint = make_checkpoint(run.checkpoints, 4)
    manifest = (checkpoint / "manifest.json").read_text()
    (checkpoint / "manifest.json").write_text(manifest[:-9])
    said = f"checkpoints {run.checkpoints}: all are damaged; bring back a copy of one"
    assert said in error_of(capsys, "evaluate", str(run.path))
    (checkpoint / "manifest.json").write_text(manifest)
    assert last_good_checkpoint(run.checkpoints) is not None, "the advice works"


PLAIN = """
import sys
from longring.launch import cli
recipe, *mistakes = sys.argv[1:]
for mistake in mistakes:
    assert cli.main(["train", recipe, *mistake.split()]) == 2, mistake
    assert not {"torch", "transformers", "datasets"} & set(sys.modules), mistake
"""


def test_a_mistake_is_told_before_torch_is_imported(recipe_file, tmp_path):
    """A key or value that is wrong, two that contradict, ranks that do not divide a batch, data of other settings."""
    mistakes = {
        "train.stepz=3": "did you mean train.steps?",
        "train.steps=0": "must be at least 1",
        "train.warmup_steps=30": "train.steps = 20: below the 31 steps",
        "parallel.tokens_per_rank=512 --ranks 3": "of one micro-batch on 3 ranks",
        "track.wandb_project=x": "run `pip install wandb`",
        f"data.directory={tmp_path}": "run `longring prepare RECIPE`",
        "data.min_bucket_tokens=128": "longring prepare",
    }
    words = [sys.executable, "-c", PLAIN, str(recipe_file), *mistakes]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert len(said) == len(mistakes)
    assert all(text in line for text, line in zip(mistakes.values(), said, strict=True)), said


def test_every_node_refuses_a_recipe_that_does_not_fit_its_run(capsys, recipe_file, tmp_path):
    """No launcher waits for one that has ended, and Slurm sees one status."""
    recipe = load_recipe(recipe_file, [f"run_directory={tmp_path}"])
    data = sha256_of(Path(recipe.data.directory, "manifest.json"))
    make_checkpoint(tmp_path / "checkpoints", 4, data=data, recipe=to_tree(recipe))
    several = ["--ranks", "2", "--nodes", "2", "--rendezvous", "localhost:9", "--job", "a", "--address", "localhost"]
    for node in ("0", "1"):
        words = [str(recipe_file), f"run_directory={tmp_path}", "train.seed=1", *several, "--node", node]
        assert "train.seed = 1: was 0 in the 4 steps done" in error_of(capsys, "train", *words)


def test_a_job_is_submitted_where_shards_cannot_be_seen(capsys, recipe_file, tmp_path, monkeypatch):
    """They may lie on the disks of the nodes, or be made again by a job before this one."""
    sandbox = Sandbox(recipe_file, tmp_path, capsys)
    next(sandbox.data.rglob("*.tar")).unlink()
    sandbox.begin()
    monkeypatch.setattr(submit_module.shutil, "which", lambda name: None)
    words = [str(sandbox.recipe), f"run_directory={sandbox.run.path}", "slurm.ranks_per_node=4", "--nodes", "1"]
    assert "sbatch: not on this machine" in error_of(capsys, "submit", *words)


@pytest.mark.parametrize(
    ("codes", "status"),
    [([2, -6, -6], 2), ([-6, 70], 70), ([75, -6, -15], 75), ([-6, -9], 137), ([-6, -15], 134), ([75, 74, 1], 1)],
)
def test_the_status_of_a_start_is_closest_to_the_cause(codes, status):
    """torch's thread of NCCL ends ranks by SIGABRT once another is gone, and torchrun the rest by SIGTERM."""
    failures = [SimpleNamespace(exitcode=code, local_rank=rank) for rank, code in enumerate(codes)]
    assert start_module._status_of(failures, stopped=False) == status  # type: ignore[arg-type]


def test_a_rank_started_without_torchrun(capsys, recipe_file, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert train_module.main([str(recipe_file)]) == 2
    assert "start with torchrun" in " ".join(capsys.readouterr().err.split())


def test_ranks_of_an_impossible_world_print_one_error(recipe_file, tmp_path):
    started = start(3, recipe_file, ["parallel.tokens_per_rank=128", f"run_directory={tmp_path}/r"], tmp_path / "out")
    assert started.wait() == [2, 2, 2]
    said = started.output.read_text()
    assert said.count("error: world of 3 ranks: cannot hold") == said.count("error:") == 1


def test_help_of_every_command_has_an_example_and_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        text = capsys.readouterr().out
        assert f"example: longring {command} " in " ".join(text.split())
        assert max(map(len, text.splitlines())) <= 80


def test_help_of_evaluate_has_its_settings_with_their_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    shown = re.findall(r"^  evaluate\.(\S+)=(\S+)  ?", capsys.readouterr().out, re.MULTILINE)
    assert {name: json.loads(value) for name, value in shown} == to_tree(EvaluateConfig())


@pytest.mark.parametrize("command", ["evaluate", "train", "inspect", "topology"])
def test_settings_are_no_required_argument(capsys, command):
    parser = cli._parsers()[1][command]
    with pytest.raises(SystemExit):
        parser.parse_args(["--no-such-option"])
    assert "key=value" not in capsys.readouterr().err.partition("error: ")[2]
    assert parser.parse_args(["a"]).overrides == []


def test_longring_alone_prints_its_help(capsys):
    assert cli.main([]) == 0
    assert capsys.readouterr().out.startswith("usage: longring ")
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("longring ")


def test_a_shell_completes_commands_options_and_files(capsys, tmp_path):
    assert cli.main(["completion", "bash"]) == 0
    script = tmp_path / "completion.sh"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "mine.toml").touch()
    for words, expected in (
        (["longring", "eval"], "evaluate"),
        (["longring", "checkpoints", "--ver"], "--verify"),
        (["longring", "plan", "min"], "mine.toml"),
    ):
        typed = " ".join(f"'{word}'" for word in words)
        code = (
            f"source {script}; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; "
            f"_shtab_longring longring '{words[-1]}' '{words[-2]}'; echo ${{COMPREPLY[*]}}"
        )
        done = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.split() == [expected], done
    assert "cmd: must be one of bash" in error_of(capsys, "completion", "cmd")


def test_every_exit_status_is_on_its_page():
    page = (Path(__file__).parents[2] / "docs" / "exit-statuses.md").read_text()
    statuses = {name: value for name, value in vars(errors).items() if name.isupper() and isinstance(value, int)}
    assert len(statuses) >= 4
    for name, value in statuses.items():
        assert f"| {value} | `{name}` |" in page


def test_inspect_of_data_takes_only_a_curriculum_and_a_loader(capsys, recipe_file, data):
    arguments = ["inspect", str(data), "curriculum.odds=[8,4,2,1]", "curriculum.cycles=2", "loader.window_tokens=1000"]
    assert cli.main([*arguments, "curriculum.shares={'documents@512'=0.25}"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1,000 steps of 8, 4, 2, 1 in 2 cycles" in said
    assert "Mix by bucket" in said and "Mix by cell cell of the data asked given passes never reached" in said
    assert re.search(r"documents@512 \S+% 25\.0% 25\.0% [\d.]+ 0 ", said), "a row of what is asked, given and left"
    assert data.with_name("data.png").is_file()
    assert "data without a recipe takes only curriculum.* and loader.*" in error_of(
        capsys, "inspect", str(data), "train.steps=3"
    )
    error = error_of(capsys, "inspect", str(data), "curriculum.odds=[1,2]")
    assert "curriculum.odds = [1.0, 2.0]: the data has 4 buckets" in error


def test_slurm_without_slurm(capsys, recipe_file, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    error = error_of(capsys, "prepare", str(recipe_file), f"data.directory={tmp_path}/new", "--slurm", "main")
    assert "there is no sbatch on this machine" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "RECIPE", "--ranks", "0"], "argument --ranks: 0: must be at least 1"),
        (["plan", "RECIPE", "--ranks", "-4"], "argument --ranks: -4: must be at least 1"),
        (["train", "RECIPE", "--ranks", "-1"], "argument --ranks: -1: must be at least 1"),
        (["train", "RECIPE", "--stop-after", "0"], "argument --stop-after: 0: must be at least 1"),
        (["topology", "--ranks", "0"], "argument --ranks: 0: must be at least 1"),
        (["prepare", "RECIPE", "--workers", "-3"], "argument --workers: -3: must be at least 0"),
        (["order", "RECIPE", "--workers", "two"], "argument --workers: 'two': must be a whole number"),
        (["submit", "RECIPE", "--nodes", "0"], "argument --nodes: 0: must be at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_number_of_the_command_line_is_refused_before_anything_is_written(capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
