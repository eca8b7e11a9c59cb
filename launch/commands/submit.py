"""`longring submit` and `longring requeue`: the Slurm job of a recipe, and the decision to start it again."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...data.files import write_text
from ..checkpoint.format import last_good_checkpoint
from ..config import Recipe
from ..preflight import preflight
from ..records import append_record, read_records
from ..run_directory import RunDirectory, find_run
from ..weights.origin import check_settable
from .container import Container

SCRIPT = Path(__file__).parents[2] / "slurm" / "train.sbatch"
_FROM_RECIPE = re.compile(
    r"(#SBATCH --[a-z][a-z-]*(=[\w.,:@%+/=\[\]*&|()-]+)?|export LONGRING_RANKS_PER_NODE=[0-9]+"
    # The last alternative is an empty line.
    r"|export LONGRING_COMMAND=evaluate|export LONGRING_(CONTAINER|MOUNTS)='[\w./:@+#=,-]+'|)",
    re.ASCII,
)
"""A line of the rendered script that is not the template's: nothing in it ends a line, a word or a quotation."""


def job_script(recipe: Recipe, nodes: int, *, evaluates: bool = False, container: Container | None = None) -> str:
    """Return slurm/train.sbatch with the resources of the recipe in its #SBATCH lines.

    The job trains, or evaluates if `evaluates`; its ranks run in the container if there is one. Raises ValueError if
    that many nodes cannot train or evaluate the recipe, or if a line could be read as another one.
    """
    slurm, num_ranks = recipe.slurm, nodes * recipe.slurm.ranks_per_node
    (recipe.to_evaluate(num_ranks) if evaluates else recipe).accumulation_steps(num_ranks)  # for its errors
    resources = {
        "job-name": (slurm.job_name or _job_name(recipe.run_directory)) + ("-evaluate" if evaluates else ""),
        "nodes": str(nodes),
        "gpus-per-node": None if slurm.cpu else str(slurm.ranks_per_node),
        "time": slurm.time,
        "signal": f"USR1@{slurm.save_seconds}",
        "partition": slurm.partition or None,
        "account": slurm.account or None,
        **{name: value or None for name, value in slurm.options.items()},
    }
    # Options of the script are replaced where they stand; the others follow the last of them.
    lines, left = [], dict(resources)
    template = SCRIPT.read_text().splitlines()
    for line in template:
        name = line.removeprefix("#SBATCH --").partition("=")[0] if line.startswith("#SBATCH --") else None
        if name in left:
            value = left.pop(name)
            lines += [f"#SBATCH --{name}={value}"] if value is not None else []
            continue
        if line.startswith("# --exclusive"):  # follows the options
            lines += [f"#SBATCH --{name}={value}" for name, value in left.items() if value is not None]
            exports = [f"export LONGRING_RANKS_PER_NODE={slurm.ranks_per_node}"] if slurm.cpu else []
            exports += ["export LONGRING_COMMAND=evaluate"] if evaluates else []
            exports += container.variables if container else []
            lines += ["", *exports, ""] if exports else []
        lines.append(line)
    for line in lines:
        if line not in template and not _FROM_RECIPE.fullmatch(line):
            raise ValueError(f"job script: {line!r}: not one option of sbatch; correct the recipe's table `slurm`")
    return "\n".join(lines) + "\n"


def _job_name(run_directory: str) -> str:
    """Return the name of a run directory in characters that a name of a job, and of its output file, may have."""
    return re.sub(r"[^\w.,@+=-]", "-", Path(run_directory).name, flags=re.ASCII) or "longring"


def evaluation_words(
    target: str, weights: Sequence[str], overrides: Sequence[str], options: Mapping[str, str]
) -> list[str]:
    """Return the words of `longring evaluate` for a job: the recipe's run, or these weights on the recipe's data.

    `options` are values by the name of an option, which is left out if its value is empty. Raises ValueError for a
    setting that the evaluation would refuse, or if there is no such run.
    """
    settings = [word for word in overrides if not word.startswith("slurm.")]  # those are the job's
    words = [target, *settings]
    if weights:
        settings = [word for word in settings if not word.startswith("run_directory=")]
        check_settable(settings)
        words = [*weights, *settings, "--data", target]
    else:
        run, of_run = find_run(target, settings)
        run.recipe(of_run)
    return words + [word for name, value in options.items() if value for word in (f"--{name}", value)]


def submit(
    recipe: Recipe, arguments: list[str], nodes: int, *, evaluates: bool = False, container: Container | None = None
) -> str:
    """Write the job script into the run directory and give it to sbatch; return the output of sbatch.

    `arguments` are the words of `longring train` in the job, or of `longring evaluate` if it `evaluates`. Raises
    ValueError if the run would fail on the nodes, if there is no sbatch or it refuses the job, or if Slurm cannot run
    the container.
    """
    # Checked here and not only by the job, which may wait for days before it starts.
    run = RunDirectory(recipe.run_directory)
    run.check_is_run()
    script = job_script(recipe, nodes, evaluates=evaluates, container=container)
    # The data may be prepared by a job before this one, or lie on the disks of the nodes alone.
    if not evaluates and run.recipe_file.exists() and Path(recipe.training_directory).is_dir():
        preflight(recipe, nodes * recipe.slurm.ranks_per_node, check_shards=False)
    # sbatch would take a relative path that begins with a dash for an option.
    job = str((run.evaluation_script if evaluates else run.job_script).absolute())
    if shutil.which("sbatch") is None:
        raise ValueError("sbatch: not on this machine; submit from a machine with Slurm, or print the job with --print")
    if container:
        container.check_runtime()
    run.path.mkdir(parents=True, exist_ok=True)
    run.logs.mkdir(exist_ok=True)
    write_text(Path(job), script)
    done = subprocess.run(["sbatch", job, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(
            f"sbatch: refused {shlex.join([job, *arguments])}: {done.stderr.strip()}; correct the "
            "recipe's table `slurm`"
        )
    return done.stdout.strip()


@dataclass(frozen=True)
class Verdict:
    """The decision to start a job again or not."""

    again: bool
    """Whether the job starts again."""
    reason: str
    """Reason of the decision, for the output of the job."""


def requeue(recipe: Recipe) -> Verdict:
    """Decide whether the job that has just ended starts again, and record it in requeues.jsonl.

    A job starts again until all steps are done, unless slurm.max_fruitless_starts consecutive requeues brought no new
    checkpoint.
    """
    run = RunDirectory(recipe.run_directory)
    try:
        found = last_good_checkpoint(run.checkpoints)
        step = found[1].state.step if found else 0
    except OSError:  # the next start reads it again, and says why it cannot
        step = None
    if step is not None and step >= recipe.train.steps:
        return Verdict(False, f"{run.path}: all {step} steps are done")
    # A requeued job keeps its number.
    entry = {"job": os.environ.get("SLURM_JOB_ID"), "step": step}
    run.path.mkdir(parents=True, exist_ok=True)
    append_record(run.requeues_file, entry)
    # Consecutive entries of this job, from the latest back, with the same step brought no new checkpoint.
    job = [old.get("step") for old in read_records(run.requeues_file) if old.get("job") == entry["job"]]
    fruitless = next((number for number, old in enumerate(reversed(job)) if old != step), len(job))
    last = "a checkpoint that cannot be read" if step is None else f"step {step}"
    if fruitless > recipe.slurm.max_fruitless_starts:
        return Verdict(
            False,
            f"slurm.max_fruitless_starts = {recipe.slurm.max_fruitless_starts}: {fruitless} starts have ended with "
            f"{last} as the last one saved; look at the output and at {run.events_file}, then submit again",
        )
    return Verdict(True, f"starting again from {last}")
