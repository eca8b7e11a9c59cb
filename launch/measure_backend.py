"""One attention backend, measured in a process of its own, which loads little else: `attention_backends` starts it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import torch

from ..data.processes import end_with_parent
from ..kernels.choose import Question, Sample, measure
from ..kernels.layout import SeqLayout

LINE = "longring timing "
"""Beginning of the lines with results; packages may print others, and lines without an end."""


def question_json(question: Question) -> str:
    """Return a question as text for another process."""
    samples = [
        [b, *([side.runs, side.document_starts] for side in (queries, keys)), window, tasks]
        for b, queries, keys, window, tasks in question.samples
    ]
    dtype = str(question.dtype).removeprefix("torch.")
    return json.dumps([*question[:3], dtype, samples])


def question_from(text: str) -> Question:
    """Return the question that `question_json` wrote."""
    heads, kv_heads, head_dim, dtype, samples = json.loads(text)
    found = []
    for b, *sides, window, tasks in samples:
        queries, keys = (SeqLayout(tuple(map(tuple, runs)), tuple(starts)) for runs, starts in sides)
        found.append(Sample(b, queries, keys, window, tuple(tasks)))
    return Question(heads, kv_heads, head_dim, getattr(torch, dtype), tuple(found))


def main(arguments: Sequence[str]) -> int:
    """Measure one backend, as `attention_backends.measured_apart` has asked, and print a line for each timing."""
    parent, question, backend, device = arguments
    end_with_parent(int(parent))
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
    for timing in measure(question_from(question), backend, torch.device(device)):
        print(f"\n{LINE}{json.dumps(timing)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
