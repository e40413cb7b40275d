"""Parameters whose values stay in a file: what reads them, and that nothing writes to them."""

import pytest
import torch
from torch import nn

from osscar.base.errors import FileError, ModelError
from osscar.offload.on_disk import OnDisk
from osscar.offload.places import Place, Source, StoredTensor, WeightCache


@pytest.fixture
def parameter(tmp_path):
    values = torch.arange(12, dtype=torch.float32).view(3, 4)
    (tmp_path / "values").write_bytes(b"what is before them " + values.numpy().tobytes())
    stored = StoredTensor(Source(tmp_path / "values"), 20, (3, 4), torch.float32, "w")
    return OnDisk(Place(stored, stored.shape), WeightCache(1 << 40)), values


def test_it_is_a_parameter_to_whoever_asks(parameter):
    on_disk, values = parameter
    assert isinstance(on_disk, torch.nn.Parameter)
    for name in ("shape", "dtype", "device"):
        assert getattr(on_disk, name) == getattr(values, name)
    assert on_disk.cache.read_bytes == 0
    with torch.inference_mode():
        assert torch.equal(on_disk + 1, values + 1)
    assert torch.equal(on_disk @ values.T, values @ values.T)
    with torch.no_grad():
        on_disk.data = values * 2
    assert torch.equal(on_disk + 0, values * 2)
    assert isinstance(on_disk.data, OnDisk)


def test_nothing_writes_to_it_in_place(parameter):
    on_disk, _ = parameter
    for write in (
        lambda: on_disk.mul_(2),
        lambda: on_disk.__setitem__(0, 1.0),
        lambda: torch.add(torch.ones(3, 4), 1, out=on_disk),
        lambda: torch.nn.init.zeros_(on_disk),
    ):
        with torch.no_grad(), pytest.raises(ModelError, match="max_memory"):
            write()


@pytest.mark.parametrize("left", [False, True])
def test_a_write_to_values_that_were_read_or_leave_memory_is_noticed(parameter, left):
    on_disk, _ = parameter
    on_disk.view(-1)[0] = 7.0
    on_disk.cache.ceiling = 1 if left else 1 << 40
    with pytest.raises(ModelError, match="writes to 'w'"):
        on_disk.cache.leave_free(0) if left else on_disk + 1


def test_a_format_that_held_all_values_and_back_is_no_step(parameter):
    on_disk, values = parameter
    assert on_disk.double().float().place == on_disk.place
    some = on_disk.double().index_select(1, torch.tensor([0, 2])).float()
    assert len(some.place.steps) == 1
    assert torch.equal(some + 0, values[:, [0, 2]])
    assert on_disk.half().float().place.steps == (torch.float16, torch.float32)


def test_looking_tokens_up_reads_their_rows_alone(parameter, tmp_path):
    on_disk, values = parameter
    tokens = torch.tensor([[2, 0], [2, 2]])
    assert torch.equal(nn.functional.embedding(tokens, on_disk), values[tokens])
    assert torch.equal(nn.functional.embedding(tokens, on_disk.double()), values[tokens].double())
    assert (on_disk.cache.read_bytes, on_disk.cache.resident_bytes) == (2 * 2 * 16, 0)
    narrow = on_disk.index_select(1, torch.tensor([1, 3]))
    assert torch.equal(nn.functional.embedding(tokens, narrow), values[:, [1, 3]][tokens])
    for missing in (3, -1):
        with pytest.raises(IndexError):
            nn.functional.embedding(tokens + missing, on_disk)
    with (tmp_path / "values").open("r+b") as file:
        file.write(b"\1")
    on_disk.cache.ceiling = 1
    with on_disk.cache.leaving(0), pytest.raises(FileError, match="it was written to"):
        nn.functional.embedding(tokens, on_disk)
