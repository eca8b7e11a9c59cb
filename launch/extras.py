"""The extras of the package, and the one that installs a library which a command or a public name lacks."""

from __future__ import annotations

MODULES = {
    "prepare": ("aiohttp", "datasets", "fsspec", "pyarrow", "zstandard"),
    "order": ("faiss", "scipy", "sentence_transformers", "sklearn", "threadpoolctl"),
    "train": ("deepspeed", "liger_kernel", "megatron", "psutil", "tensorboard", "triton"),
    "report": ("jinja2", "markupsafe", "matplotlib"),
}
"""Modules of each extra of pyproject.toml."""


def advice(error: ModuleNotFoundError) -> str | None:
    """Return the library that is not installed and the command that installs it, or None if no extra has it."""
    module = (error.name or "").partition(".")[0]
    for extra, modules in MODULES.items():
        if module in modules:
            return f"{module}: is not installed; run pip install 'longring[{extra}]'"
    return None
