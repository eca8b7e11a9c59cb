"""All tasks by name."""

from collections.abc import Iterator, Mapping, Sequence

from .automaton import InContextAutomaton
from .copying import Copy, RelatedPrefix
from .counts import CommonWords, FrequentWords
from .draws import Draws
from .knotted import Backtrace
from .material import Material
from .needles import Needles
from .pairs import Pairs
from .sample import Sample
from .task import Task
from .variables import Variables

TASKS: Mapping[str, Task] = {
    "needle_single_1": Needles("noise"),
    "needle_single_2": Needles("documents"),
    "needle_single_3": Needles("documents", value="uuid"),
    "needle_multikey_1": Needles("documents", keys=4),
    "needle_multikey_2": Needles("needles"),
    "needle_multikey_3": Needles("needles", key="uuid", value="uuid"),
    "needle_multivalue": Needles("documents", values=4),
    "needle_multiquery": Needles("documents", keys=4, queries=4),
    "variables": Variables(),
    "common_words": CommonWords(),
    "frequent_words": FrequentWords(),
    "uuid": Pairs(),
    "thread_forward": Pairs(hops=5),
    "thread_reverse": Pairs(hops=5, direction="reverse"),
    "thread_multiple": Pairs(hops=3, threads=3),
    "backtrace": Backtrace(),
    "automaton": InContextAutomaton(),
    "copy_text": Copy("documents"),
    "copy_random": Copy("random"),
    "prefix": RelatedPrefix(),
}
"""Tasks, those of RULER by its numbers."""


def chosen_tasks(names: Sequence[str]) -> dict[str, Task]:
    """Return the tasks whose names are given whole or up to an underscore. Raises ValueError for an unknown name."""
    found: dict[str, Task] = {}
    for name in names:
        matching = {full: task for full, task in TASKS.items() if full == name or full.startswith(f"{name}_")}
        if not matching:
            groups = sorted({full.partition("_")[0] for full in TASKS})
            names_of_all = ", ".join(dict.fromkeys([*groups, *TASKS]))
            raise ValueError(f"evaluate.tasks = {name}: there is no such task; name some of {names_of_all}")
        found |= matching
    return found


def samples(name: str, material: Material, length: int, *, count: int, distractors: int, seed: int) -> Iterator[Sample]:
    """Yield the samples of a task, a pure function of the arguments; each is made when it is asked for.

    Raises TooShortError if the length does not hold the task, and ValueError if the material does not suit it.
    """
    # The key of the draws names the sample, so each is the same without those before it.
    for number in range(count):
        yield TASKS[name].make(material, length, number, distractors, Draws(seed, name, length, number))
