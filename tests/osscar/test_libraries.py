"""Models of torchvision, timm and the hub that read images, by name."""

import functools
import json
import shutil
from fnmatch import fnmatch

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessor

import osscar
from osscar.base.errors import ModelError, OptionError
from osscar.models import names
from osscar.models.load import load_model
from osscar.models.names import DEMO_DIRECTORY, ModelKind, kind_of
from osscar.proof.lineage import lineage_of

torchvision = pytest.importorskip("torchvision")

SSD = "ssdlite320_mobilenet_v3_large"


def picture(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((70, 50), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def ssd(tmp_path_factory):
    """A detector as torchvision builds it, and the file of its weights."""
    torch.manual_seed(0)
    whole = torchvision.models.get_model(SSD, weights=None, weights_backbone=None).eval()
    file = tmp_path_factory.mktemp("detector") / "ssd.pt"
    torch.save(whole.state_dict(), file)
    return whole, file


# ---- torchvision -------------------------------------------------------------------------


def test_models_of_all_tasks_have_names():
    segments = load_model("torchvision:lraspp_mobilenet_v3_large", pretrained=False)
    known = segments.preprocessing
    assert (known.resize, known.crop, known.mean) == (520, 520, (0.485, 0.456, 0.406))
    assert segments.classes[:2] == ("__background__", "aeroplane")
    assert segments.source.endswith("lraspp_mobilenet_v3_large, freshly initialized weights")
    for name, message in (
        ("torchvision:ssdlite320_mobilenet", "no model 'ssdlite320_mobilenet'; did you mean ssdl"),
        ("timm:test_vi", "timm has no model 'test_vi'; did you mean test_vit"),
    ):
        with pytest.raises(ModelError, match=message):
            load_model(name, pretrained=False)


def test_a_detector_is_loaded_with_what_it_does_to_images(ssd, tmp_path):
    whole, file = ssd
    loaded = load_model(f"torchvision:{SSD}", weights=file)
    known = loaded.preprocessing.record().items()
    assert known >= {"resize": (320, 320), "crop": 320, "mean": (0.5,), "std": (0.5,)}.items()
    picture().save(tmp_path / "a.png")
    mine = loaded.images(tmp_path).tensor()
    theirs, _ = whole.transform([torchvision.transforms.functional.to_tensor(picture())])
    assert float((mine - theirs.tensors).abs().mean()) < 0.02


# ---- timm --------------------------------------------------------------------------------


def test_a_model_of_timm_sees_images_as_timm_shows_them_and_is_read_back(tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit", num_classes=5)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    loaded = load_model("timm:test_vit", weights=tmp_path / "weights.pt")
    assert lineage_of(loaded.model).origin.options == {"num_classes": 5}
    assert loaded.classes == ()
    assert len(load_model("timm:test_vit", pretrained=False).classes) == 1000
    theirs = timm.data.create_transform(
        **timm.data.resolve_model_data_config(model), is_training=False
    )
    assert torch.equal(loaded.preprocessing.transform()(picture()), theirs(picture()))
    assert loaded.example["x"].shape == (2, 3, 160, 160)
    path, x = osscar.save(loaded.model, tmp_path / "small").path, torch.randn(2, 3, 160, 160)
    assert kind_of(path) is ModelKind.LIBRARY_DIRECTORY
    again = load_model(path)
    assert_close(again.model(x), loaded.model(x))
    assert again.preprocessing == loaded.preprocessing
    with pytest.raises(OptionError, match="is no language model of transformers, and no other"):
        load_model("timm:test_vit", max_memory="1GB")


# ---- transformers ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A directory with a classifier as transformers writes it."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("classifier") / "vit"
    classes = dict(enumerate(["cat", "dog", "owl"]))
    config = ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=16, id2label=classes,
        label2id={name: number for number, name in classes.items()},
    )  # fmt: skip
    ViTForImageClassification(config).half().save_pretrained(place)
    ViTImageProcessor(size={"height": 32, "width": 32}, resample=3).save_pretrained(place)
    return place


def test_a_classifier_in_a_directory_is_saved_and_scored_by_name(vit, tmp_path):
    images, small = tmp_path / "images", tmp_path / "small"
    for number, name in enumerate(["cat", "dog", "owl"] * 4):
        (images / name).mkdir(parents=True, exist_ok=True)
        picture(seed=number).save(images / name / f"{number}.png")
    loaded = load_model(vit)
    assert len(loaded.calibration(images, samples=6)) == 6
    osscar.save(loaded.model, small, tokenizer=loaded.companion)
    assert kind_of(vit) is kind_of(small) is ModelKind.CLASSIFIER
    again = load_model(small)
    assert again.preprocessing == loaded.preprocessing
    assert "RGB, by the transform of ViTImageProcessor" in loaded.preprocessing.sentence()
    for one in (loaded, again):
        assert (one.stored_dtype, one.model.dtype) == (torch.float16, torch.float32)
    assert again.classes == ("cat", "dog", "owl")
    processed = AutoImageProcessor.from_pretrained(small)(picture(), return_tensors="pt")
    expected = processed["pixel_values"][0]
    assert torch.allclose(loaded.preprocessing.transform()(picture()), expected, atol=0.05)
    compared = osscar.compare(again.model, loaded.model, again.images(images), repetitions=1)
    quality = compared.model.quality
    assert None not in (quality.top1, quality.agreement)


def test_an_id_of_the_hub_is_a_directory_that_is_fetched(vit, monkeypatch):
    asked = []

    def download(name, revision, allow_patterns, ignore_patterns):
        assert revision is None
        asked.append((name, any(fnmatch("model.safetensors", one) for one in allow_patterns)))
        assert not any(fnmatch("pytorch_model.bin", one) for one in allow_patterns)
        return str({"someone/a-vit": vit, "someone/an-opt": DEMO_DIRECTORY}[name])

    monkeypatch.setattr(names, "snapshot_download", download)
    monkeypatch.setattr(names, "_fetched", functools.cache(names._fetched.__wrapped__))
    assert kind_of("someone/a-vit") is ModelKind.CLASSIFIER
    assert kind_of("someone/an-opt") is kind_of("../nothing/here") is ModelKind.LANGUAGE
    loaded = load_model("someone/a-vit")
    assert (loaded.source, loaded.path) == ("Hugging Face someone/a-vit", vit)
    assert loaded.classes == ("cat", "dog", "owl")
    streamed = load_model("someone/an-opt", max_memory="2GB", device="cpu")
    assert streamed.source == "Hugging Face someone/an-opt"
    both = ["someone/a-vit", "someone/an-opt"]
    assert asked == [(name, whole) for whole in (False, True) for name in both]


@pytest.mark.parametrize("sides", [32, [32, 48]])
def test_a_classifier_without_a_processor_is_inspected_at_the_size_of_its_config(
    sides, vit, tmp_path, run
):
    place = tmp_path / "vit"
    shutil.copytree(vit, place)
    (place / "preprocessor_config.json").unlink()
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "image_size": sides}))
    patches = 2 * 2 if sides == 32 else 2 * 3
    table = "vit.embeddings.position_embeddings"
    weights = load_file(place / "model.safetensors")
    weights[table] = torch.zeros(1, 1 + patches, 16, dtype=torch.float16)
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    status, out, err = run("inspect", place)
    assert (status, "heads" in out, "neurons" in out) == (0, True, True), err
    assert run("inspect", place, "--times", "--batch-size", 2)[0] == 0
