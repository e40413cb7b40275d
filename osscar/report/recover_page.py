"""The page of ``osscar recover``, made of its JSON document alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from osscar.report.page import Settings, loading, render
from osscar.report.recovery import recovery_section, recovery_settings
from osscar.report.tables import divergence_in_words


def recover_page(document: Mapping[str, Any], directory: str = "recovered") -> str:
    """Return the page of a recovery.

    Parameters
    ----------
    document
        An ``osscar.recover/1``, as ``docs/json.md`` describes it, such as ``osscar_report.json``.
    directory
        The name of the directory that holds the model.
    """
    computed = {f"computed: {key}": value for key, value in document["computed"].items()}
    asked = {"model": document["model"], "dense": document["dense"]}
    made = recovery_settings(document["recovery"])
    return render(
        "recover.html.j2",
        document=document,
        loaded=loading(document, directory, document["recovery"]["data"]),
        recovery=recovery_section(document["recovery"]),
        meaning=_meaning(document["recovery"]),
        settings=Settings(asked) | made | Settings(known=computed),
    )


def _meaning(recovery: Mapping[str, Any]) -> str:
    """Say what the distance that is left comes to; nothing where it is no divergence."""
    if recovery["measure"] != "nats":
        return ""
    what = "token" if "seqlen" in recovery["data"] else "class"
    return divergence_in_words(recovery["after"], what)
