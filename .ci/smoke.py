"""Try a release: `smoke.py dist` installs wheel and sdist of a directory into empty environments and uses them there.

The first environment has the wheel and what it requires, in the tested versions: the library. The second borrows the
packages of this interpreter, which has all stages and setuptools: pip builds and installs the sdist there, without a
network, and it prepares and trains. There pip also finds every requirement of the wheel's extra `all` satisfied, by the
versions that are borrowed; it downloads none of them.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPE = str(ROOT / "launch" / "recipes" / "demo.toml")
LIBRARY = """
import sys, time
began = time.process_time()
import longring
assert time.process_time() - began < 1 and "torch" not in sys.modules, "an import takes long"
import torch
import torch.distributed as dist
import torch.multiprocessing as processes

def rank(number, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    sequence = longring.ContextParallel(None, longring.CpGrid.token_ring(2)).sequence(64, (0, 10))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 64, heads, 16, generator=generator, requires_grad=True) for heads in (4, 2, 2))
    layout = longring.SeqLayout.packed((10, 54))
    whole = longring.attention(q, k, v, longring.make_mask(layout, layout))
    found = sequence.attention(*map(sequence.shard, (q, k, v)))
    assert torch.allclose(found, sequence.shard(whole), atol=1e-5)
    [exact], [ours] = torch.autograd.grad(whole.sum(), q), torch.autograd.grad(found.sum(), q)
    assert torch.allclose(sequence.shard(ours), sequence.shard(exact), atol=1e-5)

if __name__ == "__main__":
    processes.spawn(rank, (sys.argv[1],), nprocs=2)
    print("longring", longring.__version__)
"""


def run(*command: str | Path, status: int = 0, **variables: str) -> str:
    """Run a command outside the checkout and return what it printed. Raises SystemExit for another exit status."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        list(map(str, command)),
        cwd=Path(str(command[0])).parents[2],
        env={**kept, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != status:
        raise SystemExit(f"{shlex.join(map(str, command))}: exit status {done.returncode}\n{done.stdout}")
    return done.stdout


def environment(directory: Path, *options: str) -> Path:
    """Make an empty environment and return the folder of its programs."""
    subprocess.run([sys.executable, "-m", "venv", *options, directory], check=True)
    return directory / "bin"


def try_library(wheel: Path, directory: Path) -> None:
    """Install the wheel with what it requires; attend on two ranks; a stage that is not there names its command."""
    bin = environment(directory / "library")
    run(
        bin / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-compile",
        "--constraint",
        ROOT / "constraints.txt",
        wheel,
    )
    version = wheel.name.split("-")[1]
    assert run(bin / "longring", "--version").strip() == f"longring {version}"
    program = directory / "library" / "attend.py"
    program.write_text(LIBRARY)
    assert run(bin / "python", program, directory / "tested").strip() == f"longring {version}"
    assert run(bin / "longring", "prepare", RECIPE, status=2).rstrip().endswith("run pip install 'longring[prepare]'")


def try_stages(sdist: Path, wheel: Path, directory: Path) -> None:
    """Prepare and train with the code of the sdist; packages are those of this interpreter, as the extras ask for."""
    with tarfile.open(sdist) as archive:
        stray = [name for name in archive.getnames() if "/tests" in name]
    assert not stray, f"{stray}: tests need the whole checkout, and the sdist is the library alone"
    bin = environment(directory / "stages", "--without-pip")  # its own setuptools may be too old for the build
    site = Path(run(bin / "python", "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip = (bin / "python", "-m", "pip", "install", "--no-index")
    run(*pip, "--quiet", "--no-deps", "--no-build-isolation", sdist)
    found = Path(run(bin / "python", "-c", "import longring; print(longring.__file__)").strip())
    assert found == site / "longring" / "__init__.py", f"{found} is not of the sdist"
    run(*pip, "--quiet", "--dry-run", f"{wheel}[all]")
    documents = directory / "documents.txt"
    documents.write_text("\n".join(f"Document {n} counts: " + " ".join(map(str, range(n, n + 300))) for n in range(40)))
    settings = [
        *("data.source.kind=text", f"data.source.path={documents}", f"data.directory={directory / 'data'}"),
        *("data.tokenizer.vocab_size=300", "data.max_bucket_tokens=512", "data.held_out_fraction=0"),
        *("train.steps=2", "train.warmup_steps=0", f"run_directory={directory / 'run'}"),
    ]
    run(bin / "longring", "prepare", RECIPE, "--workers", "1", *settings)
    run(bin / "longring", "train", RECIPE, "--ranks", "1", *settings)
    code = f"import longring; print(longring.Checkpoint({str(directory / 'run')!r}).step)"
    assert run(bin / "python", "-c", code).strip() == "2"


def main() -> None:
    """Try the only wheel and the only sdist of the directory that the command line names."""
    dist = Path(sys.argv[1]).resolve()
    [wheel], [sdist] = dist.glob("longring-*.whl"), dist.glob("longring-*.tar.gz")
    for text, part in (
        (f"{wheel.name}: the library", lambda directory: try_library(wheel, directory)),
        (f"{sdist.name}: preparation and training", lambda directory: try_stages(sdist, wheel, directory)),
    ):
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            part(Path(directory))
        print(f"{text}, tried in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
