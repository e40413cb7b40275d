"""Options of a command in a file: TOML, YAML, or the report of a run, which it repeats."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cyclopts import App, ArgumentCollection
from cyclopts.config import Dict

from osscar.base.errors import OptionError, first_line

_REPORT = "osscar.prune/"


def from_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill in what the file of ``--config`` says and the command line does not."""
    tokens = next((one.tokens for one in arguments if one.name == "--config"), ())
    if tokens:
        path = Path(tokens[0].value)
        Dict({commands[-1]: _options(path)}, source=str(path))(app, commands[-1:], arguments)


def _options(path: Path) -> dict[str, Any]:
    """Read options by their names on the command line."""
    import yaml  # here, since help needs none

    readers: dict[str, Callable[[str], Any]] = {
        **{".toml": tomllib.loads, ".json": json.loads},
        **{".yaml": yaml.safe_load, ".yml": yaml.safe_load},
    }
    if path.suffix not in readers:
        raise OptionError(f"--config is {str(path)!r}; give a .toml, .yaml or .json file")
    try:
        found = readers[path.suffix](path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise OptionError(f"{path} cannot be read: {reason}") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise OptionError(f"{path} holds no options by name; write lines such as sparsity = 0.3")
    if str(found.get("schema", "")).startswith(_REPORT):
        found = _of_report(found)
    known = {name.replace("_", "-"): value for name, value in found.items()}
    if "config" in known:
        raise OptionError(f"{path} names a further file with config; write all options into one")
    return known


def _of_report(report: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a run that are not empty, and how its samples were drawn."""
    settings, drawn, recovery = report["settings"], report["calibration"], report.get("recovery")
    asked = {**settings, **{name: drawn.get(name) for name in ("samples", "seqlen")}}
    if recovery:
        asked |= {"recover": True, "recover_steps": recovery["settings"]["steps"]}
    options = {n: v for n, v in asked.items() if v not in (None, [], {}) and v is not False}
    if options.pop("groups", None):
        raise OptionError("the run had `groups`, which only Python takes; repeat it from there")
    if given := options.pop("backend_options", None):
        options["option"] = [f"{name}={json.dumps(value)}" for name, value in given.items()]
    return options
