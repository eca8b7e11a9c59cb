"""The picture of a run: loss over tokens, with the bucket and the context-parallel degree of every step."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")  # pictures go to files, no display is needed
import matplotlib.pyplot as plt
import numpy as np

from ..records import read_records
from ..run_directory import RunDirectory


def resume_steps(run: RunDirectory) -> list[int]:
    """Return the steps after which the run was resumed, ascending."""
    return sorted({start["from_step"] for start in read_records(run.starts_file) if start.get("from_step", 0) > 0})


def draw_run(run: RunDirectory, evaluation: dict[str, Any] | None) -> None:
    """Draw the metrics of a run, with its evaluation if there is one, into its picture file."""
    steps = read_records(run.metrics_file)
    tokens, loss, bucket, degree = (
        np.array([np.nan if step[key] is None else step[key] for step in steps])  # [steps] each
        for key in ("tokens", "loss", "bucket", "cp")
    )
    tokens_at = {step["step"]: step["tokens"] for step in steps}
    figure, (above, below) = plt.subplots(
        2, 1, sharex=True, figsize=(10, 6.5), height_ratios=(3, 1.4), layout="constrained"
    )
    colours = dict(zip(sorted(set(degree)), plt.cm.viridis(np.linspace(0.1, 0.85, len(set(degree)))), strict=True))
    # One colour for each context-parallel degree, over a grey line of all steps.
    above.plot(tokens, loss, color="0.8", linewidth=1, zorder=1)
    for cp, colour in colours.items():
        chosen = degree == cp
        name = "one rank" if cp == 1 else f"{cp} ranks"
        above.scatter(tokens[chosen], loss[chosen], s=14, color=colour, label=name, zorder=2)
        below.scatter(tokens[chosen], bucket[chosen], s=14, marker="s", color=colour)
    if evaluation is not None:
        above.axhline(evaluation["unigram_loss"], color="tab:red", linestyle="--", label="unigram baseline, held out")
        above.axhline(evaluation["loss"], color="tab:red", label=f"held out at step {evaluation['step']}")
    # A run that went back and is not there again has no metrics of the later steps.
    for number, step in enumerate(step for step in resume_steps(run) if step in tokens_at):
        for axes in (above, below):
            # The legend names all of these lines once.
            label = "stopped and resumed" if axes is above and number == 0 else None
            axes.axvline(tokens_at[step], color="black", linestyle=":", label=label)
    above.set_ylabel("loss, nats per token")
    above.legend(loc="upper right", fontsize="small")
    above.set_title(str(run.path))
    below.set_yscale("log", base=2)
    below.set_yticks(sorted(set(bucket)), labels=[f"{length:,}" for length in sorted(set(bucket))])
    below.set_ylabel("bucket, tokens")
    below.set_xlabel("tokens trained")
    below.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    figure.savefig(run.picture_file, dpi=120)
    plt.close(figure)
