"""The path over synthetic documents on one core, beside the loop of the released code, written anew.

    .venv/bin/python benchmarks/order.py [--quick] [--json FILE]

Documents lie on a hidden ring; each lists 20 others near it, the more similar the nearer, and their numbers are
shuffled, so that neighbours lie anywhere in memory, as in a corpus. Each method runs in a process of its own on the
same lists; seconds are CPU time, as the core is not ours alone, and peak memory is that process', lists included.

- path: `data/order/path.py`, degrees, graph and walk, with the file it writes;
- released: what the `sort.py` of In-Context Pretraining's released code does (github.com/swj0419/
  in-context-pretraining), in plain Python as there: start anywhere, go to the first unseen of the nearest nine, begin
  anew where there is none and after 21 documents; no degrees, edges one way;
- released, compiled: the same loop by numba, to tell the method from the language.

A jump is a step between documents of which neither lists the other; it counts as similarity 0.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
from longring.data.order.path import STEP_DTYPE, greedy_path, make_graph
from longring.data.permutation import mix_bits
from numba import njit
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

NEIGHBORS, NEAREST, CLUSTER = 20, 9, 21
METHODS = ("path", "released", "released, compiled")


def write_lists(folder: Path, count: int) -> None:
    """Write neighbours [count, 20] and similarities, most similar first, the same from either side."""
    generator = np.random.default_rng(0)
    at = generator.permutation(count).astype(np.uint32)  # place on the ring -> document
    place = np.empty(count, dtype=np.int64)
    place[at] = np.arange(count)
    ids = np.lib.format.open_memmap(folder / "ids.npy", "w+", np.uint32, (count, NEIGHBORS))
    similarities = np.lib.format.open_memmap(folder / "similarities.npy", "w+", np.float32, (count, NEIGHBORS))
    for first in range(0, count, 1 << 18):
        documents = np.arange(first, min(first + (1 << 18), count), dtype=np.uint64)
        distances = np.cumsum(generator.integers(1, 6, (len(documents), NEIGHBORS)), axis=1)
        sides = generator.choice([-1, 1], distances.shape)
        others = at[(place[first : first + len(documents), None] + distances * sides) % count]
        pair = np.sort(np.stack(np.broadcast_arrays(documents[:, None], others.astype(np.uint64))), axis=0)
        noise = (mix_bits(mix_bits(pair[0]) ^ pair[1]) >> np.uint64(40)).astype(np.float64) / 2**24
        values = (1 / (1 + distances / 30) * (0.8 + 0.2 * noise)).astype(np.float32)
        order = np.argsort(-values, axis=1, kind="stable")
        ids[first : first + len(documents)] = np.take_along_axis(others, order, axis=1)
        similarities[first : first + len(documents)] = np.take_along_axis(values, order, axis=1)


def released(ids: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
    """Return documents, and whether each begins a cluster."""
    unseen = set(range(len(ids)))
    found, begins = [], []
    while unseen:
        document = unseen.pop()
        found.append(document)
        begins.append(True)
        for _ in range(CLUSTER - 1):
            following = next((other for other in ids[document, :NEAREST].tolist() if other in unseen), None)
            if following is None:
                break
            unseen.remove(following)
            found.append(following)
            begins.append(False)
            document = following
    return np.array(found, dtype=np.uint32), np.array(begins)


@njit
def released_compiled(ids):
    seen = np.zeros(len(ids), np.bool_)
    found, begins = np.empty(len(ids), np.uint32), np.zeros(len(ids), np.bool_)
    count, cursor = 0, 0
    while count < len(ids):
        while seen[cursor]:
            cursor += 1
        document = np.int64(cursor)
        begins[count] = True
        for _ in range(CLUSTER):
            seen[document] = True
            found[count] = document
            count += 1
            following = np.int64(-1)
            for slot in range(NEAREST):
                if not seen[ids[document, slot]]:
                    following = np.int64(ids[document, slot])
                    break
            if following < 0:
                break
            document = following
    return found, begins


def child(method: str, folder: Path) -> dict[str, float]:
    """Run one method on the lists in `folder` -> seconds, peak memory, jumps, mean similarity."""
    tiny = np.array([[1], [0]], dtype=np.uint32)
    with tempfile.TemporaryDirectory() as temporary:  # compiles, or loads what an earlier process compiled
        list(greedy_path(make_graph(tiny, np.ones((2, 1), np.float32)), np.zeros(2, np.bool_), Path(temporary, "p")))
    released_compiled(np.zeros((1, NEAREST), dtype=np.uint32))
    ids, similarities = np.load(folder / "ids.npy"), np.load(folder / "similarities.npy")
    started = time.process_time()
    if method == "path":
        file = folder / "path"
        for _ in greedy_path(make_graph(ids, similarities), np.zeros(len(ids), dtype=np.bool_), file):
            pass
        seconds = time.process_time() - started
    else:
        documents, begins = released(ids) if method == "released" else released_compiled(ids)
        seconds = time.process_time() - started
    [peak] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    if method == "path":
        steps = np.fromfile(file, dtype=STEP_DTYPE)
        file.unlink()
        documents, values = steps["document"], np.nan_to_num(steps["similarity"][1:])
        jumps = int(np.isnan(steps["similarity"][1:]).sum())
    else:
        before, after = documents[:-1], documents[1:]
        values = np.where((ids[before] == after[:, None]) & ~begins[1:, None], similarities[before], 0).sum(axis=1)
        jumps = int(begins[1:].sum())
    assert np.array_equal(np.sort(documents), np.arange(len(ids))), "a permutation of the documents"
    return {
        "documents": len(ids),
        "seconds": seconds,
        "peak_mb": int(peak.split()[1]) / 1024,
        "jumps": jumps,
        "mean_similarity": float(values.mean(dtype=np.float64)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="up to 10^6 documents; about a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child[0], Path(options.child[1]))))
        return 0
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rows = []
    for count in (10**5, 10**6) if options.quick else (10**5, 10**6, 10**7):
        with tempfile.TemporaryDirectory() as temporary:
            write_lists(Path(temporary), count)
            for method in METHODS:
                command = [sys.executable, __file__, "--child", method, temporary]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                rows.append({"method": method, **json.loads(out.splitlines()[-1])})
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def show(rows: list[dict]) -> None:
    title = f"A path over documents with {NEIGHBORS} neighbours each, one core; mean: similarity of a step"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("documents", "method", "s", "x released", "peak MB", "jumps", "mean"):
        table.add_column(column, justify="right", no_wrap=True)
    by_key = {(row["documents"], row["method"]): row for row in rows}
    for row in rows:
        theirs = by_key[row["documents"], "released"]["seconds"]
        table.add_row(
            f"{row['documents']:,}",
            row["method"],
            f"{row['seconds']:.2f}",
            f"{row['seconds'] / theirs:.2f}",
            f"{row['peak_mb']:,.0f}",
            f"{row['jumps']:,}",
            f"{row['mean_similarity']:.3f}",
        )
    Console().print(table)
    print("goals at 1,000,000: 10 s, 1,000 MB, 2 x released, fewer jumps and a higher mean")
    sizes = sorted({row["documents"] for row in rows})
    for small, large in pairwise(sizes):
        growth = by_key[large, "path"]["seconds"] / by_key[small, "path"]["seconds"]
        print(f"path: {large // small} times the documents take {growth:.1f} times as long")


if __name__ == "__main__":
    sys.exit(main())
