"""The container of a job: its image, and the directories of the machines that it sees."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import Recipe
from ..redact import redact


@dataclass(frozen=True)
class Container:
    """The container in which a job runs: the launcher of each node, as slurm/train.sbatch takes it, or one task."""

    image: str
    """Absolute path of a file, or a name in a registry. apptainer runs an image that ends in .sif, pyxis any other."""
    mounts: tuple[str, ...]
    """Absolute paths that the container sees under the same names, besides the directory of submission."""

    @property
    def variables(self) -> list[str]:
        """Lines of the job script that name the image and the mounts."""
        lines = [f"export LONGRING_CONTAINER='{self.image}'"]
        return [*lines, f"export LONGRING_MOUNTS='{','.join(self.mounts)}'"] if self.mounts else lines

    @property
    def words(self) -> list[str]:
        """Words of a job script before a command, which then runs in the container, in the directory of submission."""
        here = str(Path.cwd())
        seen = here, *self.mounts
        if self.image.endswith(".sif"):
            return ["apptainer", "exec", "--bind", ",".join(seen), "--pwd", here, self.image]
        mounts = ",".join(f"{path}:{path}" for path in seen)
        return [
            "srun",
            f"--container-image={self.image}",
            f"--container-mounts={mounts}",
            f"--container-workdir={here}",
        ]

    def check_runtime(self) -> None:
        """Raise ValueError if this machine shows that no node can run the image.

        A node without apptainer says so itself when the job has started, since only nodes need it.
        """
        if self.image.endswith(".sif"):
            return
        srun = shutil.which("srun")
        options = subprocess.run([srun, "--help"], capture_output=True, text=True).stdout if srun else ""
        if "--container-image" not in options:
            raise ValueError(
                f"--container {self.image}: srun has no option --container-image, so Slurm runs without pyxis here; "
                "build a file that ends in .sif, which apptainer runs"
            )


def run_directories(recipe: Recipe) -> list[str]:
    """Return the directories that a run or an evaluation of a recipe reads and writes; "" stands for none."""
    return [recipe.training_directory, recipe.loader.cache_directory, recipe.init.from_, recipe.run_directory]


def preparation_directories(recipe: Recipe) -> list[str]:
    """Return the directories and files that a preparation reads, and the directory in which prepared data appears."""
    data = recipe.data
    paths = [source.path for source in data.named_sources.values() if source.kind != "hub"]
    read = [Path(path).absolute() for path in (*paths, data.tokenizer.path) if path and "://" not in path]
    # Of a glob, the directory above its first wildcard.
    exist = [next(part for part in (path, *path.parents) if part.exists()) for path in read]
    return [*map(str, exist), str(Path(data.directory).absolute().parent)]


def container_of(image: str, mounts: Sequence[str], paths: Iterable[str]) -> Container | None:
    """Return the container of a job that --container and --mount name, with `paths` mounted as well; None without one.

    Empty and remote paths are left out. Raises ValueError if the image is a file that does not exist, or a name could
    be read as another one, or for mounts without an image.
    """
    if not image:
        if mounts:
            raise ValueError("--mount: names a directory for a container; name its image with --container")
        return None
    if redact(image) != image:
        raise ValueError(
            f"--container {redact(image)}: holds a secret, which the job script would show; name the image without it, "
            "and log in to the registry"
        )
    if image.endswith((".sif", ".sqsh")) or image.startswith(("/", ".")):  # else a name in a registry
        if not Path(image).is_file():
            raise ValueError(f"--container {image}: no such file; build the image first, see docs/image.md")
        image = str(Path(image).absolute())
    if not re.fullmatch(r"[\w./:@+#=-]+", image, re.ASCII):
        raise ValueError(
            f"--container {image!r}: not an image; use letters, digits and ./:@+#=- alone, and rename a file"
        )
    local = [Path(path).absolute() for path in (*paths, *mounts) if path and "://" not in path]
    here = str(Path.cwd())
    # The target of a link is mounted too, since the container sees the link itself.
    seen = {here, *(os.path.normpath(path) for path in local), *(str(path.resolve()) for path in local)}
    for path in seen:
        if not re.fullmatch(r"(/[\w.@+=-]+)+", path, re.ASCII):  # no comma and no colon: they separate mounts
            raise ValueError(
                f"{path!r}: cannot be mounted in a container; use letters, digits and .@+=- alone in names of "
                "directories, below the root"
            )
    # A path below another one is mounted with it, and the directory of submission always is.
    inside = {path for path in seen if any(str(parent) in seen for parent in Path(path).parents)}
    return Container(image, tuple(sorted(seen - inside - {here})))
