"""Hooks of mkdocs: pages from anywhere in the repository, and what is generated for them.

Generated are the reference of settings and commands, a page for each record of a benchmark, and one for each source to
which a document links.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import longring
from commands_page import commands_markdown
from markdown import Extension, Markdown
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from record_page import record_markdown
from settings_page import settings_markdown

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "benchmarks" / "results"
SOURCE_LINK = re.compile(r"(\]\((?!\w+:)[^)#\s]+\.(?:py|toml|sbatch))\)")
FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
ITEM = re.compile(r"^((?!- |\d+\. ).*\S\n)(?=- |\d+\. )", re.MULTILINE)
RECORD = re.compile(r"`benchmarks/results/([\w.-]+\.json)`")
CELL_CODE = re.compile(r"(?<=<code>)[^<]*/[^<]*(?=</code>(?:(?!<td).)*?</td>)", re.DOTALL)
LANGUAGES = {".py": "python", ".toml": "toml", ".sbatch": "bash"}


def library_markdown() -> str:
    """Return a mark for each public name, which mkdocstrings replaces by its docstring."""
    return "\n\n".join(f"::: longring.{name}" for name in longring.__all__ if not name.startswith("_"))


GENERATED = {
    "<!-- settings -->": settings_markdown,
    "<!-- commands -->": commands_markdown,
    "<!-- library -->": library_markdown,
}
"""Text for each mark that a document leaves for it."""


class TwoSpaces(Extension):
    """Two spaces continue an item of a list, as on GitHub; Python-Markdown wants four."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        """Parse with a tab of two spaces. Must come before extensions that change the parser."""
        md.tab_length = 2
        md.build_parser()


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Return the configuration with the extension above."""
    extensions: list[Any] = config.markdown_extensions
    extensions.insert(0, TwoSpaces())
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Return the files of the site, by their paths in the repository, so that a link works in both alike."""
    patterns = ("*.md", "docs/**/*.md", "docs/**/*.png", "docs/**/*.svg", "docs/site/*.css", "docs/site/*.js")
    names = [path for pattern in patterns for path in ROOT.glob(pattern)]
    names += [ROOT / "slurm" / "README.md", ROOT / "benchmarks" / "README.md"]
    pages = Files([_file(path.relative_to(ROOT), config) for path in sorted(names)])
    sources = {name: _source_page for page in pages.documentation_pages() for name in _linked_sources(page)}
    records = {path.relative_to(ROOT).as_posix(): _record_page for path in RECORDS.glob("*.json")}
    for name, make in (sources | records).items():
        pages.append(File.generated(config, f"{name}.md", content=f"---\nsearch: {{exclude: true}}\n---\n{make(name)}"))
    for file in files:
        if file.src_dir != config.docs_dir:  # the theme's own
            pages.append(file)
    return pages


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Return a page with what is generated for it, links to the pages of sources and records, and lists as they are."""
    for mark, make in GENERATED.items():
        markdown = markdown.replace(mark, make()) if mark in markdown else markdown
    records = os.path.relpath("benchmarks/results", Path(page.file.src_uri).parent)
    parts = FENCE.split(SOURCE_LINK.sub(r"\1.md)", markdown))
    texts = [RECORD.sub(rf"[`\1`]({records}/\1.md)", ITEM.sub(r"\1\n", part)) for part in parts[::2]]
    fences = [*parts[1::2], ""]
    return "".join(text + fence for text, fence in zip(texts, fences, strict=True))


def on_page_content(html: str, **_: object) -> str:
    """Return a page whose paths in tables may break after a slash, so that they leave room for the other columns."""
    return CELL_CODE.sub(lambda path: path[0].replace("/", "/<wbr>"), html)


def _file(path: Path, config: MkDocsConfig) -> File:
    return File(path.as_posix(), str(ROOT), config.site_dir, config.use_directory_urls)


def _linked_sources(page: File) -> list[str]:
    folder = Path(page.src_uri).parent
    targets = [found.removeprefix("](") for found in SOURCE_LINK.findall(page.content_string)]
    return [os.path.normpath(folder / target) for target in targets]


def _source_page(name: str) -> str:
    fence = "`" * 4
    return f"# {name}\n\n{fence}{LANGUAGES[Path(name).suffix]}\n{(ROOT / name).read_text()}{fence}\n"


def _record_page(name: str) -> str:
    return record_markdown(ROOT / name)
