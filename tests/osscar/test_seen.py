"""What a model has seen is recognized in whole and in part, and nothing else is."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

import osscar
from osscar.base.errors import DataError
from osscar.models.names import DEMO_DIRECTORY
from osscar.proof.seen import Calibration, Seen, fingerprints_of_runs, refuse_overlap
from tests.osscar.families import CALIBRATION, HELD_OUT

TEXT, OTHER = CALIBRATION.read_text(), HELD_OUT.read_text()


def test_a_text_that_was_seen_is_refused_and_so_is_a_part_of_it():
    tokenizer = AutoTokenizer.from_pretrained(DEMO_DIRECTORY)
    windows = osscar.load_calibration([TEXT], tokenizer, samples=2, seqlen=64, seed=0)
    seen = [Calibration.of(windows.describe())]  # of which all of the text is taken for seen

    def overlap(text):
        refuse_overlap(osscar.load_text([text], tokenizer), seen)

    for text in (
        *(TEXT, TEXT[:-1], TEXT[1:], TEXT[20_000:21_000]),
        "\n\n".join(reversed(TEXT.split("\n\n"))),
        OTHER[:20_000] + TEXT[20_000:21_000],
    ):
        with pytest.raises(
            DataError, match=r"^about \S+% of a list was used to calibrate or recover"
        ):
            overlap(text)
    with pytest.warns(
        UserWarning, match=r"about 0\.\d+% of a list was used to calibrate or recover"
    ):
        overlap(OTHER + TEXT[20_000:20_600])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        overlap(OTHER)


def test_tokens_of_which_no_text_is_known_are_recognized_by_their_runs():
    tokens = torch.randint(50_000, (1000,), generator=torch.Generator().manual_seed(0))
    windows = osscar.CalibrationSet(tokens[:640].view(10, 64), "x", None)
    seen = Calibration.of(windows.describe()).seen
    for part, share in ((tokens[:64], 1.0), (tokens[64:160], 34 / 65), (tokens[640:999], 0.0)):
        assert seen.share(fingerprints_of_runs(part)) == pytest.approx(share)


def in_folder(place, ending, pixels):
    place.mkdir(parents=True)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(place / f"{index}.{ending}")
    return place


def in_archive(place, pixels):
    place.parent.mkdir(parents=True, exist_ok=True)
    np.savez(place, images=pixels)
    return place


SOURCES = {
    **{end: partial(in_folder, ending=end) for end in ("png", "bmp", "tiff", "ppm")},
    "npz": lambda place, pixels: in_archive(place.with_suffix(".npz"), pixels),
    "list": lambda _, pixels: [Image.fromarray(one) for one in pixels],
    "pairs": lambda _, pixels: [(Image.fromarray(one), 0) for one in pixels],
}


@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize(
    ("trained", "tested"),
    [("png", "npz"), ("npz", "png"), ("bmp", "tiff"), ("ppm", "list"), ("pairs", "png")],
)
def test_images_are_recognized_by_their_pixels_wherever_they_lie(trained, tested, gray, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 8, 6, 3), dtype=np.uint8)
    pixels = pixels[..., 0] if gray else pixels
    how = osscar.Preprocessing(crop=6, mean=0.5, std=0.2, channels=1 if gray else 3)

    def found(source, name, images):
        return osscar.load_images(SOURCES[source](tmp_path / name, pixels=images), how)

    seen = [Calibration.of(found(trained, "train", pixels[:12]).describe())]
    with pytest.raises(DataError, match=r"^about 50% of .* was used to calibrate or recover"):
        refuse_overlap(found(tested, "both", pixels[6:18]), seen)
    other_shape = pixels[:12].reshape(12, 6, 8, *pixels.shape[3:])  # of the same bytes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refuse_overlap(found(tested, "others", pixels[12:]), seen)
        refuse_overlap(found(tested, "shape", other_shape), seen)


def test_a_photograph_is_the_pixels_that_are_decoded_of_it(tmp_path):
    smooth = np.linspace(0, 255, 4 * 16 * 16 * 3).reshape(4, 16, 16, 3).astype(np.uint8)
    how = osscar.Preprocessing(crop=16, mean=0.5, std=0.2, channels=3)
    photographs = osscar.load_images(in_folder(tmp_path / "jpg", "jpg", smooth), how)
    decoded = np.stack([np.asarray(photographs.decoded(at)) for at in range(4)])
    archive = osscar.load_images(in_archive(tmp_path / "decoded.npz", decoded), how)
    assert archive.fingerprints() == photographs.fingerprints()
    assert len({*archive.fingerprints()}) == 4


def test_samples_that_run_alone_are_those_of_a_batch():
    rows = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    alone = osscar.SampleList("alone", [{"x": row[None]} for row in rows[:3]])
    seen = [Calibration.of(alone.describe())]
    with pytest.raises(DataError, match="about 50% of together"):
        refuse_overlap(osscar.TensorSet("together", {"x": rows}), seen)


@pytest.mark.parametrize("share", [0.01, 0.3])
def test_the_share_of_a_large_set_is_estimated_on_a_small_record(share):
    """Within four standard deviations of what so many draws tell."""
    draw = np.random.default_rng(0)
    known, others = (draw.integers(2**63, size=size).astype(np.uint64) for size in (200_000, 10**5))
    known *= np.uint64(2)  # even, and the others odd
    others = others * np.uint64(2) + np.uint64(1)
    mine = np.concatenate([known[: int(share * 10**5)], others[int(share * 10**5) :]])
    seen = Seen.of(known)
    assert seen.count == 200_000
    assert len(seen.least) == 4096 * 16
    drawn = 10**5 * 4096 / 200_000
    assert abs(seen.share(mine) - share) <= 4 * (share * (1 - share) / drawn) ** 0.5
    assert Seen.of(mine).share(mine) == 1.0
