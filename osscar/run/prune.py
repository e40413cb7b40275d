"""Pruning in one shot, as Algorithm 1 of the paper (Meng et al., OSSCAR, ICML 2024) has it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from torch import nn

from osscar.base.ranks import ALONE, Ranks
from osscar.base.timing import profiled
from osscar.data.loaders import read_once
from osscar.request import PruningRequest, by_keywords
from osscar.run.chain import prepare, prune_prepared
from osscar.run.result import PruningResult
from osscar.run.run_log import RunLog
from osscar.run.target import prune_to_target


def prune_as_asked(
    model: nn.Module,
    calibration: Any,
    request: PruningRequest,
    log: RunLog | None = None,
    ranks: Ranks = ALONE,
    tell: Callable[[str], None] = lambda line: None,
) -> PruningResult:
    """Prune a model in one shot; the given model is not changed.

    Autocast, a default device and inference mode of the caller do not count.

    Parameters
    ----------
    model
        A language model that takes ``input_ids``, or any model whose inputs are tensors.  What is
        compiled is pruned as it was before; the smaller model is not compiled.
    calibration
        Token windows, (samples, seqlen) int64, or a `CalibrationSet`; an `ImageSet`; a tensor, or a
        mapping of tensors by argument name, whose first dimension is the sample; a `SampleList`
        where it is not, as of graphs; or a pair (inputs, labels), a loader, a data set or a list of
        batches, which are read as by `osscar.load_batches`, with a warning that tells what was left
        out.
    request
        The request, whose fields `osscar.prune` takes as keywords.
    log
        Keeps what is committed, so that a run which was killed goes on where it stopped; of several
        ranks, the first has it.
    ranks
        The processes that run the same request, and share out the work.
    tell
        Prints a line.

    Returns
    -------
    PruningResult
        The smaller model, and a report for each layer.

    Raises
    ------
    RequestError
        If what to keep makes no sense for this model, or no model that was tried is within a target
        of quality.
    NonFiniteError
        If weights or activations are not finite.
    DataError
        If the model cannot read the calibration data, its batches do not run alike, or a target of
        quality takes more samples, or labels.
    ModelError
        If it has no weights, cannot be copied, or a consumer cannot be refitted.
    graph.GraphError
        If the model cannot be traced.
    EquivalenceError
        If the shrunk model does not compute what the masked one computes, or no group can follow.
    JournalError
        If the log is not of this model and request.
    RanksError
        If another rank fails, or is asked for something else.

    Examples
    --------
    >>> import osscar
    >>> loaded = osscar.load_model("demo")
    >>> calibration = loaded.calibration(samples=4, seqlen=64)
    >>> result = osscar.prune(loaded.model, calibration, sparsity=0.5)
    >>> result.parameters_after < result.parameters_before
    True
    """
    if request.quality is not None:
        return prune_to_target(model, calibration, request, log, ranks, tell)[0]
    start = time.perf_counter()
    calibration = read_once(model, calibration)
    with (
        profiled() as spent,
        prepare(model, calibration, request, log=log, ranks=ranks, tell=tell) as prepared,
    ):
        result = prune_prepared(prepared, request, copy=False)
    seconds = time.perf_counter() - start
    return dataclasses.replace(result, seconds=seconds, stages=spent.of(seconds))


prune = by_keywords(PruningRequest, prune_as_asked)
