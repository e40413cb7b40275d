"""The one rule by which samples are divided: shuffled by the seed, copies together."""

import numpy as np
import pytest
import torch
from torch import nn

import osscar
from osscar.base.errors import DataError
from osscar.data.batches import ModelInputs
from osscar.data.parts import copies, held_out, shuffled
from osscar.data.reader import Reader
from osscar.recovery.samples import split
from tests.osscar.networks import images, plain, small_net

READER = Reader.of(nn.Linear(1, 1))


def numbered(values, **more):
    return ModelInputs(READER, {"x": torch.as_tensor(values)[:, None].float()}, **more)


def read(inputs):
    """Return what is read of numbered samples, in order."""
    return [int(x) for batch in inputs.batches(3) for x in batch["x"]]


def test_the_seed_alone_orders_samples_and_nothing_is_copied():
    inputs = numbered(range(40))
    found = shuffled(inputs, 0)
    assert sorted(read(found)) == list(range(40))
    assert read(found) == read(shuffled(numbered(range(40)), 0)) != list(range(40))
    assert read(found) != read(shuffled(inputs, 1))
    assert found.tensors is inputs.tensors
    assert read(found.part(-8)) == read(found)[-8:]
    assert read(found.part(4, 32).part(0, 3)) == read(found)[4:7]
    apart = ModelInputs(
        READER, {}, apart=tuple({"x": torch.full((n, 1), float(n))} for n in range(1, 9))
    )
    lengths = [len(one["x"]) for one in shuffled(apart, 0).batches(1)]
    assert sorted(lengths) == list(range(1, 9)) != lengths


def test_copies_are_adjacent_and_no_division_cuts_them():
    for values in (np.arange(64) % 8, np.repeat(np.arange(9), [1, 2, 3, 4, 5, 6, 7, 8, 9])):
        found = shuffled(numbered(values), 3)
        seen = read(found)
        changes = sum(a != b for a, b in zip(seen[1:], seen, strict=False))
        assert changes + 1 == len(set(values))
        for asked in (4, 8, 15):
            last = found.last(asked)
            assert 0 < last <= 2 * asked
            if last != asked or len(values) == 64:
                assert not set(seen[-last:]) & set(seen[:-last])
    assert shuffled(numbered(np.zeros(8)), 0).last(2) == 2  # all of them are one sample
    assert shuffled(numbered(np.arange(8)), 0).last(2) == 2


def test_one_sample_in_eight_is_held_out_and_none_of_a_few():
    assert [held_out(count) for count in (3, 4, 15, 16, 64)] == [0, 1, 1, 2, 8]
    assert held_out(64, most=4) == 4


@pytest.mark.parametrize("copied", [9, 30, 57, 60])
def test_a_sample_of_many_copies_is_never_held_out_from_itself(copied):
    """As of empty rows, which may be most of all."""
    values = np.concatenate([np.zeros(copied), np.arange(1, 65 - copied)])
    for seed in range(20):
        found = shuffled(numbered(values), seed)
        seen = read(found)
        for asked in (1, 8, 16):
            last = found.last(asked)
            assert last
            assert not set(seen[-last:]) & set(seen[:-last])
        for held in (None, 3, 8):
            request = osscar.RecoveryRequest(seed=seed, held_out=held)
            training, apart = split(numbered(values), request)
            assert not {float(x["x"]) for x in training} & {float(x["x"]) for x in apart}


def test_groups_of_samples_join_what_digests_do_not():
    groups = torch.tensor([0, 1, 2, 0, 3, 3])
    found = copies(numbered([10, 11, 12, 13, 14, 12], sample_groups=groups))
    assert found[0] == found[3]
    assert found[2] == found[4] == found[5]  # a copy of a member is one too
    assert len(found.unique()) == 3


def test_windows_that_overlap_keep_their_order_and_others_do_not():
    text = torch.arange(4000)

    def windows(step):
        starts = range(0, 20 * step, step)
        return ModelInputs(
            READER, {"input_ids": torch.stack([text[s : s + 64] for s in starts])}, True
        )

    for step, different in ((64, 20), (30, 1), (60, 20)):
        inputs = windows(step)
        assert len(copies(inputs).unique()) == different
        kept = torch.equal(shuffled(inputs, 0).positions, torch.arange(20))
        assert kept == (different == 1)


def test_groups_stay_with_their_samples(tmp_path):
    groups = torch.arange(12) // 3
    tensors = {"x": images(12)}
    np.savez(tmp_path / "data.npz", x=tensors["x"], sample_groups=groups)
    found = osscar.load_tensors(tmp_path / "data.npz", small_net())
    drawn = found.sample(5, 0)
    assert torch.equal(found.sample_groups, groups)
    for x, group in zip(drawn.tensors["x"], drawn.sample_groups, strict=True):
        at = next(at for at, one in enumerate(tensors["x"]) if torch.equal(x, one))
        assert group == groups[at]
    read_back = osscar.load_batches(tensors, small_net(), samples=7, sample_groups=groups)
    assert torch.equal(read_back.sample_groups, groups[:7])
    pixels = np.random.default_rng(0).integers(0, 255, (12, 12, 12, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, sample_groups=groups)
    steps = plain(12)
    assert torch.equal(osscar.load_images(tmp_path / "images.npz", steps).sample_groups, groups)
    given = osscar.load_images(tmp_path / "images.npz", steps, sample_groups=range(12))
    assert torch.equal(given.sample_groups, torch.arange(12))
    with pytest.raises(DataError, match="sample_groups must be 12 whole numbers"):
        osscar.TensorSet("images", tensors, sample_groups=groups[:5])


@pytest.mark.parametrize("groups", [["a"] * 12, [[0, 1], [2]], [0.5] * 12, [0] * 5])
def test_groups_are_a_whole_number_a_sample(groups):
    with pytest.raises(DataError, match="sample_groups must be 12 whole numbers"):
        osscar.load_batches({"x": images(12)}, small_net(), sample_groups=groups)
