"""A recipe, its data and a run directory of one test, which the test may break."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from longring.launch import cli
from longring.launch.config import Recipe, load_recipe
from longring.launch.errors import NODE_USER_ERROR, USER_ERROR
from longring.launch.run_directory import RunDirectory


class Sandbox:
    """A copy of the recipe `recipe_file` in `directory`, with a run directory that does not exist yet."""

    def __init__(self, recipe_file: Path, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.recipe = directory / "recipe.toml"
        self.recipe.write_text(recipe_file.read_text())
        self.directory = directory
        self.run = RunDirectory(directory / "run")
        self.capsys = capsys
        self._source = recipe_file.parent / "data"

    @property
    def data(self) -> Path:
        """A copy of the prepared data; from now on the recipe names the copy."""
        copy = self.directory / "data"
        if not copy.exists():
            shutil.copytree(self._source, copy)
            self.recipe.write_text(self.recipe.read_text().replace(str(self._source), str(copy)))
        return copy

    def load(self, *overrides: str) -> Recipe:
        """Load the recipe with this sandbox's run directory and with overrides."""
        return load_recipe(self.recipe, [f"run_directory={self.run.path}", *overrides])

    def begin(self) -> None:
        """Make the run directory as a start does before its first step."""
        self.run.create(self.load())
        self.run.logs.mkdir()

    def main(self, *arguments: str) -> str:
        """Run a command; return the one error that it prints."""
        self.capsys.readouterr()
        status = cli.main(list(arguments))
        output = self.capsys.readouterr()
        assert status in (1, NODE_USER_ERROR if "--job" in arguments else USER_ERROR), output
        assert "Traceback" not in output.err
        text = output.err if status != 1 else re.split(r"(?=damaged: |unreadable: )", output.out, maxsplit=1)[1]
        return re.sub(r"^(error|damaged|unreadable): ", "", " ".join(text.split()))

    def train(self, *overrides: str, ranks: int = 4) -> str:
        """Return the error of `longring train`."""
        run = f"run_directory={self.run.path}"
        return self.main("train", str(self.recipe), run, *overrides, "--ranks", str(ranks))

    def order(self, *arguments: str, mode: str = "in_context") -> str:
        """Return the error of `longring order`."""
        settings = [f"order.mode={mode}", f"order.directory={self.directory}/ordered"]
        return self.main("order", str(self.recipe), *settings, *arguments)
