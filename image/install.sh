#!/bin/sh
# Install LongRing's wheel into the Python of an image, with the tested set of packages. Run by root in a build:
#
#   install.sh dist/longring-*.whl constraints.txt
#
# A base with packages of its own keeps them: torch and Triton stay as they are, or the build fails; others change only
# where a requirement does not allow them. Every package that is added has the version of the tested set.
set -eu

[ $# -eq 2 ] && [ -f "$1" ] || { echo "error: dist/: holds no wheel, or several; run make dist" >&2; exit 2; }

# Triton compiles launchers with gcc. NCCL loads libibverbs, without which it would send over sockets.
apt-get update -q
apt-get install -q -y --no-install-recommends gcc libc6-dev libibverbs1 ibverbs-providers

chosen=$(mktemp)
python3 - "$2" >"$chosen" <<'PYTHON'
import re
import sys
from importlib.metadata import distributions
from pathlib import Path

def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()

base = {normal(found.metadata["Name"]): found.version for found in distributions()}
for line in Path(sys.argv[1]).read_text().splitlines():
    if normal(line.partition("==")[0]) not in base:
        print(line)
for name in base.keys() & {"torch", "triton"}:
    print(f"{name}=={base[name]}")
PYTHON

# The images of vendors and of Debian mark their Python as not to be changed by pip.
export PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore DS_BUILD_OPS=0
python3 -m pip install --no-cache-dir --constraint "$chosen" "$1[all]"
rm "$chosen"
longring --help >/dev/null
