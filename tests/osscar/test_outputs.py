"""What a model returns: which of it is scored, and whether two passes agree."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import osscar
from osscar.base.errors import EquivalenceError, ModelError
from osscar.data.images import ImageSet
from osscar.data.preprocessing import Preprocessing
from osscar.distance.scores import labelled_scores
from osscar.evaluation.quality import score
from osscar.network.predictions import outputs_by_name
from osscar.preparation.failures import check_repeatable
from tests.osscar.networks import images


class Net(nn.Module):
    """A classifier that does something to its features, and something to its answer."""

    def __init__(self, inside=lambda x: x, answer=lambda x, y: y):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.middle, self.leave = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 12, 1),
            nn.Linear(12, 5),
        )
        self.inside, self.answer = inside, answer

    def forward(self, x):
        features = torch.relu(self.middle(self.inside(torch.relu(self.enter(x)))))
        return self.answer(x, self.leave(features.mean((2, 3))))


class Stubborn(nn.Dropout):
    """Is in training for ever."""

    def train(self, mode=True):
        return super().train()


# ---- two passes --------------------------------------------------------------------------

CHANCE = {
    "dropout": lambda: Net(lambda x: F.dropout(x, 0.5)),
    "module": lambda: Net(Stubborn(0.5).train()),
    "elsewhere": lambda: Net(answer=lambda x, y: y * random.random()),
}
DIFFER = "two passes of Net over the same inputs differ"


def _pictures():
    pixels = (images(16) * 40 + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return ImageSet("pictures", pixels, Preprocessing(12, 12, (0.5,), (0.25,), channels=3))


USES = {
    "prune": lambda model: osscar.prune(model, images(16), sparsity=0.5, device="cpu"),
    "eval": lambda model: score([model], _pictures()),
}


def test_a_model_whose_two_passes_differ_is_refused_and_left_as_it_was():
    drawn = torch.get_rng_state()
    for build in CHANCE.values():
        model = build().eval()
        torch.set_rng_state(drawn)
        with pytest.raises(ModelError, match=f"{DIFFER} by .*in training"):
            check_repeatable(model, {"x": images(2)})
        assert torch.equal(torch.get_rng_state(), drawn)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    rounded = Net(lambda x: x * (1 + 1e-6 * torch.randn(()))).eval()
    check_repeatable(rounded, {"x": images(2)})


@pytest.mark.parametrize("use", USES)
def test_whoever_measures_refuses_chance_and_what_puts_out_no_tensor(use):
    with pytest.raises(ModelError, match=DIFFER):
        USES[use](CHANCE["dropout"]().eval())
    model = Net(answer=lambda x, y: {"best": y.argmax(1).tolist()}).eval()
    with pytest.raises((EquivalenceError, ModelError), match="returned a dict without a"):
        USES[use](model)


# ---- which output is scored --------------------------------------------------------------

ROWS, MAPS = torch.randn(4, 5), torch.randn(4, 2, 3)


def test_the_output_that_is_scored_is_the_only_one_that_labels_fit():
    for result, name in (
        (ROWS, "output"),
        ({"other": torch.randn(4, 5), "logits": ROWS}, "logits"),
        ((torch.arange(4), ROWS), "1"),
        ((MAPS, ROWS), "1"),
        ({"maps": MAPS, "y": ROWS, "labels": torch.arange(4)}, "y"),
        ((ROWS, torch.randn(4, 7)), None),
        (MAPS, None),
    ):
        found = labelled_scores(outputs_by_name(result), (4,), sequences=False)
        assert (found and found.output) == name


def test_agreement_is_that_of_the_logits_and_not_of_what_pruning_never_touched():
    pictures, scores = _pictures(), []
    for answer in (lambda x, y: y, lambda x, y: {"mean": x.mean((2, 3)), "logits": y}):
        dense, small = Net(answer=answer).eval(), Net(answer=answer).eval()
        with torch.no_grad():  # so that images are of several classes
            dense.leave.bias -= Net()(pictures.tensor()).mean(0)
            small.leave.bias.copy_(dense.leave.bias)
            small.leave.weight[:, :9] = 0
        (found,) = score([small], pictures, dense=dense)
        scores.append((found.agreement, found.kl))
    assert (found.classes_in, found.errors["mean"]) == ("logits", 0)
    assert found.errors["logits"] > 0
    assert scores[0] == scores[1]
    assert scores[0][0] < 1
