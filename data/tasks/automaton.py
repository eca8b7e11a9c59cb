"""Strings of a random automaton, to be learnt in context (ICLL, arXiv 2401.12973)."""

import string
from dataclasses import dataclass, replace

import numpy as np

from .draws import Draws
from .material import Material
from .sample import FIRST_REFERENCE, Sample, Segment, Tokens
from .task import question

Automaton = list[dict[int, int]]
"""The next state for each symbol that a state allows."""


def random_automaton(draws: Draws) -> Automaton:
    """Return an automaton of 4 to 12 states over 4 to 18 symbols; each state allows 1 to 4 symbols."""
    states, symbols = 4 + draws.below(9), 4 + draws.below(15)
    return [
        {symbol: draws.below(states) for symbol in draws.distinct(symbols, 1 + draws.below(4))} for _ in range(states)
    ]


@dataclass(frozen=True)
class InContextAutomaton:
    """Strings of an automaton, and one more string, each token of which must be one that the automaton allows."""

    max_string: int = 50
    """Longest string; the last one, which is scored, has this length."""
    any_order: bool = False

    def make(self, material: Material, length: int, number: int, distractors: int, draws: Draws) -> Sample:
        """Return a sample, as `Task.make` says. A distractor is a string of the same symbols without an automaton."""
        # `symbols` [18] holds the token of each symbol.
        automaton, symbols = random_automaton(draws), material.symbols(string.ascii_lowercase[:18])
        end = material.one("\n", "a")
        last, allowed = self._string(automaton, self.max_string, draws)
        used = sorted({symbol for state in automaton for symbol in state})
        wrong = [[draws.choice(used) for _ in last] for _ in range(distractors)]

        def context(tokens: int) -> list[Segment]:
            found: list[Tokens] = []
            left = tokens
            # Every string takes a token at least, so `left` ends below 0.
            while True:
                length_of_one = 1 + draws.below(self.max_string)
                if (left := left - length_of_one - len(end)) < 0:
                    return [Segment(ids) for ids in found]
                found += [symbols[self._string(automaton, length_of_one, draws)[0]], end]

        answers = [[Segment(symbols[string], FIRST_REFERENCE)] for string in (last, *wrong)]
        sample = question(material, length, ([], []), answers, context)
        # The last string ends with the row, so its targets are the last ones.
        first = length - len(last)
        accepted = [(first + index, symbols[symbol]) for index, state in enumerate(allowed) for symbol in state]
        return replace(sample, accepted=np.array(accepted, dtype=np.int64))  # [n, (target, token)]

    def _string(self, automaton: Automaton, size: int, draws: Draws) -> tuple[list[int], list[list[int]]]:
        """Return the symbols of a string, and those that the automaton allows at each of them."""
        state, found, allowed = 0, [], []
        for _ in range(size):
            allowed.append(list(automaton[state]))
            symbol = draws.choice(allowed[-1])
            found.append(symbol)
            state = automaton[state][symbol]
        return found, allowed
