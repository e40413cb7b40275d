"""What the site takes from elsewhere: its first page from README, and commands from their help."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def on_page_markdown(markdown: str, **given: Any) -> str:
    """Put in the place of a mark what it names; mkdocs calls this for each page."""
    for mark, text in {"<!-- readme -->": readme, "<!-- commands -->": help_of_commands}.items():
        if mark in markdown:
            markdown = markdown.replace(mark, text())
    return markdown


def readme() -> str:
    """Return README with its links as they are from the first page of the site."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    return text.replace("](docs/", "](")


def help_of_commands() -> str:
    """Return the help of each command as Markdown, a section for each."""
    from osscar.cli.commands import app

    _, _, text = app.generate_docs(output_format="markdown").partition("\n## osscar demo")
    text = f"## osscar demo{text}".replace("```console", "```")
    return re.sub(r"\n {2}(osscar .*)", r"\n\n    \1\n", text)
