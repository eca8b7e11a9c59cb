"""Tables on installing, training, checkpoints, models and their evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean, median
from typing import Any

from .table import Cells, Table


def extras(record: Any) -> Iterator[Cells]:
    """Yield the number of distributions of each extra and the size of their files."""
    commands = {
        "none": "the library; `import`, `export`, `checkpoints`, `watch`, `inspect --json`, `submit`",
        "prepare": "`prepare`",
        "order": "`order`",
        "train": "`train`, `evaluate`, `plan`, `topology`",
        "report": "`report`, `inspect`, and pictures of other commands",
        "all": "all of them",
    }
    for row in record["sizes"]:
        name = row["extra"] if row["extra"] == "none" else f"`{row['extra']}`"
        yield name, commands[row["extra"]], f"{row['distributions']}", f"{row['megabytes']:,.0f}"


def gradient_sums(record: Any) -> Iterator[Cells]:
    """Yield the relative errors of sums of gradients in fp32 and bf16, and the norm of the latter."""
    for row in record["rows"]:
        errors = (f"{100 * row[name]:#.2g}%" for name in ("float32_error", "bfloat16_error"))
        yield (
            f"{row['micro_batches']:,}",
            *(error.replace(".%", "%") for error in errors),
            f"{row['bfloat16_norm']:.3f}",
        )


def start_memory(record: Any) -> Iterator[Cells]:
    """Yield the peaks of a rank that makes a model, by ZeRO stage."""
    of = {(row["ranks"], row["stage"]): row for row in record["rows"]}
    for ranks in sorted({ranks for ranks, _ in of}):
        peaks = [f"{of[ranks, stage]['peak_mb']:,.0f} MB" for stage in range(4)]
        yield f"{ranks}", *peaks, f"{of[ranks, 3]['bytes_per_own_parameter']:.1f} bytes"


def train_step(record: Any) -> Iterator[Cells]:
    """Yield seconds of a step by each member, with their ratio and its memory, by the size of the step."""
    of = {
        (row["parameters"], row["tokens"], row["ranks"], row["member"].removesuffix(", dp")): row
        for row in record["rows"]
    }
    for size in dict.fromkeys(key[:3] for key in of):
        members = ("ours", "transformers", "torch, fused", "torch, foreach", "OLMo-core")
        found = [of[*size, member] for member in members]
        cells = (f"{row['step_s']:.2f} s ({row['step_ratio']:.2f}), {row['peak_mb']:,}" for row in found)
        yield f"{size[0] / 1e6:.0f}M", f"{size[1]:,}", f"{size[2]}", *cells


def needles(record: Any) -> Iterator[Cells]:
    """Yield the scores of two checkpoints at the longest context: the gain of `copy_random`, else the exact matches."""
    names = {
        "copy_random": ", gain in nats a token",
        "needle_single_1": ", a number in noise: exact match",
        "needle_single_2": ", a number in documents",
        "needle_single_3": ", a UUID in documents",
    }
    before, after = ({task["task"]: task for task in row["tasks"] if task["length"] == 2048} for row in record["rows"])
    for name, about in names.items():
        scores = [
            f"{task['exact']:.0%}" if task["gain"] is None else f"{task['gain']:.2f}"
            for task in (before[name], after[name])
        ]
        yield f"`{name}`{about}", f"{after[name]['length']:,}", f"{after[name]['cp']}", *scores


def family_parity(record: Any) -> Iterator[Cells]:
    """Yield relative errors of each model in 1e-7: the largest of its logits, and of its gradients by division."""
    of = {(row["model"], row["division"]): row for row in record["rows"]}
    for model in dict.fromkeys(model for model, _ in of):
        rows = [of[model, division] for division in ("one", "cp2", "cp4", "tp2", "tp2-sp", "zero3", "tp2-sp-cp2-zero3")]
        logits = (max(row[f"logits_{where}"] for row in rows) for where in ("within", "beyond"))
        errors = *logits, *(row["gradients"] for row in rows), rows[0]["transformers"]["gradients"]
        yield model, *(f"{1e7 * error:.1f}" for error in errors)


def weights_memory(record: Any) -> Iterator[Cells]:
    """Yield memory and time of imports, exports and the reading of a rank, by the size of the model."""
    for row in record["rows"]:
        costs = [f"{row[f'{part}_mb']:,.0f} MB, {row[f'{part}_s']:.0f} s" for part in ("import", "export", "rank")]
        yield f"{row['parameters'] / 1e6:,.0f}M", f"{row['largest_matrix_mb']:,.0f} MB", *costs


def checkpoints(record: Any) -> Iterator[Cells]:
    """Yield sizes and milliseconds of a save beside writers that block, by the size of the model."""
    for number, row in enumerate(record):
        sizes = f"{row['bytes'] / 1e6:,.0f} / {row['deepspeed_bytes'] / 1e6:,.0f}"
        waits = [1e3 * row[name] for name in ("stall", "visible", "blocking", "deepspeed", "load")]
        stall, visible, blocking, deepspeed, load = (f"{wait:,.0f}" for wait in waits)
        of_blocking, of_deepspeed = (f"{row[name] / row['stall']:.0f} times" for name in ("blocking", "deepspeed"))
        yield (
            f"{row['parameters'] / 1e6:.1f}M",
            sizes,
            stall,
            f"{row['slower']:.1f} times" + ("" if number else " as long"),
            visible,
            f"{blocking} ({of_blocking}{'' if number else ' the wait'})",
            f"{deepspeed} ({of_deepspeed})",
            load,
        )


def faults(record: Any) -> Iterator[Cells]:
    """Yield what each kind of fault cost: steps, and seconds until the next one."""
    names = {
        "rank killed": "rank killed",
        "SIGTERM to the launcher": "SIGTERM to the launcher",
        "SIGUSR1 to a rank": "SIGUSR1 to a rank",
        "rank stopped (hang)": "rank stopped (12 s until it counts as a hang)",
        "rank stopped for 2 to 7 s": "rank stopped for 2 to 7 s, then continued",
        "launcher killed": "launcher killed",
        "checkpoint: EIO at reading": "checkpoint cannot be read (EIO): a start that has to resume",
        "shard: ESTALE at opening": "shard cannot be opened (ESTALE)",
        "checkpoint: EIO at writing": "checkpoint cannot be written (EIO): the save is dropped",
        "disk full": "disk full",
        "byte of a shard flipped": "one byte of a shard flipped, then made again",
    }
    for fault, name in names.items():
        rows = [row for row in record["rows"] if row["after"] == fault]
        statuses = ", ".join(map(str, rows[0]["statuses"])) or "none"
        steps, seconds = ([row[column] for row in rows] for column in ("lost_steps", "lost_s"))
        lost = f"{mean(steps):.1f}" if any(steps) else "0"
        yield name, statuses, lost, f"{max(steps)}", f"{median(seconds):.0f}", f"{max(seconds):.0f}"


def fit_time(record: Any) -> Iterator[Cells]:
    """Yield predicted and measured times of steps, by division."""
    for row in record["rows"]:
        times = (f"{row[name]:.2f} s" for name in ("predicted_s", "measured_s"))
        yield row["case"], f"{row['ranks']}", f"{row['length']:,}", *times, f"{row['ratio']:.2f}"


def published(record: Any) -> Iterator[Cells]:
    """Yield the predictions beside published figures, with their ratio."""
    for row in record["rows"]:
        sizes = f"{row['gpus']:,}", f"{row['length']:,}", row["unit"]
        digits = ".2f" if row["unit"] == "of one GPU" else ",.0f"
        values = [f"{row[name]:{digits}}" for name in ("published", "predicted")]
        yield row["source"], row["case"], *sizes, *values, f"{row['predicted_over_published']:.2f}"


def growth(record: Any) -> Iterator[Cells]:
    """Yield the CPU seconds, the memory and the wait for data of a rank, by ranks of the run and of a sequence."""
    for row in record["rows"]:
        sizes = f"{row['ranks']}", f"{row['cp']}", f"{row['length']:,}"
        cpu = f"{row['cpu_s']:.2f} s", f"{row['cpu_over_one_rank']:.2f}", f"{row['flops_over_one_rank']:.2f}"
        yield *sizes, *cpu, f"{row['memory_mb']:,} MB", f"{row['data_ms']:.1f} ms"


def phases(record: Any) -> Iterator[Cells]:
    """Yield held-out losses of the longest sequences before and after an extension, also by position."""
    for row in record["rows"][:3]:
        yield row["when"], *(f"{loss:.3f}" for loss in (row["longest"], *row["by_position"].values()))


TABLES = [
    Table("api.md", "| extra | commands |", extras, ("install_2_cores_2026-11-22",)),
    Table("design.md", "| micro-batches | error, float32 |", gradient_sums, ("gradient_dtype_2_cores_2026-11-22",)),
    Table("design.md", "| ranks | ZeRO 0 |", start_memory, ("start_memory_2_cores_2026-11-22",)),
    Table("design.md", "| parameters | tokens | ranks | ours |", train_step, ("train_step_2_cores_2026-11-23",)),
    Table("evaluation.md", "| | tokens | ring | step 100 |", needles, ("needles_2_cores_2026-11-23",)),
    Table("families.md", "| model | logits within |", family_parity, ("family_parity_2_cores_2026-11-22",)),
    Table(
        "families.md", "| parameters | largest matrix, fp32 |", weights_memory, ("weights_memory_2_cores_2026-11-22",)
    ),
    Table("faults.md", "| parameters | MB, ours / DeepSpeed's |", checkpoints, ("checkpoint_2_cores_2026-11-21",)),
    Table("faults.md", "| fault | exit statuses |", faults, ("soak_2_cores_2026-11-22",)),
    Table("fitting.md", "| division | ranks | length |", fit_time, ("fit_time_2_cores_2026-11-23",)),
    Table("fitting.md", "| published by | case | GPUs |", published, ("published_figures_2026-11-23",)),
    Table("many-gpus.md", "| ranks | share a sequence |", growth, ("growth_2_cores_2026-11-23",)),
    Table("phases.md", "| | all | <128 |", phases, ("phases_2_cores_2026-11-22",)),
]
