"""The advice of errors about what lies outside works when carried out: stores, packages, sbatch, parts of an array."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from helpers.sandbox import Sandbox
from longring.data.format.manifest import open_prepared
from longring.data.prepare import prepare as prepare_module
from longring.launch import cli
from longring.launch.preflight import preflight

MEMORY = "memory://longring-advice"
PACKAGE = """
__version__ = "1"
from fsspec.implementations.memory import MemoryFileSystem
class S3FileSystem(MemoryFileSystem):
    protocol = ("s3", "s3a")
    store, pseudo_dirs = MemoryFileSystem.store, MemoryFileSystem.pseudo_dirs
    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("s3://", "memory://"))
"""


@pytest.fixture
def sandbox(recipe_file, tmp_path, capsys) -> Sandbox:
    return Sandbox(recipe_file, tmp_path, capsys)


@pytest.fixture
def in_memory(recipe_file) -> Iterator[str]:
    """Address of a copy of the prepared data and of its documents in a store of fsspec."""
    store = fsspec.filesystem("memory")
    for file in (recipe_file.parent / "data").rglob("*"):
        if file.is_file():
            store.pipe(f"/longring-advice/data/{file.relative_to(recipe_file.parent / 'data')}", file.read_bytes())
    store.pipe("/longring-advice/documents.jsonl", (recipe_file.parent / "documents.jsonl").read_bytes())
    yield MEMORY
    store.rm("/longring-advice", recursive=True)


@pytest.fixture
def executables(tmp_path, monkeypatch) -> Path:
    """A directory that alone is searched for programs."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))
    return directory


def run(sandbox: Sandbox, *words: str) -> str:
    """Run a command that must succeed; return what it prints."""
    sandbox.capsys.readouterr()
    assert cli.main(list(words)) == 0, sandbox.capsys.readouterr().err
    return sandbox.capsys.readouterr().out


def test_advice_about_a_remote_directory_without_a_cache(sandbox, in_memory, tmp_path):
    remote = f"data.directory={in_memory}/data"
    with pytest.raises(ValueError, match=r"loader\.cache_directory = '': .* set it to a directory on a local disk"):
        preflight(sandbox.load(remote), 4)
    found = preflight(sandbox.load(remote, f"loader.cache_directory={tmp_path}/cache"), 4)
    assert found.manifest.vocab_size == open_prepared(sandbox.data).vocab_size
    assert list((tmp_path / "cache").rglob("*manifest*.json"))


@pytest.fixture
def without_s3(monkeypatch) -> Iterator[None]:
    """A Python in which no package serves s3, whatever is installed."""
    monkeypatch.setitem(sys.modules, "s3fs", None)
    yield
    sys.modules["fsspec.registry"]._registry.pop("s3", None)


def install(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a package s3fs, whose store is in memory."""
    (directory / "site").mkdir()
    (directory / "site" / "s3fs.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(directory / "site")
    monkeypatch.delitem(sys.modules, "s3fs")


def test_advice_to_install_the_package_of_a_store(sandbox, in_memory, tmp_path, monkeypatch, without_s3):
    remote = ("data.directory=s3://longring-advice/data", f"loader.cache_directory={tmp_path}/cache")
    source = "data.source.path=s3://longring-advice/documents.jsonl"
    words = ("prepare", str(sandbox.recipe), f"data.directory={tmp_path}/new", source, "--workers", "1")
    advice = "install the fsspec package of its protocol"
    with pytest.raises(ValueError, match=rf"data\.directory = s3://.*cannot be opened .*{advice}"):
        preflight(sandbox.load(*remote), 4)
    assert advice in sandbox.main(*words)
    install(tmp_path, monkeypatch)
    assert preflight(sandbox.load(*remote), 4).steps_done == 0
    run(sandbox, *words)
    assert open_prepared(tmp_path / "new").ledger == open_prepared(sandbox.data).ledger


def test_advice_about_slurm_without_sbatch(sandbox, tmp_path, executables):
    words = ["prepare", str(sandbox.recipe), f"data.directory={tmp_path}/new", "--workers", "1"]
    said = sandbox.main(*words, "--slurm", "main")
    assert "submit from one that has it, or prepare here without --slurm" in said
    sbatch = executables / "sbatch"
    sbatch.write_text("#!/bin/bash\necho Submitted batch job 7\n")
    sbatch.chmod(0o755)
    assert "submitted: array job 7 with 1 tasks" in run(sandbox, *words, "--slurm", "main")
    sbatch.unlink()
    run(sandbox, *words)
    assert open_prepared(tmp_path / "new").files == open_prepared(sandbox.data).files


def test_advice_about_a_job_that_sbatch_refuses(sandbox, executables):
    """sbatch knows one partition; the recipe's table is corrected."""
    sbatch = executables / "sbatch"
    sbatch.write_text(
        '#!/bin/bash\n/bin/grep -q "^#SBATCH --partition=gpu$" "$1" && echo Submitted 7 && exit\n'
        'echo "sbatch: error: invalid partition specified" >&2\nexit 1\n'
    )
    sbatch.chmod(0o755)
    words = ["submit", str(sandbox.recipe), f"run_directory={sandbox.run.path}", "slurm.ranks_per_node=4"]
    said = sandbox.main(*words, "slurm.partition=gpus", "--nodes", "1")
    assert re.search(r"sbatch: refused .*: invalid partition specified; correct the recipe's table `slurm`", said)
    for _ in range(2):
        assert run(sandbox, *words, "slurm.partition=gpu", "--nodes", "1") == "Submitted 7\n"


def test_advice_about_an_option_that_a_recipe_may_not_set(sandbox, executables):
    words = ["submit", str(sandbox.recipe), f"run_directory={sandbox.run.path}", "slurm.ranks_per_node=4"]
    said = sandbox.main(*words, "slurm.options.output=logs/%j.out", "--nodes", "1")
    assert "print the job with `longring submit --print`, and give the option to sbatch yourself" in said
    job = sandbox.directory / "job.sbatch"
    job.write_text(run(sandbox, *words, "--nodes", "1", "--print"))
    assert subprocess.run(["/bin/bash", "-n", job, "--output=logs/%j.out"]).returncode == 0
    assert "#SBATCH --job-name=run\n" in job.read_text()


def test_advice_about_a_part_that_waits_for_part_0(sandbox, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "PART_0_SECONDS", 0)
    words = ["prepare", str(sandbox.recipe), f"data.directory={tmp_path}/new", "--workers", "1"]
    said = sandbox.main(*words, "--part", "1/2")
    found = re.search(r"start it by (--part) (0/2), then this one again", said)
    assert found is not None, said
    run(sandbox, *words, *found.groups())
    run(sandbox, *words, "--part", "1/2")
    run(sandbox, *words)
    assert open_prepared(tmp_path / "new").files == open_prepared(sandbox.data).files


def test_advice_about_shares_names_what_the_data_has(sandbox):
    for wrong in ("documets=1", "documents@65=0.2"):
        with pytest.raises(ValueError, match=r"did you mean (\S+)\?$") as error:
            preflight(sandbox.load(f"curriculum.shares.{wrong}"), 4)
        found = re.search(r"did you mean (\S+)\?$", str(error.value))
        assert found is not None
        preflight(sandbox.load(f"curriculum.shares.{found[1]}={wrong.partition('=')[2]}"), 4)
