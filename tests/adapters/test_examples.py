"""Every example runs, its losses are equal, and its output is the one that its page shows."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import longring
import pytest
from helpers.lanes import by_lane

ROOT = Path(__file__).parents[2]
EXAMPLES = {
    "device_mesh": "device-mesh",
    "transformers_ring": "transformers",
    "transformers_trainer": "transformers",
    "lightning_ring": "transformers",
    "same_losses": "transformers",
    "megatron_ring": "megatron-core",
    "stateful_loader": "loader",
}
"""The page of docs/adapters that shows each example's output."""
UNDER_TORCHRUN = ("transformers_trainer", "lightning_ring")
"""Examples whose trainer joins the ranks itself."""
NUMBER = re.compile(r"\d+\.\d{4}")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_has_a_page_and_a_command():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {*EXAMPLES}
    for name in EXAMPLES:
        command = rf"^ *(torchrun --nproc-per-node 4|python) examples/{name}\.py$"
        assert re.search(command, (ROOT / "examples" / f"{name}.py").read_text(), re.M)


def test_examples_use_public_names_alone():
    """They import names of `longring`, and the adapters with a page of their own, alone."""
    for name in EXAMPLES:
        for node in ast.walk(ast.parse((ROOT / "examples" / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("longring"):
                adapters = ("longring.adapters.hugging_face", "longring.adapters.megatron_core")
                assert node.module in ("longring", *adapters), f"{name}: {node.module}"
                assert node.module in adapters or {each.name for each in node.names} <= {*longring.__all__}


def printed_by(names: list[str]) -> list[str]:
    """Return what examples print, one after the other in the processes of one start."""
    return [load(name).main() for name in names]


@pytest.mark.slow
def test_every_example_prints_what_its_page_shows(on_ranks):
    on_four = [name for name in EXAMPLES if name not in ("stateful_loader", *UNDER_TORCHRUN)]
    printed = dict(zip(on_four, on_ranks(4, printed_by, on_four)[0], strict=True))
    printed["stateful_loader"] = load("stateful_loader").main()
    for name, text in printed.items():
        assert_shown(name, text)


@pytest.mark.parametrize("name", by_lane(UNDER_TORCHRUN, quick=[], slow=["lightning_ring"]))
def test_a_trainer_prints_what_its_page_shows(name):
    """After the lines of the trainer's own."""
    words = ["-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command = [sys.executable, *words, ROOT / "examples" / f"{name}.py"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert_shown(name, said[said.index("step  one process") :])


def assert_shown(name: str, text: str) -> None:
    """Assert that the page of an example shows its output once."""
    page = ROOT / "docs" / "adapters" / f"{EXAMPLES[name]}.md"
    shown = [block.strip() for block in page.read_text().split("```") if skeleton(block) == skeleton(text)]
    assert len(shown) == 1, f"{page.name} should show:\n{text}"
    # Another processor rounds otherwise, and a step carries that on to the next.
    assert numbers(shown[0]) == pytest.approx(numbers(text), abs=2e-3)


def numbers(text: str) -> list[float]:
    return [float(number) for number in NUMBER.findall(text)]


def skeleton(text: str) -> str:
    return NUMBER.sub("#", text).strip()
