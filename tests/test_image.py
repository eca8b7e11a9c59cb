"""The image: both definitions do the same, with files that exist, and what a base has stays as it is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "image" / "Dockerfile").read_text()
DEFINITION = (ROOT / "image" / "longring.def").read_text()
INSTALL = "sh /source/image/install.sh /source/dist/longring-*.whl /source/constraints.txt"


def test_both_definitions_install_the_same():
    assert INSTALL in " ".join(DOCKERFILE.split()) and INSTALL in " ".join(DEFINITION.split())
    bases = re.findall(r"^ARG BASE=(.*)$|^    BASE=(.*)$", DOCKERFILE + DEFINITION, re.MULTILINE)
    assert len({base for pair in bases for base in pair if base}) == 1
    for setting in ("PYTHONSAFEPATH=1", "PYTHONNOUSERSITE=1", "PYTHONUNBUFFERED=1"):
        assert setting in DOCKERFILE and setting in DEFINITION
    assert 'ENTRYPOINT ["longring"]' in DOCKERFILE and 'exec longring "$@"' in DEFINITION
    assert re.search(r"^USER (?!root)", DOCKERFILE, re.MULTILINE), "not root"
    assert len(re.findall(r"^(?:RUN|COPY|ADD) ", DOCKERFILE, re.MULTILINE)) == 1, "one layer on the base"


def test_a_build_finds_its_files_and_no_others():
    needed = {"image/install.sh", "constraints.txt", "dist/longring-0.2-py3-none-any.whl"}
    assert all((ROOT / name).exists() for name in needed if not name.startswith("dist/"))
    for line in re.findall(r"^    (\S+) /source/\S+$", DEFINITION, re.MULTILINE):
        assert any(name.split("/")[0] == line or name == line for name in needed)
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert rules[0] == "*" and all(rule.startswith("!") for rule in rules[1:])
    let_in = [rule[1:] for rule in rules[1:]]
    assert all(any(fnmatch(name, rule) for rule in let_in) for name in needed)
    assert not any(fnmatch(name, rule) for name in ("README.md", "runs/x", "dist/longring.tar.gz") for rule in let_in)


def wheel(directory: Path, name: str, version: str, *requires: str) -> Path:
    """Write a wheel that holds its metadata alone, and for longring a command that ends well."""
    made = directory / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {need}\n" for need in requires)
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nProvides-Extra: all\n{needs}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    if name == "longring":
        files[f"{info}/entry_points.txt"] = "[console_scripts]\nlongring = builtins:print\n"
    with zipfile.ZipFile(made, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{file},,\n" for file in (*files, f"{info}/RECORD")))
    return made


@pytest.mark.slow
def test_a_base_keeps_its_torch_and_gets_the_tested_set(tmp_path):
    """install.sh runs in an empty environment whose torch is a vendor's; a requirement beyond it fails the build."""
    base, store, programs = tmp_path / "base", tmp_path / "store", tmp_path / "bin"
    store.mkdir()
    programs.mkdir()
    (programs / "apt-get").write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/packages\n')
    (programs / "apt-get").chmod(0o755)
    subprocess.run([sys.executable, "-m", "venv", base], check=True)
    vendors = wheel(store, "torch", "2.9.0a0+vendor")
    for version in ("2.13.0", "2.14.0"):
        wheel(store, "torch", version)
    for version in ("1.0", "2.0"):
        for name in ("triton", "some_tool"):
            wheel(store, name, version)
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("torch==2.13.0\nsome-tool==1.0\ntriton==1.0\n")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    variables |= {
        "PATH": f"{base}/bin:{programs}:{os.environ['PATH']}",
        "PIP_NO_INDEX": "1",
        "PIP_CONFIG_FILE": "/dev/null",
    }
    variables["PIP_FIND_LINKS"] = str(store)

    def install(*words: str | Path) -> tuple[int, str]:
        done = subprocess.run(
            ["sh", ROOT / "image" / "install.sh", *words], env=variables, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr

    subprocess.run([base / "bin" / "python3", "-m", "pip", "install", "-q", vendors], env=variables, check=True)
    status, said = install(wheel(tmp_path, "longring", "1", "torch>=2.6", "some_tool", "triton"), constraints)
    assert status == 0, said
    words = [base / "bin" / "python3", "-m", "pip", "list", "--format", "freeze"]
    listed = subprocess.run(words, env=variables, check=True, capture_output=True, text=True).stdout.split()
    assert {"torch==2.9.0a0+vendor", "some_tool==1.0", "triton==1.0", "longring==1"} <= set(listed)
    assert "libibverbs1 ibverbs-providers" in (tmp_path / "packages").read_text()
    status, said = install(wheel(tmp_path, "longring", "2", "torch>=2.10"), constraints)
    assert status != 0 and "torch" in said, "pip replaces no vendor's torch"
    assert install("dist/longring-*.whl", constraints)[0] == 2
    assert "run make dist" in install("a.whl", "b.whl", constraints)[1]
