"""What proofs rest on, in the same words wherever they are printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from osscar.study.records import Proof

_WORDS = {
    ("lower_bound",): "the bound is the solver's word",
    ("lower_bound", "status"): "the bound, and the status that rests on it, are the solver's word",
    ("status",): (
        "the status is the solver's word, as rounding could hide an exchange that lowers the loss"
    ),
}


def proofs_in_words(proofs: Iterable[Proof]) -> str:
    """Say how many proofs do not rest on the solver's word."""
    counts = Counter(proofs)
    if counts[Proof.RECOMPUTED] == counts.total():
        return "every proof was recomputed from its problem alone"
    said = [f"{counts[Proof.RECOMPUTED]} of the proofs were recomputed"]
    said += [
        f"{counts[proof]} are {proof}" for proof in (Proof.WORD, Proof.RECORDED) if counts[proof]
    ]
    return ", ".join(said)


def not_recomputed_in_words(names: Sequence[str]) -> str:
    """Say which claims a verification did not recompute (`solvers.Verification`); '' if none."""
    return f"not recomputed: {_WORDS[tuple(names)]}" if names else ""
