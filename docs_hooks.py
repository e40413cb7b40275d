"""What the site makes of code: the page of commands, of their help."""

from __future__ import annotations

import re
from typing import Any

MARK = "<!-- commands -->"


def on_page_markdown(markdown: str, **given: Any) -> str:
    """Put the help of all commands in the place of its mark; mkdocs calls this for each page."""
    return markdown.replace(MARK, help_of_commands()) if MARK in markdown else markdown


def help_of_commands() -> str:
    """Return the help of each command as Markdown, a section for each."""
    from osscar.cli.commands import app

    _, _, text = app.generate_docs(output_format="markdown").partition("\n## osscar demo")
    text = f"## osscar demo{text}".replace("```console", "```")
    return re.sub(r"\n {2}(osscar .*)", r"\n\n    \1\n", text)
