"""The `longring` command: parsers, and dispatch to `commands/`, which has one file for each sub-command."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from .config import load_recipe
from .run_directory import find_run

# The functions below import their command when they are called: torch, DeepSpeed and datasets take seconds to import,
# and --help and a mistyped recipe need none of them.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command; return its exit status, or 2 after an error, which is printed in one line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser, commands = _parsers()
    if arguments and arguments[0] in commands:
        # Only a parser without sub-parsers takes options before, between and after the key=value settings.
        options = commands[arguments[0]].parse_intermixed_args(arguments[1:])
    else:
        options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        return 130


def _prepare(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.target, options.overrides)
    from .commands.prepare import prepare_recipe

    prepare_recipe(
        recipe, Console(), workers=options.workers, part=options.part, partition=options.slurm, time=options.time
    )
    return 0


def _plan(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.target, options.overrides)
    from .commands.plan import check_picture, measure_on_this_machine, plan

    picture: Path | None = options.timeline
    if options.measure and picture is None:
        raise ValueError("--measure: draws the measured passes; name the picture with --timeline OUT.png")
    if picture is not None:
        check_picture(picture)
    simulated = None if options.measure else picture
    found = plan(recipe, Console(), num_ranks=options.ranks, preset=options.topology, timeline=simulated)
    if not options.measure or picture is None:
        return 0
    if found is None:
        raise ValueError("--measure: every bucket fits one rank; lower parallel.tokens_per_rank to measure a grid")
    return measure_on_this_machine(options.target, options.overrides, *found, picture)


def _order(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.target, options.overrides)
    from .commands.order import order_recipe

    order_recipe(recipe, Console(), workers=options.workers, only=options.only, part=options.part)
    return 0


def _train(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.target, options.overrides)
    from .commands.train import start_training

    return start_training(
        recipe,
        [options.target, *options.overrides],
        ranks=options.ranks,
        stop_after=options.stop_after,
        nodes=options.nodes,
        node=options.node,
        rendezvous=options.rendezvous,
        job=options.job,
        address=options.address,
        check_this_node=options.check_node,
    )


def _submit(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.target, options.overrides)
    from .commands.submit import job_script, submit

    if options.print:
        print(job_script(recipe, options.nodes), end="")
    else:
        print(submit(recipe, [options.target, *options.overrides], options.nodes))
    return 0


def _requeue(options: argparse.Namespace) -> int:
    from .commands.submit import requeue

    verdict = requeue(load_recipe(options.target, options.overrides))
    print(verdict.reason)
    return 0 if verdict.again else 1


def _evaluate(options: argparse.Namespace) -> int:
    from .commands.evaluate import start_evaluation

    return start_evaluation(options.target, options.overrides)


def _checkpoints(options: argparse.Namespace) -> int:
    from .commands.checkpoints import list_checkpoints

    run = find_run(options.target)
    train = run.recipe().train
    return list_checkpoints(
        run.checkpoints,
        Console(),
        verify=options.verify,
        prune=options.prune,
        keep_last=options.keep_last or train.keep_checkpoints,
        keep_every_steps=train.keep_checkpoint_every_steps if options.keep_every is None else options.keep_every,
    )


def _inspect(options: argparse.Namespace) -> int:
    from .commands.inspect import inspect_target

    inspect_target(Path(options.target), options.overrides, Console())
    return 0


def _topology(options: argparse.Namespace) -> int:
    configured = load_recipe(options.target, options.overrides).train.ranks_per_node if options.target else 0
    from .commands.topology import start_probe

    return start_probe(options.target, options.overrides, configured, ranks=options.ranks, json_file=options.json)


def _positive(text: str) -> int:
    """Return the integer of an argument. Raises ArgumentTypeError unless it is at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be at least 1")
    return value


def _parsers() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """Return the parser of `longring`, and those of its sub-commands by name."""
    parser = argparse.ArgumentParser(
        prog="longring",
        description="Pre-train language models on long contexts, on many GPUs.",
        epilog="`longring COMMAND --help` describes a command and gives an example.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], target: str, summary: str, details: str, example: str
    ) -> argparse.ArgumentParser:
        """Add a sub-command. `target` names its first argument, in brackets if it may be left out."""
        sub = commands.add_parser(
            name,
            help=summary,
            description=textwrap.fill(f"{summary} {details}", 78),
            epilog=f"example:\n  longring {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        optional = target.startswith("[")
        meaning = {"RECIPE": "recipe, a TOML file", "RUN|RECIPE": "run directory, or its recipe"}
        sub.add_argument(
            "target",
            metavar=target.strip("[]"),
            nargs="?" if optional else None,
            help=meaning.get(target.strip("[]"), "prepared data, run directory or recipe"),
        )
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the recipe")
        sub.set_defaults(run=run)
        return sub

    demo = "launch/recipes/demo.toml"
    prepare = command(
        "prepare",
        _prepare,
        "RECIPE",
        "Prepare documents for training.",
        "They are tokenized, cut into sequences by bucket and written as shards, with every token accounted for.",
        f"{demo} data.source.kind=json \\\n      data.source.path='corpus/*.jsonl.gz'",
    )
    prepare.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="number of processes (default: one for each CPU; with --slurm, no limit on tasks)",
    )
    prepare.add_argument(
        "--slurm", metavar="PARTITION", help="submit an array job with one task an input shard, and a job that merges"
    )
    prepare.add_argument(
        "--part",
        metavar="I/N",
        help="prepare only part I of N, counted from 0; once all parts are done, run without --part",
    )
    prepare.add_argument(
        "--time", default="12:00:00", metavar="H:M:S", help="time limit of a Slurm task (default: 12 hours)"
    )
    plan = command(
        "plan",
        _plan,
        "RECIPE",
        "Print the grid that divides the attention of each bucket, and its price.",
        "No rank is started, unless --measure is given.",
        f"{demo} --topology full_mesh \\\n      --timeline plan.png --measure",
    )
    plan.add_argument(
        "--ranks", type=int, metavar="N", help="number of ranks (default: as many as the largest bucket needs)"
    )
    plan.add_argument("--topology", metavar="PRESET", help="topology, in place of parallel.cp.topology")
    plan.add_argument("--timeline", type=Path, metavar="OUT.png", help="draw simulated passes of the largest bucket")
    plan.add_argument("--measure", action="store_true", help="also run these passes here, and draw both")
    order = command(
        "order",
        _order,
        "RECIPE",
        "Order prepared documents into contexts of related documents.",
        "Its stages embed the documents, find neighbours and near-duplicates, lay a path and write contexts.",
        f"{demo} data.rest=pack order.mode=in_context \\\n      order.directory=runs/demo-ordered",
    )
    order.add_argument(
        "--workers", type=int, default=0, metavar="N", help="number of processes (default: one for each CPU)"
    )
    order.add_argument(
        "--stage", dest="only", default="", metavar="NAME", help="run one stage; an unknown name lists the stages"
    )
    order.add_argument("--part", default="0/1", metavar="I/N", help="run tasks I, I+N, I+2N, ... of each stage")
    train = command(
        "train",
        _train,
        "RECIPE",
        "Train on the ranks of this machine.",
        "Training continues from the last checkpoint in the run directory, if there is one.",
        f"{demo} train.steps=40 \\\n      run_directory=runs/short",
    )
    train.add_argument(
        "--ranks", type=int, metavar="N", help="number of ranks to start here (default: train.ranks_per_node)"
    )
    train.add_argument("--stop-after", type=int, metavar="STEP", help="save and stop after this step")
    several = train.add_argument_group("several nodes", "Every node runs the same command, as in slurm/train.sbatch.")
    several.add_argument("--nodes", type=_positive, default=1, metavar="N", help="number of nodes")
    several.add_argument("--node", type=int, default=0, metavar="I", help="index of this node, from 0")
    several.add_argument("--rendezvous", metavar="HOST:PORT", help="address on the first node where launchers meet")
    several.add_argument("--job", metavar="NAME", help="name of this start, the same on all nodes")
    several.add_argument("--address", metavar="NAME", help="name at which other nodes reach this one")
    several.add_argument("--check-node", action="store_true", help="first check the devices, memory and disk")
    submit = command(
        "submit",
        _submit,
        "RECIPE",
        "Submit a recipe to Slurm.",
        "The job saves before its time limit, and requeues itself until all steps are done.",
        f"{demo} --nodes 4 \\\n      slurm.partition=main slurm.time=8:00:00",
    )
    submit.add_argument(
        "--nodes",
        type=_positive,
        required=True,
        metavar="N",
        help="number of nodes, each with slurm.ranks_per_node ranks",
    )
    submit.add_argument("--print", action="store_true", help="print the job script and do not submit it")
    command(
        "requeue",
        _requeue,
        "RECIPE",
        "Decide whether an ended job starts again: status 0 if it does, else 1.",
        "The job script slurm/train.sbatch calls it.",
        demo,
    )
    command(
        "evaluate",
        _evaluate,
        "RUN|RECIPE",
        "Compute the held-out loss of the last checkpoint of a run.",
        "It is given by bucket and by position in the context.",
        "runs/demo evaluate.max_tokens_per_bucket=100000",
    )
    checkpoints = command(
        "checkpoints",
        _checkpoints,
        "RUN|RECIPE",
        "List the checkpoints of a run.",
        "The table has the step, size, mesh and state of each; options verify and prune them.",
        "runs/demo --verify",
    )
    checkpoints.add_argument("--verify", action="store_true", help="read every file and compare its SHA-256")
    checkpoints.add_argument(
        "--prune",
        action="store_true",
        help="delete what retention does not keep, and damaged checkpoints",
    )
    checkpoints.add_argument(
        "--keep-last", type=_positive, metavar="K", help="number of last ones to keep (default: train.keep_checkpoints)"
    )
    checkpoints.add_argument(
        "--keep-every",
        type=_positive,
        metavar="N",
        help="keep every multiple of N too (default: train.keep_checkpoint_every_steps)",
    )
    command(
        "inspect",
        _inspect,
        "DATA|RUN|RECIPE",
        "Show the content of prepared data.",
        "It prints the ledger, lengths, samples and the curriculum with its cost, draws a picture, and verifies the "
        "hash of every shard.",
        "runs/demo-data curriculum.odds=grow_p2 \\\n      curriculum.cycles=8",
    )
    topology = command(
        "topology",
        _topology,
        "[RECIPE]",
        "Measure the links between ranks and their attention speed.",
        "It measures the ranks of this machine, in seconds; slurm/README.md has the command for a cluster.",
        f"{demo} --ranks 4",
    )
    topology.add_argument(
        "--ranks", type=int, metavar="N", help="number of ranks to start here (default: train.ranks_per_node)"
    )
    topology.add_argument("--json", metavar="FILE", help="write the measured topology to FILE")
    return parser, commands.choices


if __name__ == "__main__":
    sys.exit(main())
