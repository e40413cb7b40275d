"""What a model has seen is recognized in whole and in part, and nothing else is."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import osscar
from osscar.base.errors import DataError
from osscar.proof.seen import Calibration, Seen, fingerprints_of_runs, refuse_overlap
from tests.osscar.families import CALIBRATION, HELD_OUT


@pytest.fixture(scope="module")
def tokenizer():
    return osscar.load_model("demo", device="cpu").tokenizer


@pytest.fixture(scope="module")
def seen(tokenizer):
    """Two windows of a text; all of it is taken for seen."""
    text = CALIBRATION.read_text()
    windows = osscar.load_calibration([text], tokenizer, samples=2, seqlen=64, seed=0)
    return [Calibration.of(windows.describe())]


TEXT, OTHER = CALIBRATION.read_text(), HELD_OUT.read_text()


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        TEXT[:-1],
        TEXT[1:],
        TEXT[20_000:21_000],
        "\n\n".join(reversed(TEXT.split("\n\n"))),
        OTHER[:20_000] + TEXT[20_000:21_000],
    ],
    ids=["all", "but its end", "but its beginning", "a part", "other order", "beside other text"],
)
def test_a_text_that_was_seen_is_refused_and_so_is_a_part_of_it(text, tokenizer, seen):
    with pytest.raises(DataError, match=r"^about \S+% of a list calibrated or recovered"):
        refuse_overlap(osscar.load_text([text], tokenizer), seen)


def test_a_little_that_was_seen_is_told_and_nothing_is_passed_over(tokenizer, seen):
    with pytest.warns(UserWarning, match=r"about 0\.\d+% of a list calibrated or recovered"):
        refuse_overlap(osscar.load_text([OTHER + TEXT[20_000:20_600]], tokenizer), seen)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refuse_overlap(osscar.load_text([OTHER], tokenizer), seen)


def test_tokens_of_which_no_text_is_known_are_recognized_by_their_runs(tokenizer):
    tokens = osscar.load_text([TEXT], tokenizer).tokens
    known = Calibration.of(osscar.CalibrationSet(tokens[:640].view(10, 64), "x", None).describe())
    for part, share in ((tokens[:64], 1.0), (tokens[64:160], 34 / 65), (tokens[640:999], 0.0)):
        assert known.seen.share(fingerprints_of_runs(part)) == pytest.approx(share)
    with pytest.raises(DataError, match=r"^about 100% of a list calibrated or"):
        refuse_overlap(osscar.load_text([tokenizer.decode(tokens[:40])], tokenizer), [known])


def test_a_run_is_told_from_every_other():
    tokens = torch.randint(50_000, (400,), generator=torch.Generator().manual_seed(0))
    found = fingerprints_of_runs(tokens)
    assert len(found) == len(np.unique(found)) == 400 - 31
    assert [int(one) for one in found[::50]] == [
        int(fingerprints_of_runs(tokens[at : at + 32])[0]) for at in range(0, 369, 50)
    ]
    swapped = tokens.clone()
    swapped[[100, 101]] = swapped[[101, 100]]
    assert np.flatnonzero(fingerprints_of_runs(swapped) != found).tolist() == [*range(69, 102)]
    assert len(fingerprints_of_runs(tokens[:5])) == 1


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
def test_the_share_of_a_large_set_is_estimated_on_a_small_record(share):
    """Within four standard deviations of what so many draws tell."""
    draw = np.random.default_rng(0)
    known, others = (draw.integers(2**63, size=size).astype(np.uint64) for size in (10**6, 10**5))
    known *= np.uint64(2)  # even, and the others odd
    others = others * np.uint64(2) + np.uint64(1)
    mine = np.concatenate([known[: int(share * 10**5)], others[int(share * 10**5) :]])
    seen = Seen.of(known)
    assert seen.count == 10**6
    assert len(seen.least) == 4096 * 16
    drawn = 10**5 * 4096 / 10**6
    assert abs(seen.share(mine) - share) <= 4 * (share * (1 - share) / drawn) ** 0.5
    assert Seen.of(mine).share(mine) == 1.0
