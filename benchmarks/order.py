"""Quality and speed of the path through all documents, beside the released loop of In-Context Pretraining.

    python benchmarks/order.py --json rows.json   # ten minutes
    python benchmarks/order.py --quick            # up to 10^6 documents

Documents lie on a hidden ring. Each lists 20 others near it, the more similar the nearer, and their numbers are
shuffled, so that neighbours lie anywhere in memory, as in a corpus. Each method runs in a process of its own on the
same lists. Seconds are CPU time on one core; peak memory is that of the process, lists included.

- path: data/order/path.py, degrees, graph and walk, with the file that it writes;
- released: the method of sort.py in github.com/swj0419/in-context-pretraining, in plain Python as there: start
  anywhere, go to the first unseen of the nearest nine, begin anew where there is none and after 21 documents; no
  degrees, edges one way;
- released, compiled: the same loop compiled by numba, which separates the method from the language.

A jump is a step between documents of which neither lists the other; it counts as similarity 0.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))  # finds `lib` also under PYTHONSAFEPATH
from lib.process import peak_megabytes, use_one_core
from lib.script import Row, make_parser, make_table, write_record
from longring.data.order.path import STEP_DTYPE, greedy_path, make_graph
from longring.data.permutation import mix_bits
from numba import njit
from numpy.typing import NDArray
from rich.console import Console

NEIGHBORS, NEAREST, CLUSTER = 20, 9, 21
METHODS = ("path", "released", "released, compiled")


def write_lists(folder: Path, count: int) -> None:
    """Write neighbours [count, 20] and similarities [count, 20], most similar first, equal from either side."""
    generator = np.random.default_rng(0)
    document_at = generator.permutation(count).astype(np.uint32)  # position on the ring -> document
    position = np.empty(count, dtype=np.int64)  # document -> position on the ring
    position[document_at] = np.arange(count)
    ids = np.lib.format.open_memmap(folder / "ids.npy", "w+", np.uint32, (count, NEIGHBORS))
    similarities = np.lib.format.open_memmap(folder / "similarities.npy", "w+", np.float32, (count, NEIGHBORS))
    for first in range(0, count, 1 << 18):
        documents = np.arange(first, min(first + (1 << 18), count), dtype=np.uint64)
        distances = np.cumsum(generator.integers(1, 6, (len(documents), NEIGHBORS)), axis=1)
        sides = generator.choice([-1, 1], distances.shape)
        others = document_at[(position[first : first + len(documents), None] + distances * sides) % count]
        pair = np.sort(np.stack(np.broadcast_arrays(documents[:, None], others.astype(np.uint64))), axis=0)
        noise = (mix_bits(mix_bits(pair[0]) ^ pair[1]) >> np.uint64(40)).astype(np.float64) / 2**24
        values = (1 / (1 + distances / 30) * (0.8 + 0.2 * noise)).astype(np.float32)
        order = np.argsort(-values, axis=1, kind="stable")
        ids[first : first + len(documents)] = np.take_along_axis(others, order, axis=1)
        similarities[first : first + len(documents)] = np.take_along_axis(values, order, axis=1)


def released(ids: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
    """Return the documents in order, and whether each begins a cluster."""
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
    """Return the same as `released`."""
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


def child(method: str, folder: Path) -> Row:
    """Run one method on the lists in `folder` and return its seconds, peak memory, jumps and mean similarity."""
    tiny = np.array([[1], [0]], dtype=np.uint32)
    with tempfile.TemporaryDirectory() as temporary:  # compiles, or loads the code that an earlier process compiled
        list(greedy_path(make_graph(tiny, np.ones((2, 1), np.float32)), np.zeros(2, np.bool_), Path(temporary, "p")))
    released_compiled(np.zeros((1, NEAREST), dtype=np.uint32))
    ids, similarities = np.load(folder / "ids.npy"), np.load(folder / "similarities.npy")
    started = time.process_time()
    if method == "path":
        file = folder / "path"
        for _ in greedy_path(make_graph(ids, similarities), np.zeros(len(ids), dtype=np.bool_), file):
            pass
        seconds, peak_mb = time.process_time() - started, peak_megabytes()
        steps = np.fromfile(file, dtype=STEP_DTYPE)
        file.unlink()
        documents, values = steps["document"], np.nan_to_num(steps["similarity"][1:])
        jumps = int(np.isnan(steps["similarity"][1:]).sum())
    else:
        documents, begins = released(ids) if method == "released" else released_compiled(ids)
        seconds, peak_mb = time.process_time() - started, peak_megabytes()
        before, after = documents[:-1], documents[1:]
        values = np.where((ids[before] == after[:, None]) & ~begins[1:, None], similarities[before], 0).sum(axis=1)
        jumps = int(begins[1:].sum())
    assert np.array_equal(np.sort(documents), np.arange(len(ids))), "a permutation of the documents"
    return {
        "documents": len(ids),
        "seconds": seconds,
        "peak_mb": peak_mb,
        "jumps": jumps,
        "mean_similarity": float(values.mean(dtype=np.float64)),
    }


def show(rows: list[Row]) -> None:
    """Print a line for each method and size, and how time grows with size."""
    title = f"A path over documents with {NEIGHBORS} neighbours each, one core; mean: similarity of a step"
    table = make_table(title, ("documents", "method", "s", "x released", "peak MB", "jumps", "mean"), left=("method",))
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
    console = Console()
    console.print(table)
    console.print("goals at 1,000,000: 10 s, 1,000 MB, 2 x released, fewer jumps and a higher mean")
    for small, large in pairwise(sorted({row["documents"] for row in rows})):
        growth = by_key[large, "path"]["seconds"] / by_key[small, "path"]["seconds"]
        console.print(f"path: {large // small} times the documents take {growth:.1f} times as long")


def main() -> int:
    parser = make_parser(__doc__ or "", quick="up to 10^6 documents: about a minute")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child[0], Path(options.child[1]))))
        return 0
    use_one_core()
    rows = []
    for count in {"full": (10**5, 10**6, 10**7), "quick": (10**5, 10**6), "smallest": (10**4,)}[options.size]:
        with tempfile.TemporaryDirectory() as temporary:
            write_lists(Path(temporary), count)
            for method in METHODS:
                command = [sys.executable, __file__, "--child", method, temporary]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                rows.append({"method": method, **json.loads(out.splitlines()[-1])})
    show(rows)
    write_record(options.json, {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
