"""``osscar eval``: what a model is worth, alone or beside its dense original."""

from __future__ import annotations

import dataclasses
import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

from osscar.cli.common import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    TrustOption,
    check_json_path,
    document,
    out,
    quiet,
    write_json,
)

REPORT_FILE = "osscar_report.json"


def command(
    model: Annotated[str, typer.Argument(help="Model id, directory, `demo` or `smollm2-135m`.")],
    text: Annotated[
        str | None, typer.Option(help="Plain text to score; by default the built-in held-out text.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="The dense model, to be measured side by side.")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(help="Score only the first N windows; by default the full text.")
    ] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens in a window.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows scored at once.")] = 4,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    json: JsonOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Measure perplexity, speed, size and memory.

    Perplexity is over non-overlapping windows of the text.  Speed is told apart for reading a
    prompt (prefill) and writing token by token (decode); with --against the models take turns.
    """
    from osscar.data.topics import Part, builtin_text
    from osscar.evaluation import compare, evaluate
    from osscar.models import load_model
    from osscar.report.tables import comparison_table, evaluation_table
    from osscar.text import read_text

    check_json_path(json)
    with quiet():
        content = builtin_text(Part.HELD_OUT) if text is None else read_text(text)
        loaded = load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        refuse_calibration_text(loaded.path, content)
        options: dict[str, Any] = {
            **{"windows": windows, "seqlen": seqlen, "batch_size": batch_size},
            "path": loaded.path,
        }
        if against is None:
            evaluation = evaluate(loaded.model, loaded.tokenizer, content, **options)
            out.print(evaluation_table(evaluation, model))
            result: dict[str, Any] = {"model": dataclasses.asdict(evaluation)}
        else:
            dense = load_model(
                against, device=device, dtype=dtype, trust_remote_code=trust_remote_code
            )
            comparison = compare(
                loaded.model, dense.model, loaded.tokenizer, content,
                **options, dense_path=dense.path,
            )  # fmt: skip
            out.print(comparison_table(comparison, name=Path(model).name))
            evaluation, result = comparison.model, dataclasses.asdict(comparison)
    quality = evaluation.quality
    out.print(
        f"{quality.tokens:,} tokens scored in {quality.windows:,} windows of {quality.seqlen}, "
        f"{evaluation.dtype} on {evaluation.device}"
    )
    names = {"text": text or "builtin", "name": model, "against": against}
    write_json(json, document("eval", 1, {**names, **result}))


def refuse_calibration_text(path: Path | None, text: str) -> None:
    """Refuse to score the text that a model was calibrated on.

    Raises
    ------
    TextError
        If the report beside the model's weights names this text.
    """
    from osscar.errors import TextError
    from osscar.text import text_digest

    report = path / REPORT_FILE if path is not None else None
    if report is None or not report.is_file():
        return
    try:
        calibration = jsonlib.loads(report.read_text(encoding="utf-8"))["calibration"]
        digest, source = calibration["sha256"], calibration["source"]
    except (ValueError, KeyError, TypeError):
        return  # not a report of ours
    if digest == text_digest(text):
        raise TextError(
            f"this model was calibrated on this very text ({source}); score another one"
        )
