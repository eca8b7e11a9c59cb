"""The picture of prepared data: lengths of documents, tokens by bucket, and the schedule of a run."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is asked for
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from ..format.manifest import Manifest

SCHEDULE_BINS = 100


def draw(manifest: Manifest, chosen: NDArray[np.uint8], file: Path) -> None:
    """Write the picture of the data and of a schedule [steps] over it."""
    figure = plt.figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplot_mosaic([["documents", "buckets"], ["schedule", "schedule"]])
    _draw_documents(axes["documents"], manifest)
    colours = plt.colormaps["viridis"](np.linspace(0.1, 0.9, len(manifest.lengths)))
    names = [f"{length:,}" for length in manifest.lengths]

    tokens = [bucket.tokens for bucket in manifest.buckets("train")]
    axes["buckets"].bar(names, tokens, color=colours)
    axes["buckets"].set_xlabel("bucket, tokens")
    axes["buckets"].set_ylabel("tokens")
    axes["buckets"].set_title("Train split by bucket")
    axes["buckets"].tick_params(axis="x", rotation=45 if len(names) > 6 else 0)

    # Steps of each bucket in equal stretches of the run, as shares: [buckets, bins].
    parts = np.array_split(chosen, min(SCHEDULE_BINS, len(chosen)))
    shares = np.array([np.bincount(part, minlength=len(names)) / len(part) for part in parts]).T
    edges = np.linspace(0, len(chosen), len(parts) + 1)
    below = np.zeros(len(parts))
    for share, colour, name in zip(shares, colours, names, strict=True):
        axes["schedule"].bar(edges[:-1], share, np.diff(edges), below, align="edge", color=colour, label=name)
        below += share
    axes["schedule"].set_xlim(0, len(chosen))
    axes["schedule"].set_ylim(0, 1)
    axes["schedule"].set_xlabel("step")
    axes["schedule"].set_ylabel("share of steps")
    axes["schedule"].set_title("Schedule: bucket of the steps")
    axes["schedule"].legend(title="bucket", loc="center left", bbox_to_anchor=(1, 0.5), reverse=True, fontsize="small")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _draw_documents(axes: Axes, manifest: Manifest) -> None:
    books = list(manifest.ledger.splits.values())
    powers = sorted(set().union(*(split.document_lengths for split in books)))
    powers = list(range(powers[0], powers[-1] + 1))
    documents = np.array([sum(split.document_lengths[power] for split in books) for power in powers])
    tokens = np.array([sum(split.length_tokens[power] for split in books) for power in powers])
    axes.bar(np.array(powers) - 0.2, documents / documents.sum(), 0.4, label="documents", color="0.6")
    axes.bar(np.array(powers) + 0.2, tokens / tokens.sum(), 0.4, label="tokens in them", color="tab:blue")
    axes.set_xticks(powers, labels=[f"$2^{{{power}}}$" for power in powers])
    axes.set_xlabel("tokens of a document, from")
    axes.set_ylabel("share")
    axes.set_title("Documents by length")
    axes.legend(fontsize="small")
