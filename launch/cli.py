"""The `longring` command: parsers, and dispatch to `commands/`, which has one file for each sub-command."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from ..data.format.manifest import open_prepared
from . import add_options
from .config import load_recipe
from .errors import IO_ERROR, NODE_USER_ERROR, USER_ERROR, print_error
from .extras import advice
from .ranks.nodes import ManyNodes
from .run_directory import RunDirectory, find_run
from .trackers import check_trackers

# The functions below import their command when they are called: torch, DeepSpeed and datasets take seconds to import,
# and --help and a mistyped recipe need none of them.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command; return its exit status.

    An error is printed in one line; the status is then IO_ERROR for a file that could not be read or written, and
    USER_ERROR for all others, which is NODE_USER_ERROR at a node of a job.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser, commands = _parsers()
    if not arguments:
        parser.print_help()
        return 0
    if arguments and arguments[0] in commands:
        # Only a parser without sub-parsers takes options before, between and after the key=value settings.
        options = commands[arguments[0]].parse_intermixed_args(arguments[1:])
    else:
        options = parser.parse_args(arguments)
    try:
        status = options.run(options)
    except ModuleNotFoundError as error:
        if (missing := advice(error)) is None:
            raise
        print_error(missing)
        status = USER_ERROR
    except (ValueError, OSError) as error:
        print_error(str(error))
        status = IO_ERROR if isinstance(error, OSError) else USER_ERROR
    except KeyboardInterrupt:
        return 130
    # Only commands that start ranks on several nodes have --job.
    return NODE_USER_ERROR if status == USER_ERROR and vars(options).get("job") else status


def _prepare(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.target, options.overrides)
    from .commands.container import container_of, preparation_directories
    from .commands.prepare import prepare_recipe

    prepare_recipe(
        recipe,
        Console(),
        workers=options.workers,
        part=options.part,
        partition=options.slurm,
        time=options.time,
        container=container_of(options.container, options.mount, preparation_directories(recipe)),
        verify=options.verify,
        as_json=options.json,
    )
    return 0


def _plan(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.target, options.overrides)
    if ranks := options.gpus or options.ranks:
        recipe.accumulation_steps(ranks)  # without torch: a mistake is told at once
    from .commands.mix import show_mix
    from .commands.plan import check_picture, measure_on_this_machine, plan, plan_json

    if options.gpus or options.device:
        from .commands.fit import show_fit

        show_fit(recipe, Console(), options)
        return 0
    picture: Path | None = options.timeline
    if options.measure and picture is None:
        raise ValueError("--measure: draws the measured passes; name the picture with --timeline OUT.png")
    for option, file in (("--timeline", picture), ("--mix", options.mix)):
        if file is not None:
            check_picture(option, file)
    if options.json:
        if options.measure or picture is not None or options.mix is not None:
            raise ValueError("--json: prints the grids alone; leave out --timeline, --measure and --mix")
        print(json.dumps(plan_json(recipe, num_ranks=options.ranks, preset=options.topology), indent=1))
        return 0
    simulated = None if options.measure else picture
    found = plan(recipe, Console(), num_ranks=options.ranks, preset=options.topology, timeline=simulated)
    show_mix(recipe, Console(), options.mix)
    if not options.measure or picture is None:
        return 0
    if found is None:
        raise ValueError("--measure: every bucket fits one rank; lower parallel.tokens_per_rank to measure a grid")
    return measure_on_this_machine(options.target, options.overrides, *found, picture)


def _order(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.target, options.overrides)
    from .commands.order import order_recipe

    order_recipe(
        recipe, Console(), workers=options.workers, only=options.only, part=options.part, verify=options.verify
    )
    return 0


def _train(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.target, options.overrides)
    # Without torch: a mistake in the recipe or its data is told at once.
    if ranks := options.ranks or recipe.train.ranks_per_node:
        recipe.accumulation_steps(ranks * options.nodes)
    check_trackers(recipe.track)
    manifest = open_prepared(recipe.training_directory, recipe.loader, check_shards=False)
    manifest.check_made_from(recipe.data, recipe.order)
    from .commands.train import start_training

    return start_training(
        recipe,
        [options.target, *options.overrides],
        ranks=options.ranks,
        stop_after=options.stop_after,
        nodes=_many_nodes(options),
        check_this_node=options.check_node,
    )


def _many_nodes(options: argparse.Namespace) -> ManyNodes:
    return ManyNodes(
        nodes=options.nodes,
        node=options.node,
        endpoint=options.rendezvous,
        job=options.job,
        address=options.address,
    )


def _submit(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.target, options.overrides)
    from ..data.tasks.catalog import chosen_tasks
    from .commands.container import container_of, run_directories
    from .commands.evaluate import check_options
    from .commands.submit import evaluation_words, job_script, submit

    evaluates, words = options.evaluate or bool(options.weights), [options.target, *options.overrides]
    chosen = {name: getattr(options, name) for name in ("tasks", "judge", "json", "picture")}
    chosen_tasks([*options.tasks, *recipe.evaluate.tasks])  # the job may wait for days before it looks at them
    if evaluates:
        check_options(options.overrides, *chosen.values(), has_data=bool(options.weights))
        chosen["tasks"] = ",".join(options.tasks)
        words = evaluation_words(options.target, options.weights, options.overrides, chosen)
    elif any(chosen.values()):
        given = ", ".join(f"--{name}" for name, value in chosen.items() if value)
        raise ValueError(
            f"{given}: the job would train, which takes no such option; add --evaluate or --weights WEIGHTS, or leave "
            f"out {given}"
        )
    paths = [*run_directories(recipe), options.target, *options.weights, options.judge]
    container = container_of(options.container, options.mount, paths)
    if options.print:
        print(job_script(recipe, options.nodes, evaluates=evaluates, container=container), end="")
    else:
        print(submit(recipe, words, options.nodes, evaluates=evaluates, container=container))
    return 0


def _import(options: argparse.Namespace) -> int:
    from .weights.bring_in import describe, import_weights

    config = import_weights(Path(options.target), options.out)
    print(f"saved {options.out}; a recipe that begins from these weights has\n")
    print(f'[init]\nfrom = "{options.out}"\n\n{describe(config)}')
    return 0


def _export(options: argparse.Namespace) -> int:
    from .weights.give_out import export_weights

    model = export_weights(RunDirectory(options.target), options.out, family=options.family, dtype=options.dtype)
    print(f"saved {options.out}, a model of transformers of type {model.family}")
    return 0


def _requeue(options: argparse.Namespace) -> int:
    from .commands.submit import requeue

    verdict = requeue(load_recipe(options.target, options.overrides))
    print(verdict.reason)
    return 0 if verdict.again else 1


def _evaluate(options: argparse.Namespace) -> int:
    from .commands.evaluate import Evaluation, check_options

    more = [word for word in options.overrides if "=" not in word or Path(word).exists()]  # a path may hold "="
    settings = [word for word in options.overrides if word not in more]
    check_options(settings, options.tasks, options.judge, options.json, options.picture, has_data=bool(options.data))
    evaluation = Evaluation(
        targets=[options.target, *more],
        overrides=[*settings, *([f"evaluate.tasks={options.tasks}"] if options.tasks else [])],
        data=options.data,
        judge=options.judge,
        ranks=options.ranks,
        json_file=options.json,
        picture=options.picture,
        nodes=_many_nodes(options),
    )
    return evaluation.start(Console())


def _checkpoints(options: argparse.Namespace) -> int:
    from .commands.checkpoints import list_checkpoints

    run, overrides = find_run(options.target, options.overrides)
    train = run.recipe(overrides).train
    return list_checkpoints(
        run.checkpoints,
        Console(),
        verify=options.verify,
        prune=options.prune,
        keep_last=options.keep_last or train.keep_checkpoints,
        keep_every_steps=train.keep_checkpoint_every_steps if options.keep_every is None else options.keep_every,
        as_json=options.json,
    )


def _report(options: argparse.Namespace) -> int:
    run, _ = find_run(options.target, options.overrides)
    from .commands.report import report

    return report(run, options.out, Console(), follow_s=options.follow)


def _watch(options: argparse.Namespace) -> int:
    run, _ = find_run(options.target, options.overrides)
    from .commands.watch import watch

    return watch(run, Console(), every_s=options.every, once=options.once, as_json=options.json)


def _completion(options: argparse.Namespace) -> int:
    import shtab

    if options.target not in shtab.SUPPORTED_SHELLS:
        raise ValueError(f"{options.target}: must be one of {', '.join(shtab.SUPPORTED_SHELLS)}")
    parser, commands = _parsers()
    for command in commands.values():
        for action in command._actions:
            if action.dest in ("target", "out") and action.metavar != "SHELL":
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, options.target))
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from .commands.inspect import inspect_target

    inspect_target(Path(options.target), options.overrides, Console(), as_json=options.json)
    return 0


def _topology(options: argparse.Namespace) -> int:
    configured = load_recipe(options.target, options.overrides).train.ranks_per_node if options.target else 0
    from .commands.topology import start_probe

    return start_probe(options.target, options.overrides, configured, ranks=options.ranks, json_file=options.json)


class Command(NamedTuple):
    """A sub-command of `longring`."""

    name: str
    run: Callable[[argparse.Namespace], int]
    """Function that runs it; returns the exit status."""
    target: str
    """Name of its first argument, in brackets if it may be left out."""
    summary: str
    """Sentence for the list of commands, and for the first line of its own help."""
    details: str
    """Sentence that follows the summary in its own help."""
    example: str
    """Arguments of the example in its help."""
    add_options: Callable[[argparse.ArgumentParser], None] = lambda _: None


DEMO = "launch/recipes/demo.toml"
OVERRIDES = {
    "RECIPE": "settings that replace those of the recipe",
    "RUN|RECIPE": "evaluate.* settings; with a recipe also run_directory",
    "RUN|RECIPE|WEIGHTS": "more targets; evaluate.* and parallel.* settings, with --data also train.dtype, model.rope*",
    "DATA|RUN|RECIPE": "settings of the recipe; of data alone, curriculum.* and loader.*",
}
TARGETS = {
    "RECIPE": "recipe, a TOML file",
    "RUN|RECIPE": "run directory, or its recipe",
    "RUN|RECIPE|WEIGHTS": "run directory, or its recipe; with --data also a checkpoint, import or Hugging Face model",
    "MODEL_DIR": "directory with config.json and safetensors files",
    "RUN": "run directory, or what `longring import` has written",
    "SHELL": "bash, zsh, fish or tcsh",
}
COMMANDS = (
    Command(
        "prepare",
        _prepare,
        "RECIPE",
        "Prepare documents for training.",
        "They are tokenized, cut into sequences by bucket and written as shards, with every token accounted for.",
        f"{DEMO} data.source.kind=json \\\n      data.source.path='corpus/*.jsonl.gz'",
        add_options.prepare,
    ),
    Command(
        "order",
        _order,
        "RECIPE",
        "Order prepared documents into contexts of related documents.",
        "Its stages embed the documents, find neighbours and near-duplicates, lay a path and write contexts.",
        f"{DEMO} data.rest=pack order.mode=in_context \\\n      order.directory=runs/demo-ordered",
        add_options.order,
    ),
    Command(
        "plan",
        _plan,
        "RECIPE",
        "Print the grid of each bucket's attention with its price, and the mix that a run will train.",
        "With --gpus and --device it predicts memory and time instead, and searches settings that fit. No rank is "
        "started, unless --measure is given.",
        f"{DEMO} --topology full_mesh \\\n      --timeline plan.png --measure",
        add_options.plan,
    ),
    Command(
        "train",
        _train,
        "RECIPE",
        "Train on the ranks of this machine.",
        "Training continues from the last checkpoint in the run directory, if there is one.",
        f"{DEMO} train.steps=40 \\\n      run_directory=runs/short",
        add_options.train,
    ),
    Command(
        "submit",
        _submit,
        "RECIPE",
        "Submit a recipe to Slurm.",
        "The job saves before its time limit, and requeues itself until all steps are done; or it evaluates.",
        f"{DEMO} --nodes 4 \\\n      slurm.partition=main slurm.time=8:00:00",
        add_options.submit,
    ),
    Command(
        "import",
        _import,
        "MODEL_DIR",
        "Make a Hugging Face model the beginning of runs.",
        "Its weights become a checkpoint, which init.from of a recipe names; config.json is of a supported family.",
        "models/Llama-3.1-8B runs/llama",
        add_options.import_,
    ),
    Command(
        "export",
        _export,
        "RUN",
        "Write the last checkpoint of a run as a Hugging Face model.",
        "transformers 4 and 5 read it: weights in safetensors, config.json, tokenizer and generation config.",
        "runs/extended models/mine --dtype BF16",
        add_options.export,
    ),
    Command(
        "requeue",
        _requeue,
        "RECIPE",
        "Decide whether an ended job starts again: status 0 if it does, else 1.",
        "The job script slurm/train.sbatch calls it.",
        DEMO,
    ),
    Command(
        "evaluate",
        _evaluate,
        "RUN|RECIPE|WEIGHTS",
        "Compute the held-out loss of the last checkpoint of a run, or of any weights.",
        "It is given by bucket and position in the context; several targets stand side by side in the tables.",
        "runs/demo models/Llama-3.1-8B \\\n      --data runs/demo-data --ranks 8 --tasks needle --picture needles.png",
        add_options.evaluate,
    ),
    Command(
        "watch",
        _watch,
        "RUN|RECIPE",
        "Show the state of a run until it ends.",
        "It shows the last steps, time left, events, checkpoint and whether ranks go on; in a pipe, a line a change.",
        "runs/demo",
        add_options.watch,
    ),
    Command(
        "report",
        _report,
        "RUN|RECIPE",
        "Write the page of a run: one HTML file that opens without a server.",
        "It has losses, rates, throughput, the plan beside what was measured, evaluations, ledger, starts and events.",
        "runs/demo --follow",
        add_options.report,
    ),
    Command(
        "checkpoints",
        _checkpoints,
        "RUN|RECIPE",
        "List the checkpoints of a run.",
        "The table has the step, size, mesh and state of each; options verify and prune them.",
        "runs/demo --verify",
        add_options.checkpoints,
    ),
    Command(
        "inspect",
        _inspect,
        "DATA|RUN|RECIPE",
        "Show the content of prepared data.",
        "It prints the ledger, lengths, samples and the curriculum with its cost, draws a picture, and verifies the "
        "hash of every shard.",
        "runs/demo-data curriculum.odds=grow_p2 \\\n      curriculum.cycles=8",
        add_options.inspect,
    ),
    Command(
        "topology",
        _topology,
        "[RECIPE]",
        "Measure the links between ranks and their attention speed.",
        "It measures the ranks of this machine, in seconds; slurm/README.md has the command for a cluster.",
        f"{DEMO} --ranks 4",
        add_options.topology,
    ),
    Command(
        "completion",
        _completion,
        "SHELL",
        "Print the script that completes commands, options and files in a shell.",
        "Sourced once, or kept where the shell looks for completions, it works in every later shell.",
        "bash > \\\n      ~/.local/share/bash-completion/completions/longring",
    ),
)


def _parsers() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """Return the parser of `longring`, and those of its sub-commands by name."""
    parser = argparse.ArgumentParser(
        prog="longring",
        description="Pre-train language models on long contexts, on many GPUs.",
        epilog="`longring COMMAND --help` describes a command and gives an example.",
    )
    parser.add_argument("--version", action="version", version=f"longring {version('longring')}")
    parsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        sub = parsers.add_parser(
            command.name,
            help=command.summary,
            description=textwrap.fill(f"{command.summary} {command.details}", 78),
            epilog=f"example:\n  longring {command.name} {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        target = command.target.strip("[]")
        sub.add_argument(
            "target",
            metavar=target,
            nargs=None if target == command.target else "?",
            help=TARGETS.get(target, "prepared data, run directory or recipe"),
        )
        if target not in ("MODEL_DIR", "RUN", "SHELL"):  # they have no settings
            sub.add_argument(
                "overrides",
                nargs="*",
                default=[],  # without it, argparse would call them required
                metavar="key=value",
                help=OVERRIDES.get(target, OVERRIDES["RECIPE"]),
            )
        sub.set_defaults(run=command.run)
        command.add_options(sub)
    return parser, parsers.choices


if __name__ == "__main__":
    sys.exit(main())
