"""Weights that are computed at every call: folded where they are cut, left alone elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm
from transformers import DacConfig, DacModel

import osscar
from osscar.proof.plan import PruningPlan
from osscar.shrinking.fold import fold
from tests.zoo import transformers_case

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")

Normalization = Callable[[nn.Module], nn.Module]


class Standardized(nn.Module):
    """A parametrization of one's own: each filter has mean zero, and a length that it learns."""

    def __init__(self, filters: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(filters, 1, 1))

    def forward(self, weight: Tensor) -> Tensor:
        weight = weight - weight.mean((1, 2), keepdim=True)
        return self.scale * weight / weight.norm(dim=(1, 2), keepdim=True)


def standardized(module: nn.Module) -> nn.Module:
    """Register it for the weight of a convolution."""
    parametrize.register_parametrization(module, "weight", Standardized(len(module.weight)))
    return module


NORMALIZATIONS: dict[str, Normalization] = {
    "weight_norm": weight_norm,
    "weight_norm as a parametrization": parametrizations.weight_norm,
    "weight_norm over the last dimension": lambda m: parametrizations.weight_norm(m, dim=2),
    "weight_norm of the whole": lambda m: weight_norm(m, dim=None),
    "spectral_norm": spectral_norm,
    "spectral_norm as a parametrization": parametrizations.spectral_norm,
    "a parametrization of one's own": standardized,
}


class Causal(nn.Module):
    """Two dilated convolutions that see the past, beside a residual connection."""

    def __init__(self, normalized: Normalization, enter: int, leave: int, dilation: int) -> None:
        super().__init__()
        self.past = 2 * dilation
        self.one = normalized(nn.Conv1d(enter, leave, 3, padding=self.past, dilation=dilation))
        self.two = normalized(nn.Conv1d(leave, leave, 3, padding=self.past, dilation=dilation))
        self.skip = nn.Conv1d(enter, leave, 1) if enter != leave else None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.one(x)[..., : -self.past])
        y = torch.relu(self.two(y)[..., : -self.past])
        return torch.relu(y + (x if self.skip is None else self.skip(x)))


class TCN(nn.Module):
    """A temporal convolutional network as Bai, Kolter and Koltun write it (arXiv 1803.01271)."""

    def __init__(self, normalized: Normalization) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            Causal(normalized, 3, 8, 1), Causal(normalized, 8, 8, 2), Causal(normalized, 8, 8, 4)
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x)[..., -1])


def tcn(name: str = "weight_norm", seed: int = 0) -> TCN:
    """Return a network whose weights are not as long as at the start."""
    torch.manual_seed(seed)
    model = TCN(NORMALIZATIONS[name])
    for weight in model.parameters():
        weight.data *= 1 + 0.3 * torch.rand_like(weight)
    model.train()
    with torch.no_grad():
        model(series())  # spectral normalization learns its directions
    return model.eval()


def series(count: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(count, 3, 20, generator=generator)


def plain(model: TCN) -> TCN:
    """Return a network that has never been normalized, with the weights that a model computes."""
    found = TCN(lambda module: module).to(model.head.weight.dtype)
    with torch.no_grad():
        model(
            series().to(model.head.weight.dtype)
        )  # old forms compute a weight when they are called
        for name, tensor in found.named_parameters():
            path, _, attribute = name.rpartition(".")
            tensor.copy_(getattr(model.get_submodule(path), attribute))
    return found.eval()


def masked(model: TCN, plan: PruningPlan) -> TCN:
    """Return a copy in float64 without what reads the removed units."""
    found = plain(copy.deepcopy(model).double())
    for group in plan.groups:
        gone = sorted(set(range(group.units)) - set(group.kept))
        for slot in group.consumers:
            weight = found.get_parameter(slot.tensor).data
            weight.index_fill_(slot.dim, torch.tensor(slot.indices(gone)), 0.0)
    return found


FOLDED = tuple(f"blocks.{block}.{layer}.weight" for block in range(3) for layer in ("one", "two"))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_all_channels_are_pruned_and_the_model_keeps_its_normalization(name: str) -> None:
    model = tcn(name)
    before, x = copy.deepcopy(model.state_dict()), series()
    with torch.no_grad():
        dense = model(x)
    keep = {"channels": 0.5, "residual": 0.5, "backend": "magnitude", "device": "cpu"}
    result = osscar.prune(model, x, **keep)
    assert [layer.units for layer in result.layers] == [8] * 4  # three inside, and the stream
    small = result.model.state_dict()
    assert small["blocks.1.two.weight"].shape == (4, 4, 3)
    assert small["head.weight"].shape == (2, 4)
    assert {key.rpartition(".")[2] for key in small} == {"weight", "bias"}
    assert result.folded == FOLDED
    assert "6 weights that the dense model computes at every call" in result.summary()
    # What came in is what it was, its class included.
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(map(torch.equal, after.values(), before.values()))
    with torch.no_grad():
        assert torch.equal(model(x), dense)
    # A plan for plain weights shrinks another such model, as masking it does.
    model, x = tcn(name, seed=3), x.double()
    with torch.no_grad():
        expected = masked(model, result.plan)(x)
        osscar.shrink(model.double(), result.plan, [(x,)])
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    assert type(model.blocks[0].one) is nn.Conv1d


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_a_pruned_model_is_read_again(name: str, tmp_path: Path) -> None:
    model, x = tcn(name), series()
    plainly = {"backend": "magnitude", "device": "cpu"}
    for place, keep in (
        ("all", {"channels": 0.5}),
        ("one", {"groups": {"blocks.1.one.channels": 3}}),
    ):
        result = osscar.prune(model, x, **keep, **plainly)
        path = result.save(tmp_path / place).path
        for dense in (tcn(name, seed=5), plain(tcn(name, seed=6))):
            kinds = [type(module) for module in dense.modules()]
            again = osscar.load(path, dense=dense)
            assert [type(module) for module in dense.modules()] == kinds
            with torch.no_grad():
                torch.testing.assert_close(again(x), result.model(x))
    # And once more: what was read is pruned and saved as any other model.
    twice = osscar.prune(again, x, groups={"blocks.0.one.channels": 2}, **plainly)
    twice.save(tmp_path / "smaller")
    again = osscar.load(tmp_path / "smaller", dense=tcn(name, seed=7))
    with torch.no_grad():
        torch.testing.assert_close(again(x), twice.model(x))


def test_a_class_that_normalizes_by_itself_reads_what_was_pruned(tmp_path: Path) -> None:
    case = transformers_case("wav2vec2")
    model, (inputs, others) = case.build(), case.make_inputs()
    result = osscar.prune(model, inputs, neurons=0.5, device="cpu")
    name = "wav2vec2.encoder.pos_conv_embed.conv"
    for one in (model, result.model):
        assert parametrize.is_parametrized(one.get_submodule(name), "weight")
    assert result.save(tmp_path / "small").stock
    stock = type(model).from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        expected = result.model(**others).logits
        for again in (osscar.load(tmp_path / "small"), stock):
            torch.testing.assert_close(again(**others).logits, expected)


@pytest.mark.slow
def test_a_codec_with_normalization_is_pruned_saved_and_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = DacConfig(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 2],
        decoder_hidden_size=16,
        n_codebooks=2,
        codebook_size=16,
        codebook_dim=4,
    )
    model, x = DacModel(config).eval(), torch.randn(8, 1, 64)
    model.apply_weight_norm()
    keep = {"encoder.block.0.res_unit1.conv1.channels": 4}
    result = osscar.prune(model, {"input_values": x}, groups=keep, device="cpu")
    result.save(tmp_path / "small")
    with torch.no_grad():
        torch.testing.assert_close(
            osscar.load(tmp_path / "small")(x).audio_values, result.model(x).audio_values
        )


class Reader(nn.Module):
    """Code that reads what a weight is computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = weight_norm(nn.Linear(4, 6)), weight_norm(nn.Linear(6, 6))
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.leave(torch.relu(self.enter(x))) * self.leave.weight_g.mT
        return self.down(torch.relu(self.up(y)))


def test_code_that_reads_the_parts_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    model = Reader().eval()
    result = osscar.prune(model, torch.randn(32, 4), neurons=0.5, device="cpu")
    assert result.model.down.in_features == 4
    assert result.folded == ()
    assert "leave.weight_g" in result.model.state_dict()


def test_shared_parts_and_other_tensors_stay() -> None:
    one, two = (weight_norm(nn.Linear(4, 4)) for _ in range(2))
    two._parameters["weight_v"] = one.weight_v
    three = parametrizations.weight_norm(nn.Linear(4, 4), "bias", 0)
    four = parametrizations.weight_norm(parametrizations.weight_norm(nn.Linear(4, 4)), "bias", 0)
    five = weight_norm(nn.Linear(4, 4), "bias")
    model = nn.Sequential(one, two, three, four, five)
    before = list(model.state_dict())
    assert fold(model) == []
    assert list(model.state_dict()) == before


def test_a_weight_is_folded_as_it_is_in_evaluation_mode() -> None:
    layer = parametrizations.spectral_norm(nn.Linear(4, 6)).train()
    before, due = copy.deepcopy(layer.state_dict()), copy.deepcopy(layer).eval().weight
    (folded,) = fold(layer)
    assert torch.equal(layer.weight, due)
    folded.undo()
    assert all(torch.equal(one, before[name]) for name, one in layer.state_dict().items())


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_folding_is_undone_without_a_trace(name: str) -> None:
    model, x = tcn(name), series()
    kinds, before = [type(module) for module in model.modules()], copy.deepcopy(model.state_dict())
    for parameter in model.blocks[0].one.parameters():
        parameter.requires_grad_(False)
    gradients = {name: p.requires_grad for name, p in model.named_parameters()}
    with torch.no_grad():
        dense = model(x)
    folded = fold(model)
    assert tuple(one.tensor for one in folded) == FOLDED
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense)
    assert {key.rpartition(".")[2] for key in model.state_dict()} == {"weight", "bias"}
    assert [p.requires_grad for p in model.blocks[0].parameters()] == [False] * 2 + [True] * 4
    model.load_state_dict(plain(model).state_dict())  # no hook asks for the parts
    for one in folded:
        one.undo()
    assert [type(module) for module in model.modules()] == kinds
    assert {name: p.requires_grad for name, p in model.named_parameters()} == gradients
    model.load_state_dict(before)
    with torch.no_grad():
        assert torch.equal(model(x), dense)
