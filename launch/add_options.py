"""The options of the sub-commands of `longring`, a function each."""

from __future__ import annotations

import argparse
from pathlib import Path

EVALUATE_SETTINGS = """\
evaluate.tasks=[]                       --tasks as a setting of a recipe
evaluate.samples=40                     samples of each task and length
evaluate.distractors=1                  wrong answers of each sample
evaluate.context_sequences=0            sequences of each bucket for LongPPL
                                        and the gain of context
evaluate.short_tokens=4096              short context of LongPPL
evaluate.max_tokens_per_bucket=1048576  tokens to read of each bucket
evaluate.knots=false                    tie knots into held-out sequences
"""
"""The table `evaluate` of a recipe, for the help of `longring evaluate`."""


def prepare(parser: argparse.ArgumentParser) -> None:
    """Add the options of `longring prepare`."""
    parser.add_argument(
        "--workers",
        type=_not_negative,
        default=0,
        metavar="N",
        help="number of processes (default: one for each CPU; with --slurm, no limit on tasks)",
    )
    parser.add_argument(
        "--slurm", metavar="PARTITION", help="submit an array job with one task an input shard, and a job that merges"
    )
    parser.add_argument(
        "--part",
        metavar="I/N",
        help="prepare only part I of N, counted from 0; once all parts are done, run without --part",
    )
    parser.add_argument(
        "--time", default="12:00:00", metavar="H:M:S", help="time limit of a Slurm task (default: 12 hours)"
    )
    parser.add_argument("--json", action="store_true", help="print the ledger and buckets as JSON")
    _verify(parser)
    _container(parser, "With --slurm, tasks run in an image, as docs/image.md makes it.", "tasks")


def plan(parser: argparse.ArgumentParser) -> None:
    """Add the options of `longring plan`."""
    parser.add_argument(
        "--ranks", type=_positive, metavar="N", help="number of ranks (default: as many as the largest bucket needs)"
    )
    parser.add_argument(
        "--gpus",
        type=_positive,
        metavar="N",
        help="predict memory and time on N GPUs, and search settings that fit; with --device",
    )
    parser.add_argument(
        "--device", metavar="NAME|FILE", help="a100, h100, h200, b200, or what `longring topology --json` has measured"
    )
    parser.add_argument("--topology", metavar="PRESET", help="topology preset, instead of parallel.cp.topology")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--timeline", type=Path, metavar="OUT.png", help="draw simulated passes of the largest bucket")
    parser.add_argument("--measure", action="store_true", help="also run these passes here, and draw both")
    parser.add_argument(
        "--mix", type=Path, metavar="OUT.png", help="draw the shares of lengths and sources over the run"
    )


def order(parser: argparse.ArgumentParser) -> None:
    """Add the options of `longring order`."""
    parser.add_argument(
        "--workers", type=_not_negative, default=0, metavar="N", help="number of processes (default: one for each CPU)"
    )
    parser.add_argument(
        "--stage", dest="only", default="", metavar="NAME", help="run only this stage; an unknown name lists all stages"
    )
    parser.add_argument("--part", default="0/1", metavar="I/N", help="run tasks I, I+N, I+2N, ... of each stage")
    _verify(parser)


def import_(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `longring import`."""
    parser.add_argument("out", type=Path, metavar="OUT", help="new directory, for init.from of a recipe")


def export(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `longring export`."""
    parser.add_argument("out", type=Path, metavar="OUT", help="new directory for the model")
    parser.add_argument("--family", default="", metavar="NAME", help="model_type (default: the first that fits)")
    parser.add_argument(
        "--dtype", choices=("F32", "BF16", "F16"), default="", help="data type (default: that of the run or import)"
    )


def evaluate(parser: argparse.ArgumentParser) -> None:
    """Add the options of `longring evaluate`."""
    parser.add_argument(
        "--data", default="", metavar="DATA|RECIPE", help="prepared data, or a recipe with its data and division"
    )
    parser.add_argument(
        "--ranks",
        type=_positive,
        metavar="N",
        help="number of ranks to start here (default: those of the last checkpoint; with --data one for each GPU)",
    )
    _measured(parser)
    parser.add_argument_group("settings, with their defaults (docs/evaluation.md)", EVALUATE_SETTINGS)
    _several_nodes(parser)


def _measured(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--tasks", type=_tasks, default=[], metavar="TASK,...", help="score these tasks too: needle,uuid,copy,..."
    )
    parser.add_argument(
        "--judge", default="", metavar="WEIGHTS", help="model that chooses the key tokens of LongPPL (default: each)"
    )
    parser.add_argument("--json", type=_file, metavar="FILE", help="write the results to FILE as well")
    parser.add_argument("--picture", type=_file, metavar="FILE", help="draw them: .png, .svg or .pdf")


def train(parser: argparse.ArgumentParser) -> None:
    """Add the options of `longring train`."""
    parser.add_argument(
        "--ranks", type=_positive, metavar="N", help="number of ranks to start here (default: train.ranks_per_node)"
    )
    parser.add_argument("--stop-after", type=_positive, metavar="STEP", help="save and stop after this step")
    several = _several_nodes(parser)
    several.add_argument("--check-node", action="store_true", help="first check the devices, memory and disk")


def _several_nodes(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    several = parser.add_argument_group("several nodes", "Every node runs the same command, as in slurm/train.sbatch.")
    several.add_argument("--nodes", type=_positive, default=1, metavar="N", help="number of nodes")
    several.add_argument("--node", type=_not_negative, default=0, metavar="I", help="index of this node, from 0")
    several.add_argument("--rendezvous", metavar="HOST:PORT", help="address on the first node where launchers meet")
    several.add_argument(
        "--job", metavar="NAME", help="name of this start, the same on all nodes; status 250 then stands for 2"
    )
    several.add_argument("--address", metavar="NAME", help="name at which other nodes reach this one")
    return several


def submit(parser: argparse.ArgumentParser) -> None:
    """Add the options of `longring submit`."""
    parser.add_argument(
        "--nodes",
        type=_positive,
        required=True,
        metavar="N",
        help="number of nodes, each with slurm.ranks_per_node ranks",
    )
    parser.add_argument("--print", action="store_true", help="print the job script and do not submit it")
    _container(parser, "The ranks run in an image, as docs/image.md makes it.", "ranks")
    evaluation = parser.add_argument_group("evaluation", "The job is `longring evaluate` on the ranks of all nodes.")
    evaluation.add_argument("--evaluate", action="store_true", help="evaluate the recipe's run")
    evaluation.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="WEIGHTS",
        help="evaluate these weights on the recipe's data and division; may be given again",
    )
    _measured(evaluation)


def inspect(parser: argparse.ArgumentParser) -> None:
    """Add the options of `longring inspect`."""
    parser.add_argument("--json", action="store_true", help="print all but samples as JSON, and draw nothing")


def watch(parser: argparse.ArgumentParser) -> None:
    """Add the options of `longring watch`."""
    parser.add_argument(
        "--every", type=_positive, default=2, metavar="SECONDS", help="time between two looks (default: 2)"
    )
    parser.add_argument("--once", action="store_true", help="show the state now, and end")
    parser.add_argument("--json", action="store_true", help="print the state now as JSON, and end")


def report(parser: argparse.ArgumentParser) -> None:
    """Add the options of `longring report`."""
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to write (default: report.html in the run)")
    parser.add_argument(
        "--follow",
        type=_positive,
        nargs="?",
        const=30,
        default=0,
        metavar="SECONDS",
        help="write it again every SECONDS (default: 30) until the run ends; the browser reads it again",
    )


def checkpoints(parser: argparse.ArgumentParser) -> None:
    """Add the options of `longring checkpoints`."""
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.add_argument("--verify", action="store_true", help="read every file and compare its SHA-256")
    parser.add_argument(
        "--prune",
        action="store_true",
        help="delete damaged checkpoints, and those that --keep-last and --keep-every do not keep",
    )
    parser.add_argument(
        "--keep-last",
        type=_positive,
        metavar="K",
        help="number of latest ones to keep (default: train.keep_checkpoints)",
    )
    parser.add_argument(
        "--keep-every",
        type=_positive,
        metavar="N",
        help="also keep steps that are multiples of N (default: train.keep_checkpoint_every_steps)",
    )


def topology(parser: argparse.ArgumentParser) -> None:
    """Add the options of `longring topology`."""
    parser.add_argument(
        "--ranks", type=_positive, metavar="N", help="number of ranks to start here (default: train.ranks_per_node)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the measured topology to FILE")


def _container(parser: argparse.ArgumentParser, description: str, who: str) -> None:
    container = parser.add_argument_group("container", description)
    container.add_argument(
        "--container", default="", metavar="IMAGE", help="FILE.sif, by apptainer; any other image by pyxis"
    )
    container.add_argument(
        "--mount",
        action="append",
        default=[],
        metavar="PATH",
        help=f"show it to the {who} besides the directories of the recipe; may be given again",
    )


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--verify", action="store_true", help="read every shard of finished data, and make those again that are damaged"
    )


def _file(text: str) -> str:
    """Return the name of a file. Raises ArgumentTypeError if it is empty."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a file")
    return text


def _tasks(text: str) -> list[str]:
    """Return the names between commas. Raises ArgumentTypeError if there are none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("names no task; name some, such as needle,uuid")
    return names


def _positive(text: str) -> int:
    """Return the integer of an argument. Raises ArgumentTypeError unless it is at least 1."""
    return _at_least(1, text)


def _not_negative(text: str) -> int:
    """Return the integer of an argument. Raises ArgumentTypeError if it is negative."""
    return _at_least(0, text)


def _at_least(minimum: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number") from None
    if value < minimum:
        raise argparse.ArgumentTypeError(f"{value}: must be at least {minimum}")
    return value
