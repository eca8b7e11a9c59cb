"""Every error that names a way out has a test that names this way out.

An error reads `key = value: what is wrong; what to do`. Here the source is read, and for each message that is raised,
returned, yielded or assigned, the text behind its first semicolon is looked for in the strings of the tests: 20
characters of it that are not of one word, or a whole literal piece of 12 to 19. Where the message has no such piece
behind the semicolon, the text before it is looked for instead. Variables, constants and functions of the module are
followed, and each text that they can make is looked for.

This holds that no message is added without a test that knows it. It does not hold that the test carries the advice out,
that it tries every way of a message that names several, or that it means this message and not another one with equal
words. Messages without a semicolon, of methods, and of errors that libraries raise are not seen.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from itertools import islice, product
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COLUMNS = ("kernels", "model", "data", "parallel", "adapters", "launch")
UNKNOWN = "\0"
"""Stands in a text for what is known only when the message is made."""
SHORTEST, NEEDED = 12, 20
"""Least number of characters of a literal piece that is looked for, and the number of them that must be found."""
MOST_TEXTS = 64
"""Number of texts of one message that are looked for."""

Values = Mapping[str, list[ast.expr]]
"""Values of the names of a module: those assigned to a variable, or returned by a function."""


def values_of(tree: ast.Module, constants: Values) -> Values:
    """Return the values of all variables and functions of a module; `constants` are those of other modules."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
        elif isinstance(node, ast.FunctionDef):
            returned = (inner.value for inner in ast.walk(node) if isinstance(inner, ast.Return))
            found.setdefault(node.name, []).extend(value for value in returned if value)
    return {**constants, **found}


def texts_of(node: ast.expr, values: Values, seen: frozenset[str] = frozenset()) -> list[str]:
    """Return the texts that an expression can make; `seen` are the names that it is part of."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.FormattedValue(value=inner):
            return texts_of(inner, values, seen)
        case ast.IfExp(body=first, orelse=second):
            return texts_of(first, values, seen) + texts_of(second, values, seen)
        case ast.JoinedStr() | ast.BinOp(op=ast.Add()):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node.left, node.right]
            made = product(*(texts_of(part, values, seen) for part in parts))
            return ["".join(pieces) for pieces in islice(made, MOST_TEXTS)]
        case ast.Name(id=name) | ast.Call(func=ast.Name(id=name)) if name not in seen:
            found = values.get(name, [])
            return [text for value in found for text in texts_of(value, values, seen | {name})] or [UNKNOWN]
    return [UNKNOWN]


def messages(node: ast.AST, kept: bool = False) -> Iterator[ast.expr]:
    """Yield the strings in `node` that may be messages of errors; `kept`: one would go to an error or a caller."""
    match node:
        case ast.Constant() | ast.JoinedStr() | ast.BinOp():
            if kept:
                yield node
            return
        case ast.Expr(value=ast.Constant()):  # a docstring
            return
        case ast.Module() | ast.ClassDef():
            children = [child for child in node.body if isinstance(child, ast.ClassDef | ast.FunctionDef)]
        case ast.Call(func=called, args=children):
            kept = re.match(r"[A-Z]|print_error$", ast.unparse(called).split(".")[-1]) is not None
        case _:
            children = ast.iter_child_nodes(node)
            if isinstance(node, ast.stmt | ast.List):
                kept = isinstance(node, ast.Raise | ast.Return | ast.Assign | ast.Expr)
    for child in children:
        yield from messages(child, kept)


def plain(text: str) -> str:
    """Return a text as it stands in a regular expression that matches it, without the signs of one."""
    return re.sub(r"[\\()]", "", text).strip()


def untried(sources: Mapping[str, str], tests: str) -> list[str]:
    """Return the messages of modules, by file, of which the strings of tests name no way out."""
    trees = {name: ast.parse(source) for name, source in sources.items()}
    constants: dict[str, list[ast.expr]] = {}
    for tree in trees.values():
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                constants.setdefault(node.targets[0].id, []).append(node.value)
    known = {part for start in range(len(tests)) if " " in (part := tests[start : start + NEEDED]).strip()}

    def named(text: str) -> bool | None:
        pieces = [piece for part in text.split(UNKNOWN) if len(piece := plain(part)) >= SHORTEST]
        found = (
            piece in tests if len(piece) < NEEDED
            else any(piece[start : start + NEEDED] in known for start in range(len(piece) - NEEDED + 1))
            for piece in pieces
        )  # fmt: skip
        return any(found) if pieces else None

    missing = []
    for name, tree in trees.items():
        if "; " not in sources[name]:
            continue
        values = values_of(tree, constants)
        for node in messages(tree):
            for text in dict.fromkeys(texts_of(node, values)):
                what, semicolon, advice = text.partition("; ")
                if semicolon and (":" in what or UNKNOWN in what):
                    if (tried := named(advice)) is None:
                        tried = named(what)
                    if not tried:
                        missing.append(f"{name}:{node.lineno}: {text.replace(UNKNOWN, '…')}")
    return missing


def strings_of_tests() -> str:
    """Return all strings of all tests but this one, docstrings left out."""
    found = []
    for file in sorted((ROOT / "tests").rglob("*.py")):
        nodes = [*ast.walk(ast.parse(file.read_text()))] if file != Path(__file__) else []
        alone = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        found += [node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in alone]
    return "\n".join(plain(value) for value in found if isinstance(value, str))


def test_every_way_out_is_named_by_a_test():
    files = sorted(file for column in COLUMNS for file in (ROOT / column).rglob("*.py"))
    missing = untried({str(file.relative_to(ROOT)): file.read_text() for file in files}, strings_of_tests())
    assert not missing, "carry their advice out in a test:\n" + "\n".join(missing)


PLANTED = {
    "a literal": 'def f(x):\n    raise ValueError(f"x = {x}: is odd; paint the seventh wheel green")',
    "a constant": 'A = "paint the seventh wheel green"\ndef f(x):\n    raise OSError(f"{x}: is odd; {A}")',
    "a function": 'def a():\n    return "paint the seventh wheel green"\ndef f():\n    raise OSError(f"x: odd; {a()}")',
    "a helper": 'def f(x):\n    return ValueError(f"{x}: is odd; paint the " "seventh wheel green")',
    "a choice": 'def f(x):\n  raise OSError("x: " + ("y; wait a while" if x else "z; paint the seventh wheel green"))',
    "a short one": 'def f(x):\n    raise ValueError(f"paint the seventh wheel = {x}: is odd; {x}")',
}


@pytest.mark.parametrize("source", PLANTED.values(), ids=PLANTED)
def test_a_new_error_without_a_test_is_found(source):
    assert len(untried({"new.py": source}, "paint the seventh door; wait a while")) == 1
    assert not untried({"new.py": source}, "a test with paint the seventh wheel green; wait a while")
