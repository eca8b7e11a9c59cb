"""Hooks of mkdocs: pages from anywhere in the repository, and the sources to which they link."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from markdown import Extension, Markdown
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
SOURCE_LINK = re.compile(r"(\]\((?!\w+:)[^)#\s]+\.(?:py|toml|sbatch))\)")
FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
ITEM = re.compile(r"^((?!- |\d+\. ).*\S\n)(?=- |\d+\. )", re.MULTILINE)
LANGUAGES = {".py": "python", ".toml": "toml", ".sbatch": "bash"}


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
    patterns = ("*.md", "docs/*.md", "docs/**/*.png", "docs/site/*.css", "docs/site/*.js")
    names = [path for pattern in patterns for path in ROOT.glob(pattern)]
    names += [ROOT / "slurm" / "README.md", ROOT / "benchmarks" / "README.md"]
    pages = Files([_file(path.relative_to(ROOT), config) for path in sorted(names)])
    for page in list(pages.documentation_pages()):
        for name in _linked_sources(page):
            if pages.get_file_from_path(f"{name}.md") is None:
                pages.append(File.generated(config, f"{name}.md", content=_source_page(name)))
    for file in files:
        if file.src_dir != config.docs_dir:  # the theme's own
            pages.append(file)
    return pages


def on_page_markdown(markdown: str, **_: object) -> str:
    """Return a page whose links to sources lead to their pages, with the empty line that an item of a list needs."""
    parts = FENCE.split(SOURCE_LINK.sub(r"\1.md)", markdown))
    return "".join(part if number % 2 else ITEM.sub(r"\1\n", part) for number, part in enumerate(parts))


def _file(path: Path, config: MkDocsConfig) -> File:
    return File(path.as_posix(), str(ROOT), config.site_dir, config.use_directory_urls)


def _linked_sources(page: File) -> list[str]:
    folder = Path(page.src_uri).parent
    targets = [found.removeprefix("](") for found in SOURCE_LINK.findall(page.content_string)]
    return [os.path.normpath(folder / target) for target in targets]


def _source_page(name: str) -> str:
    text = (ROOT / name).read_text()
    fence = "`" * 4
    return f"---\nsearch: {{exclude: true}}\n---\n# {name}\n\n{fence}{LANGUAGES[Path(name).suffix]}\n{text}{fence}\n"
