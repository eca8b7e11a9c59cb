"""The `longring` command: one sub-command a stage."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from .config import load_recipe
from .run_directory import RunDirectory

# The stages import torch, DeepSpeed or datasets, which takes seconds: each does so when it is called, so that --help
# and a mistyped recipe answer at once.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a stage -> 0, or 2 after an error of the user's, told in one line."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser, stages = _parsers()
    # A stage's own parser takes options before, between and after the key=value settings; argparse cannot do that
    # through sub-parsers, which here give the help and the error for everything else.
    options = stages[words[0]].parse_intermixed_args(words[1:]) if words[:1] and words[0] in stages else None
    options = options or parser.parse_args(words)
    try:
        return options.stage(options)
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        return 130


def _prepare(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.target, options.overrides)
    console = Console()
    if options.slurm:
        from ..data.prepare.slurm import submit

        submit(recipe.data, console, partition=options.slurm, workers=options.workers, time=options.time)
        return 0
    from ..data.inspect.ledger import print_ledger
    from ..data.prepare.prepare import prepare, prepare_part

    if options.part:
        prepare_part(recipe.data, console, *_part(options.part), workers=options.workers)
        return 0
    print_ledger(prepare(recipe.data, console, workers=options.workers).ledger, console)
    return 0


def _plan(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.target, options.overrides)
    picture: Path | None = options.timeline
    if picture is not None and not picture.absolute().parent.is_dir():
        raise ValueError(f"--timeline {picture}: {picture.absolute().parent} is not a directory")
    from .commands.plan import measure_here, plan

    if not options.measure:
        plan(recipe, Console(), num_ranks=options.ranks, preset=options.topology, timeline=picture)
        return 0
    if picture is None:
        raise ValueError("--measure draws what it measures: name the picture with --timeline OUT.png")
    found = plan(recipe, Console(), num_ranks=options.ranks, preset=options.topology)
    if found is None:
        raise ValueError("--measure: no bucket is spread over ranks, so there is nothing to measure")
    return measure_here(options.target, options.overrides, *found, picture)


def _order(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.target, options.overrides)
    console = Console()
    from ..data.inspect.ledger import print_ledger
    from ..data.order.stages import order

    ordered = order(
        recipe.data, recipe.order, console, workers=options.workers, only=options.only, part=_part(options.part)
    )
    if ordered is not None:
        print_ledger(ordered.ledger, console)
    return 0


def _train(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.target, options.overrides)
    from .preflight import preflight
    from .ranks.start import Rendezvous, local_ranks, start_ranks

    count = options.ranks or local_ranks(recipe.train.ranks_per_node)
    if options.check_node:
        from .ranks.node import check_node

        check_node(recipe, count)
    preflight(recipe, count * options.nodes, check_shards=options.node == 0)
    meeting = None
    if options.nodes > 1 or options.rendezvous:
        if not (options.rendezvous and options.job and options.address):
            raise ValueError("--nodes: several nodes need --rendezvous, --job and --address too, as slurm/train.sbatch")
        meeting = Rendezvous(options.rendezvous, options.job, options.nodes, options.node, options.address)
    stop_after = ["--stop-after", str(options.stop_after)] if options.stop_after else []
    return start_ranks("longring.launch.train", [options.target, *options.overrides, *stop_after], count, meeting)


def _submit(options: argparse.Namespace) -> int:
    from .commands.submit import job_script, submit

    recipe = load_recipe(options.target, options.overrides)
    if options.print:
        print(job_script(recipe, options.nodes), end="")
    else:
        print(submit(recipe, [options.target, *options.overrides], options.nodes))
    return 0


def _requeue(options: argparse.Namespace) -> int:
    from .commands.submit import requeue

    verdict = requeue(load_recipe(options.target, options.overrides))
    print(verdict.why)
    return 0 if verdict.again else 1


def _evaluate(options: argparse.Namespace) -> int:
    from .checkpoint.format import last_good_checkpoint
    from .ranks.start import start_ranks

    run = _run_of(options)
    run.recipe(options.overrides)
    saved = last_good_checkpoint(run.checkpoints)
    if saved is None:
        raise ValueError(f"{run.path} has no checkpoint yet: train first")
    return start_ranks("longring.launch.evaluate", [str(run.path), *options.overrides], saved[1].state.world_size)


def _checkpoints(options: argparse.Namespace) -> int:
    from .commands.checkpoints import list_checkpoints

    run = _run_of(options)
    recipe = run.recipe()
    return list_checkpoints(
        run.checkpoints,
        Console(),
        verify=options.verify,
        prune=options.prune,
        keep_last=options.keep_last or recipe.train.keep_checkpoints,
        keep_every_steps=recipe.train.keep_checkpoint_every_steps if options.keep_every is None else options.keep_every,
    )


def _topology(options: argparse.Namespace) -> int:
    configured = load_recipe(options.target, options.overrides).train.ranks_per_node if options.target else 0
    from .ranks.start import local_ranks, start_ranks

    count = options.ranks or local_ranks(configured)
    if count < 2:
        raise ValueError("one rank alone has no links to measure: longring topology --ranks 2, or more")
    recipe = [options.target, *options.overrides] if options.target else []
    file = ["--json", options.json] if options.json else []
    return start_ranks("longring.launch.commands.topology", [*recipe, *file], count)


def _inspect(options: argparse.Namespace) -> int:
    from .commands.inspect import inspect_target

    inspect_target(Path(options.target), options.overrides, Console())
    return 0


def _part(text: str) -> tuple[int, int]:
    """Which part of how many. Raises ValueError."""
    part, slash, parts = text.partition("/")
    if not (slash and part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise ValueError(f"--part {text}: say which of how many, from 0, such as 0/8")
    return int(part), int(parts)


def _positive(text: str) -> int:
    """A command line's number, at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be at least 1")
    return value


def _run_of(options: argparse.Namespace) -> RunDirectory:
    """The run directory named, or that of the recipe named."""
    if Path(options.target).is_file():
        return RunDirectory(load_recipe(options.target).run_directory)
    return RunDirectory(options.target)


def _parsers() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The command's parser, and each stage's."""
    parser = argparse.ArgumentParser(
        prog="longring", description="Pre-train language models on long contexts, on many GPUs."
    )
    stages = parser.add_subparsers(required=True, metavar="STAGE")

    def stage(name, function, target, summary, example):
        sub = stages.add_parser(name, help=summary, description=summary, epilog=f"example: longring {name} {example}")
        optional = target.startswith("[")
        sub.add_argument("target", metavar=target.strip("[]"), nargs="?" if optional else None)
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")
        sub.set_defaults(stage=function)
        return sub

    demo = "launch/recipes/demo.toml"
    prepare = stage(
        "prepare",
        _prepare,
        "RECIPE",
        "documents to tokens, buckets and shards, every token accounted for",
        f"{demo} data.source.kind=json data.source.path='corpus/*.jsonl.gz'",
    )
    prepare.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes at work at once (default: the CPUs; Slurm: no limit)",
    )
    prepare.add_argument("--slurm", metavar="PARTITION", help="submit an array job, an input shard a task, and a merge")
    prepare.add_argument(
        "--part",
        metavar="I/N",
        help="only the I-th of N shares, as slurm/prepare.sbatch in an array; then once without",
    )
    prepare.add_argument("--time", default="12:00:00", metavar="H:M:S", help="time limit of a task (default: 12 hours)")
    plan = stage(
        "plan",
        _plan,
        "RECIPE",
        "which grid of ranks each bucket's attention takes, why, and what it costs, without starting a rank; a picture "
        "of it, simulated or measured",
        f"{demo} --topology full_mesh --timeline plan.png --measure",
    )
    plan.add_argument("--ranks", type=int, metavar="N", help="ranks of the run (default: as few as the largest bucket)")
    plan.add_argument("--topology", metavar="PRESET", help="what joins them, in place of parallel.cp.topology")
    plan.add_argument("--timeline", type=Path, metavar="OUT.png", help="draw the largest bucket's passes")
    plan.add_argument("--measure", action="store_true", help="run them on this machine, and draw both side by side")
    order = stage(
        "order",
        _order,
        "RECIPE",
        "prepared documents to contexts of related ones: embed, neighbours, near-duplicates, path, contexts",
        f"{demo} data.rest=pack order.mode=in_context order.directory=runs/demo-ordered",
    )
    order.add_argument("--workers", type=int, default=0, metavar="N", help="processes at work at once (default: CPUs)")
    order.add_argument("--stage", dest="only", default="", metavar="NAME", help="do one stage; a wrong name lists them")
    order.add_argument(
        "--part", default="0/1", metavar="I/N", help="of its tasks every N-th, from I on, for job arrays"
    )
    train = stage(
        "train",
        _train,
        "RECIPE",
        "train on this machine's ranks, from the last checkpoint if there is one",
        f"{demo} train.steps=40 run_directory=runs/short",
    )
    train.add_argument("--ranks", type=int, metavar="N", help="processes to start (default: train.ranks_per_node)")
    train.add_argument("--stop-after", type=int, metavar="STEP", help="save and end after this step")
    several = train.add_argument_group("several nodes", "each runs the same command; slurm/train.sbatch gives these")
    several.add_argument("--nodes", type=_positive, default=1, metavar="N", help="nodes of this start")
    several.add_argument("--node", type=int, default=0, metavar="I", help="this one, from 0")
    several.add_argument("--rendezvous", metavar="HOST:PORT", help="on the first node, where the launchers meet")
    several.add_argument("--job", metavar="NAME", help="the launchers' common name for this start")
    several.add_argument("--address", metavar="NAME", help="under which the other nodes reach this one")
    several.add_argument("--check-node", action="store_true", help="first see that devices, memory and disk are fit")
    submit = stage(
        "submit",
        _submit,
        "RECIPE",
        "hand the recipe to Slurm as a job that saves before its limit and requeues itself until all steps are done",
        f"{demo} --nodes 4 slurm.partition=main slurm.time=8:00:00",
    )
    submit.add_argument("--nodes", type=_positive, required=True, metavar="N", help="slurm.ranks_per_node ranks each")
    submit.add_argument("--print", action="store_true", help="print the job's script instead")
    stage(
        "requeue",
        _requeue,
        "RECIPE",
        "whether a job that has ended shall start again (status 0) or not (1): asked by slurm/train.sbatch",
        demo,
    )
    stage(
        "evaluate",
        _evaluate,
        "RUN|RECIPE",
        "held-out loss of a run's last checkpoint, by bucket and by position in the context",
        "runs/demo evaluate.max_tokens_per_bucket=100000",
    )
    checkpoints = stage(
        "checkpoints",
        _checkpoints,
        "RUN|RECIPE",
        "a run's checkpoints: step, size, mesh, and whether they are whole; verify or prune them",
        "runs/demo --verify",
    )
    checkpoints.add_argument("--verify", action="store_true", help="read every file and compare its SHA-256")
    checkpoints.add_argument(
        "--prune", action="store_true", help="delete what retention lets go, and those put aside as damaged"
    )
    checkpoints.add_argument("--keep-last", type=_positive, metavar="K", help="default: train.keep_checkpoints")
    checkpoints.add_argument(
        "--keep-every", type=_positive, metavar="N", help="default: train.keep_checkpoint_every_steps"
    )
    stage(
        "inspect",
        _inspect,
        "DATA|RUN|RECIPE",
        "what prepared data holds: ledger, lengths, samples, a picture, a curriculum's schedule and cost; verifies "
        "every shard's hash",
        "runs/demo-data curriculum.odds=grow_p2 curriculum.cycles=8",
    )
    topology = stage(
        "topology",
        _topology,
        "[RECIPE]",
        "what joins the ranks of this machine and how fast they compute attention, measured in seconds; of a cluster: "
        "srun --ntasks-per-node 1 torchrun ... -m longring.launch.commands.topology (slurm/README.md)",
        f"{demo} --ranks 4",
    )
    topology.add_argument("--ranks", type=int, metavar="N", help="processes to start (default: train.ranks_per_node)")
    topology.add_argument("--json", metavar="FILE", help="write what was found here")
    return parser, stages.choices


if __name__ == "__main__":
    sys.exit(main())
