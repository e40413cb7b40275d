"""Models of torchvision, timm and the hub that read images, by name."""

import functools
import sys
from fnmatch import fnmatch

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import (
    AutoImageProcessor,
    ConvNextImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import osscar
from osscar.base.errors import DataError, MissingDependency, ModelError, OptionError
from osscar.data.images import load_images
from osscar.models import names
from osscar.models.load import load_model
from osscar.models.names import DEMO_DIRECTORY, ModelKind, kind_of
from osscar.network.detectors import DetectorNetwork
from osscar.proof.lineage import lineage_of
from tests.osscar.networks import plain

torchvision = pytest.importorskip("torchvision")

SSD = "ssdlite320_mobilenet_v3_large"


def picture(size=(70, 50), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def built(name, **options):
    return torchvision.models.get_model(name, weights=None, **options)


# ---- torchvision -------------------------------------------------------------------------


def test_models_of_all_tasks_have_names():
    segments = load_model("torchvision:lraspp_mobilenet_v3_large", pretrained=False)
    known = segments.preprocessing
    assert (known.resize, known.crop, known.mean) == (520, 520, (0.485, 0.456, 0.406))
    assert segments.classes[:2] == ("__background__", "aeroplane")
    assert segments.source.endswith("lraspp_mobilenet_v3_large, freshly initialized weights")
    assert segments.drawn == 1.0
    flow = load_model("torchvision:raft_small", pretrained=False)
    assert {name: x.ndim for name, x in flow.example.items()} == {"image1": 4, "image2": 4}
    with pytest.raises(DataError, match=r"is image1 .*, image2 .*, and images are one tensor"):
        flow.images("images")
    with pytest.raises(ModelError, match=r"'quantized_resnet18' is for .* prune torchvision:resn"):
        load_model("torchvision:quantized_resnet18", pretrained=False)
    with pytest.raises(ModelError, match=r"no model 'ssdlite320_mobilenet'; did you mean ssdl"):
        load_model("torchvision:ssdlite320_mobilenet", pretrained=False)


@pytest.mark.slow
def test_a_video_model_reads_clips():
    clips = load_model("torchvision:r3d_18", pretrained=False)
    assert [tuple(x.shape) for x in clips.example.values()] == [(2, 3, 16, 112, 112)]
    assert clips.preprocessing is None
    assert len(clips.classes) == 400


def test_the_network_of_a_detector_is_all_of_it_but_boxes():
    torch.manual_seed(0)
    whole = built(SSD, weights_backbone=None).eval()
    network = DetectorNetwork(whole).eval()
    assert network.state_dict().keys() == whole.state_dict().keys()
    image = torch.rand(3, 90, 110)
    with torch.no_grad():
        images, _ = whole.transform([image])
        found = network(images.tensors)
        expected = whole.head(list(whole.backbone(images.tensors).values()))
        again, boxes = network.detector()([image]), whole([image])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(torch.equal(again[0][name], boxes[0][name]) for name in boxes[0])
    assert not network.detector().training


def test_a_detector_is_loaded_with_what_it_does_to_images(tmp_path):
    whole = built(SSD, weights_backbone=None)
    torch.save(whole.state_dict(), tmp_path / "ssd.pt")
    loaded = load_model(f"torchvision:{SSD}", weights=tmp_path / "ssd.pt")
    assert loaded.preprocessing.record() == {
        "resize": (320, 320), "crop": 320, "mean": (0.5,), "std": (0.5,),
        "interpolation": "bilinear", "channels": 3,
    }  # fmt: skip
    assert loaded.drawn == 0
    picture().save(tmp_path / "a.png")
    mine = loaded.images(tmp_path).tensor()
    theirs, _ = whole.eval().transform([torchvision.transforms.functional.to_tensor(picture())])
    assert float((mine - theirs.tensors).abs().mean()) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [SSD, "fasterrcnn_mobilenet_v3_large_320_fpn", "lraspp_mobilenet_v3_large"]
)
def test_what_becomes_of_detectors_and_segmentation_is_read_back(name, tmp_path):
    torch.manual_seed(0)
    loaded = load_model(f"torchvision:{name}", pretrained=False)
    x = torch.randn(6, 3, 96, 96)
    result = osscar.prune(
        loaded.model, x, sparsity=0.3, allocation="uniform", backend="magnitude", device="cpu"
    )
    assert result.parameters_after < result.parameters_before
    again = osscar.load(result.save(tmp_path / "small").path)
    with torch.no_grad():
        mine, theirs = result.model(x), again(x)
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
        if isinstance(again, DetectorNetwork):
            [found] = again.detector()([torch.rand(3, 80, 100)])
            assert set(found) == {"boxes", "scores", "labels"}
    compared = osscar.compare(
        again, loaded.model, load_images([picture(seed=i) for i in range(3)], plain(96)),
        repetitions=1,
    )  # fmt: skip
    assert compared.model.quality.top1 is None
    assert all(error > 0 for error in compared.model.quality.errors.values())


@pytest.mark.slow
def test_a_detector_is_pruned_and_compared_on_the_command_line(run, tmp_path):
    torch.manual_seed(0)
    torch.save(built(SSD, weights_backbone=None).state_dict(), tmp_path / "ssd.pt")
    for number, part in enumerate(("train", "test") * 4):
        (tmp_path / part / "all").mkdir(parents=True, exist_ok=True)
        picture(seed=number).save(tmp_path / part / "all" / f"{number}.png")
    dense = (f"torchvision:{SSD}", "--weights", tmp_path / "ssd.pt")
    status, _, err = run(
        *("prune", *dense, "--sparsity", "0.3", "--calibration", tmp_path / "train"),
        *(
            "--image-size",
            "96",
            "--mean",
            "0.5",
            "--std",
            "0.5",
            "--backend",
            "magnitude",
            "--allocation",
            "uniform",
        ),
        *("--device", "cpu", "--out", tmp_path / "smaller"),
    )
    assert status == 0, err
    status, out, err = run(
        *("eval", tmp_path / "smaller", "--images", tmp_path / "test"),
        *("--dense", *dense, "--device", "cpu"),
    )
    assert status == 0, err
    assert "squared error of cls_logits" in out
    assert "4 images without labels scored" in out
    assert "labels of images are left out" in err


def test_outputs_that_are_no_classes_are_compared_as_they_are():
    class Maps(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return {"out": self.body(x), "aux": self.body(x).mean(1)}

    torch.manual_seed(0)
    model, dense = Maps().eval(), Maps().eval()
    labelled = load_images([(picture(seed=i), i % 2) for i in range(3)], plain(16))
    with pytest.warns(UserWarning, match="labels of images are left out"):
        assert osscar.evaluate(model, labelled, repetitions=1).quality.top1 is None
    for images in (labelled, load_images([picture(seed=i) for i in range(3)], plain(16))):
        quality = osscar.compare(model, dense, images, repetitions=1).model.quality
        assert (quality.top1, quality.classes_in) == (None, None)
        assert set(quality.errors) == {"out", "aux"}
        assert min(quality.errors.values()) > 0


# ---- timm --------------------------------------------------------------------------------


def test_a_model_of_timm_sees_images_as_timm_shows_them(tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit", num_classes=5)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    loaded = load_model("timm:test_vit", weights=tmp_path / "weights.pt")
    assert lineage_of(loaded.model).origin.options == {"num_classes": 5}
    assert (loaded.classes, loaded.stated) == ((), None)
    theirs = timm.data.create_transform(
        **timm.data.resolve_model_data_config(model), is_training=False
    )
    assert torch.equal(loaded.preprocessing.transform()(picture()), theirs(picture()))
    assert loaded.example["x"].shape == (2, 3, 160, 160)


def test_what_becomes_of_a_model_of_timm_is_read_back(tmp_path):
    pytest.importorskip("timm")
    torch.manual_seed(0)
    loaded = load_model("timm:test_vit", pretrained=False)
    assert len(loaded.classes) == 1000
    x = torch.randn(4, 3, 160, 160)
    result = osscar.prune(loaded.model, x, neurons=0.5, backend="magnitude", device="cpu")
    path = result.save(tmp_path / "small").path
    assert kind_of(path) is ModelKind.LIBRARY_DIRECTORY
    again = load_model(path)
    assert_close(again.model(x), result.model(x))
    assert again.preprocessing == loaded.preprocessing
    with pytest.raises(ModelError, match=r"timm has no model ''; see its list_models\(\)"):
        osscar.load_model("timm:", device="cpu")
    with pytest.raises(ModelError, match="timm has no model 'test_vi'; did you mean test_vit"):
        load_model("timm:test_vi")
    with pytest.raises(ModelError, match=r"no model 'test_vit.nothing'; did you mean test_vit\."):
        load_model("timm:test_vit.nothing")
    with pytest.raises(OptionError, match="is no language model of transformers, and no other"):
        load_model("timm:test_vit", max_memory="1GB")


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        MissingDependency,
        match=r"the package 'timm'; install it with .* 'osscar\[timm\]'",
    ):
        load_model("timm:resnet18", pretrained=False)


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


def test_a_classifier_in_a_directory_is_pruned_and_scored_by_name(vit, run, tmp_path):
    assert kind_of(vit) is ModelKind.CLASSIFIER
    images = tmp_path / "images"
    for number, name in enumerate(["cat", "dog", "owl"] * 4):
        (images / name).mkdir(parents=True, exist_ok=True)
        picture(seed=number).save(images / name / f"{number}.png")
    status, out, err = run(
        *("prune", vit, "--neurons", "0.5", "--backend", "magnitude", "--device", "cpu"),
        *("--calibration", images, "--samples", "6", "--out", tmp_path / "small"),
    )
    assert status == 0, err
    assert "images: RGB, by the transform of ViTImageProcessor" in out
    assert kind_of(tmp_path / "small") is ModelKind.CLASSIFIER
    loaded, again = load_model(vit), load_model(tmp_path / "small")
    assert again.preprocessing == loaded.preprocessing
    for one in (loaded, again):
        assert (one.stored_dtype, one.model.dtype) == (torch.float16, torch.float32)
    assert again.classes == ("cat", "dog", "owl")
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "small")(picture(), return_tensors="pt")[
        "pixel_values"
    ]
    assert torch.allclose(loaded.preprocessing.transform()(picture()), pixels[0], atol=0.05)
    quality = osscar.compare(
        again.model, loaded.model, again.images(images), classes=again.classes, repetitions=1
    ).model.quality
    assert quality.top1 is not None
    assert quality.agreement is not None


def test_images_are_processed_as_the_image_processor_does(tmp_path):
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    processor = ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.8)
    processor.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    expected = processor(picture(), return_tensors="pt")["pixel_values"][0]
    assert '"crop_pct": 0.8' in loaded.preprocessing.sentence()
    assert torch.equal(loaded.preprocessing.transform()(picture()), expected)
    assert loaded.classes == ()


def test_an_id_of_the_hub_is_a_directory_that_is_fetched(vit, tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns, ignore_patterns):
        asked.append(name)
        assert not any(fnmatch("pytorch_model.bin", pattern) for pattern in allow_patterns)
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
    assert [*dict.fromkeys(asked)] == ["someone/a-vit", "someone/an-opt"]
    assert len(asked) == 4  # without the weights first
