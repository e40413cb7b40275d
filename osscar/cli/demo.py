"""``osscar demo``: the main job from end to end on the bundled model, without a network."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from osscar.base.files import write_text
from osscar.base.timing import Stage, timed
from osscar.checkpoint.files import PAGE_FILE, check_output
from osscar.checkpoint.reading import load
from osscar.cli.common import check_json_path, document, out, say, show, write_json
from osscar.cli.opening import quiet, saved_line
from osscar.evaluation.evaluate import compare, comparison_table
from osscar.models.load import load_model
from osscar.models.names import DEMO
from osscar.report.sections import facts
from osscar.run.prune import prune
from osscar.run.prune_page import layers_table, prune_page, run_facts

_SPARSITY = 0.5
_SAMPLES, _SEQLEN = 64, 256


def run(directory: Path | None, overwrite: bool, backend: str, json: Path | None) -> None:
    """Prune the bundled model, and compare it with itself."""
    check_json_path(json)
    with _given_or_temporary(directory) as where:
        path = check_output(where, overwrite=overwrite, inputs=(json,))
        with quiet():
            dense = load_model(DEMO, dtype=torch.float32, device="cpu")
            windows = dense.calibration(samples=_SAMPLES, seqlen=_SEQLEN)
            result = prune(dense.model, windows, sparsity=_SPARSITY, backend=backend, device="cpu")
            report = result.document(dense.model, windows, source=dense.source)
            with timed(Stage.SAVE):
                saved = result.save(
                    path, tokenizer=dense.tokenizer, report=report, overwrite=overwrite
                )
            with timed(Stage.SCORE):
                comparison = compare(
                    load(saved.path, dtype=torch.float32), dense.model,
                    dense.held_out(seqlen=_SEQLEN),
                    path=saved.path, dense_path=dense.path,
                )  # fmt: skip
        evaluation = document("eval", 4, dataclasses.asdict(comparison))
        content = {**report, "evaluation": evaluation}
        write_text(saved.path / PAGE_FILE, prune_page(content, saved.path.name))
    out.print(
        f"pruned the bundled OPT model, with {backend} and {_SAMPLES} x {_SEQLEN} calibration "
        f"tokens"
    )
    show(layers_table(report["layers"]), facts("", run_facts(report)))
    out.print(saved_line(saved, where))
    show(comparison_table(evaluation))
    tokens = comparison.model.quality.tokens
    out.print(f"perplexity is on {tokens:,} tokens of neither training nor calibration text")
    say(f"report: {where / PAGE_FILE}")
    write_json(json, {**content, "saved": str(saved.path)})


@contextmanager
def _given_or_temporary(directory: Path | None) -> Iterator[Path]:
    """Yield where the model goes; a temporary directory stays only if the block succeeds."""
    if directory is not None:
        yield directory
        return
    made = Path(tempfile.mkdtemp(prefix="osscar-demo-"))
    try:
        yield made / "smaller"
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
