"""``osscar backends``: what can solve a layer, here and now."""

from __future__ import annotations

import dataclasses

from osscar.cli.common import JsonOption, check_json_path, document, out, write_json


def command(json: JsonOption = None) -> None:
    """List every backend: its kind, what it can take, and whether it is available here."""
    import solvers
    from osscar.report.backend_tables import backends_table

    check_json_path(json)
    infos = solvers.backends()
    out.print(backends_table(infos))
    rows = [dataclasses.asdict(info) for info in infos]
    write_json(json, document("backends", 1, {"backends": rows}))
