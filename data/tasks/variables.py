"""Variable tracking, by RULER's rules: names that are assigned a value through a chain of other names."""

import string
from dataclasses import dataclass

from .draws import Draws, different
from .material import Material
from .sample import Sample, Segment, too_short
from .task import hide, listed, question
from .words import NOISE


@dataclass(frozen=True)
class Variables:
    """Chains of assignments in noise, and a question for all names that hold the value of the first chain."""

    hops: int = 4
    """Number of assignments from name to name in each chain."""
    chains: int = 1
    any_order: bool = True

    def make(self, material: Material, length: int, number: int, distractors: int, draws: Draws) -> Sample:
        """Return a sample, as `Task.make` says. A solved example with names of three letters comes before it."""
        per_chain = self.hops + 1
        names = _names(5, (self.chains + distractors) * per_chain, draws)
        values = [draws.digits(5) for _ in range(self.chains)]
        # [chain][assignment][tokens]
        chains = [
            material.encode(
                [f"\n{line}" for line in _assignments(names[chain * per_chain : (chain + 1) * per_chain], value)], "."
            )
            for chain, value in enumerate(values)
        ]

        def context(tokens: int) -> list[Segment]:
            left = tokens - sum(len(line) for chain in chains for line in chain)
            haystack = material.haystack("noise", max(left, 0), draws)
            cuts = material.cuts(haystack)
            if len(cuts) <= per_chain:  # each assignment of a chain has a cut of its own
                raise too_short(length, f"no room for {per_chain} assignments in noise")
            # The assignments of a chain keep their order.
            at = [sorted(cuts[draws.distinct(len(cuts), per_chain)].tolist()) for _ in chains]
            return hide(haystack, [line for chain in chains for line in chain], [cut for chain in at for cut in chain])

        head, tail = self._ends(values[0])
        answers = [names[:per_chain]]
        wrong = names[self.chains * per_chain :]
        answers += [wrong[index * per_chain : (index + 1) * per_chain] for index in range(distractors)]
        ends = (
            [Segment(material.one(self._example(draws))), Segment(material.one(head))],
            [Segment(material.one(tail))],
        )
        return question(material, length, ends, [listed(material, names, "are", "") for names in answers], context)

    def _ends(self, value: str) -> tuple[str, str]:
        head = "Names are assigned values in the text below. Follow them from name to name.\n"
        tail = f"\nWhich names hold {value}? The {self.hops + 1} names that hold {value} are"
        return head, tail

    def _example(self, draws: Draws) -> str:
        names, value = _names(3, self.hops + 1, draws), draws.digits(5)
        head, tail = self._ends(value)
        return f"{head}{NOISE.join(_assignments(names, value))}{tail} {' '.join(names)}\n\n"


def _names(letters: int, count: int, draws: Draws) -> list[str]:
    """Return different names of capital letters."""
    return different(lambda: draws.letters(string.ascii_uppercase, letters), count)


def _assignments(names: list[str], value: str) -> list[str]:
    """Return a line for each name, which is assigned the value or the name before it."""
    return [f"let {name} = {source};\n" for name, source in zip(names, [value, *names], strict=False)]
