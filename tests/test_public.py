"""The public face: the names of `longring`, their signatures, and what importing them costs."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import longring
import pytest

ROOT = Path(__file__).parents[1]
SIGNATURES = Path(__file__).with_suffix(".txt")
"""Signatures of the library. A change of this file is one of the library: docs/api.md says when it may be made."""
MEMBERS = {
    "BatchOrder": ("batch", "batch_tokens", "sequences"),
    "Checkpoint": ("read", "recipe", "shapes", "step", "verify"),
    "ContextParallel": ("rank", "size", "sequence"),
    "CpGrid": ("hybrid", "parse", "ring", "ring_both_ways", "size", "square", "token_ring", "ulysses", "unfit"),
    "Mask": ("num_pairs",),
    "PricedGrid": ("exposed_s", "peak_bytes", "seconds"),
    "Price": ("exposed_s",),
    "Pricer": ("price", "schedule"),
    "RankPlan": ("messages",),
    "Schedule": ("plan", "plans"),
    "SeqLayout": ("contiguous", "num_tokens", "packed", "positions", "rotary_positions"),
    "SharedSequence": ("attention", "layout", "num_tokens", "shard", "unshard"),
    "StatefulLoader": ("load_state_dict", "state_dict"),
    "Topology": ("preset",),
}
"""Methods and properties of classes that are promised; the fields of a dataclass are in its own signature."""
MADE_BY_OTHERS = {"BatchOrder", "Schedule", "SharedSequence"}
"""Classes that are not made by their own name, so that nothing is promised of it."""


def signatures() -> str:
    """Return the promised signatures, one a line."""
    lines = []
    for name in sorted(set(longring.__all__) - {"__version__"}):
        value = getattr(longring, name)
        lines.append(name if name in MADE_BY_OTHERS else f"{name}{signature(value)}")
        for member in MEMBERS.get(name, ()):
            found = inspect.getattr_static(value, member)
            function: Any = found.fget if isinstance(found, property) else getattr(value, member)
            lines.append(f"    {member}{signature(function)}")
    return "\n".join(lines) + "\n"


class Text(str):
    """A text that a signature shows without quotation marks."""

    __slots__ = ()
    __repr__ = str.__str__


def signature(of: Callable[..., Any]) -> str:
    """Return a signature whose annotations are written out: the values of literals, the ranges of numbers."""
    found = inspect.signature(of, eval_str=True)
    untyped = [each.name for each in found.parameters.values() if each.annotation is each.empty]
    assert untyped in ([], ["self"]), f"{of}: {untyped}"
    # The fields of a NamedTuple are references that `inspect` leaves as they are.
    types = get_type_hints(of, include_extras=True) if hasattr(of, "_fields") else {}
    parameters = [
        each.replace(annotation=written_out(types.get(name, each.annotation)))
        for name, each in found.parameters.items()
    ]
    return str(found.replace(parameters=parameters, return_annotation=written_out(found.return_annotation)))


def written_out(annotation: Any) -> Any:
    """Return an annotation as text, types by their own names; that of a parameter without one stays empty."""
    if annotation is inspect.Signature.empty:
        return annotation
    # Modules are left out: `longring.parallel.cp.grid.CpGrid` is CpGrid.
    text = annotation.__qualname__ if isinstance(annotation, type) else repr(annotation)
    text = re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=\w)", "", text)
    # The shape of an array is any, which numpy 1 and 2 spell in two ways.
    return Text(re.sub(r"ndarray\[(?:Any|tuple\[Any, \.\.\.\]), dtype\[(\w+?)_?\]\]", r"NDArray[\1]", text))


def test_signatures_are_those_promised():
    assert signatures() == SIGNATURES.read_text(), f"a promised signature changed; {SIGNATURES.name} would be:\n" + (
        signatures()
    )


def test_every_type_in_a_signature_is_public_or_another_library_s():
    found = {*re.findall(r"\b[A-Z]\w+", re.sub("'.*?'", "", SIGNATURES.read_text()))}
    python = {"Any", "Hashable", "Mapping", "None", "Path", "Random", "Sequence", "True"}
    typing = {"Annotated", "Interval", "Literal", "NDArray", "Union"}
    assert found - {*longring.__all__} == python | typing | {"ProcessGroup", "Tensor"}


def test_every_public_name_is_imported_for_type_checkers():
    tree = ast.parse(Path(longring.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {
        (node.module, name.name) for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names
    }
    assert imported == {(module, name) for module, names in longring._NAMES.items() for name in names}
    assert {*longring.__all__} == {name for _, name in imported} | {"__version__"}


@pytest.mark.parametrize("name", longring.__all__)
def test_every_public_name_has_a_docstring_and_a_row_in_the_page(name: str):
    if name != "__version__":
        assert (inspect.getdoc(getattr(longring, name)) or "").partition("\n")[0].endswith((".", ":"))
    assert f"`{name}`" in (ROOT / "docs" / "api.md").read_text()


def test_an_import_loads_no_library():
    code = (
        "import sys\nbefore = set(sys.modules)\nimport longring\n"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(loaded - sys.stdlib_module_names), longring.__version__)"
    )
    # Without site-packages, and from the root of a checkout that nobody has installed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["['longring']", longring.__version__]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'longring' has no attribute 'attend'"):
        longring.attend  # type: ignore[attr-defined]  # noqa: B018
    assert {*longring.__all__} <= {*dir(longring)}
