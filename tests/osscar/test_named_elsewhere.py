"""What the files of a checkpoint name: nothing is fetched, read outside of it, or run.

Each is read in a child of this process that refuses sockets and watches what is opened.
"""

import json
import shutil
import site
import sys
import sysconfig
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers as hf
from huggingface_hub import constants

import osscar
from osscar.base.errors import CheckpointError, FileError, OptionError, OsscarError
from osscar.checkpoint.builders import LibraryOrigin
from osscar.cli.commands import _options
from osscar.models.load import load_model
from osscar.models.names import DEMO_DIRECTORY
from tests.osscar.families import tiny
from tests.osscar.forked import forked

pytest.importorskip("timm")


def wrapped():
    config = hf.TimmWrapperConfig(
        architecture="test_vit", num_labels=3, label_names=["a", "b", "c"]
    )
    return hf.TimmWrapperForImageClassification(config)


MODELS = {
    "timm": lambda: LibraryOrigin("timm", "test_vit", {"num_classes": 5}).build(),
    "torchvision": lambda: LibraryOrigin("torchvision", "shufflenet_v2_x0_5").build(),
    "opt": partial(tiny, "opt"),
    "wrapped": wrapped,
}
CODE = "raise SystemExit('this was run')\n"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Checkpoints of each kind, and beside them what none of them may read."""
    place, found = tmp_path_factory.mktemp("written"), {}
    for name, build in MODELS.items():
        torch.manual_seed(0)
        found[name], model = place / name, build().eval()
        if name in ("opt", "wrapped"):
            model.save_pretrained(found[name])
        else:
            osscar.save(model, found[name])
    for file in DEMO_DIRECTORY.glob("tokenizer*"):
        shutil.copy(file, found["opt"])
    outside = place / "outside"
    shutil.copytree(found["opt"], outside)
    torch.save(MODELS["timm"]().state_dict(), outside / "weights.pt")
    (outside / "config.json").write_text(json.dumps({"architecture": "test_vit"}))
    shutil.copy(found["opt"] / "tokenizer.json", outside / "tokenizer.4.0.0.json")
    return found


_OWN = [Path(sys.prefix), Path(sysconfig.get_path("stdlib")), *map(Path, site.getsitepackages())]
_OWN += [Path(osscar.__file__).parents[1], Path(constants.HF_TOKEN_PATH)]
_OWN = [one.resolve() for one in (*_OWN, *map(Path, sys.path))]
_SYSTEM = tuple(map(Path, ("/proc", "/sys", "/dev", "/usr", "/etc/ld.so.cache")))


def watched(read, path):
    """Read a checkpoint; tell what else was opened or asked for, and what came of it."""
    strays, watching = list[str](), [True]
    mine = (path.resolve(), *_OWN, *_SYSTEM)

    def hook(event, values):
        if not watching[0]:
            return
        if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
            strays.append(f"{event} {values[1:]}")
            raise OSError("no network here")
        if event == "open" and isinstance(values[0], str | bytes):
            file = Path(values[0] if isinstance(values[0], str) else values[0].decode()).resolve()
            if not any(root == file or root in file.parents for root in mine):
                strays.append(f"opened {file}")

    constants.HF_HUB_OFFLINE = False  # as it is where no test runs
    sys.addaudithook(hook)
    try:
        read(path)
        came = "it was read"
    except OsscarError as error:
        came = f"{type(error).__name__}: {error}"
    except BaseException as error:
        came = f"let through {type(error).__name__}: {error}"
    watching[0] = False
    print(json.dumps([came, strays]))


def outcome(read, path, place):
    child = forked(partial(watched, read, path), place)
    assert child.wait() == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


def edited(path, place, file, changes, *, origin=False):
    """Copy a checkpoint with other values of fields; `origin` are those of where it comes from."""
    copy = place / "copy"
    shutil.copytree(path, copy)
    content = json.loads((copy / file).read_text()) if (copy / file).exists() else {}
    (content["lineage"]["origin"] if origin else content).update(changes)
    (copy / file).write_text(json.dumps(content).replace(OUT, str(path.parent / "outside")))
    (copy / "evil.py").write_text(CODE)
    other = {"model_type": "timm_wrapper", "architecture": f"local-dir:{path.parent / 'outside'}"}
    (copy / "config.4.0.0.json").write_text(json.dumps(other))
    return copy


@pytest.mark.parametrize("name", MODELS)
def test_what_is_as_it_was_written_needs_nothing_else(name, written, tmp_path):
    for read in (osscar.load, load_model)[: 1 + (name in ("opt", "timm", "torchvision"))]:
        assert outcome(read, written[name], tmp_path) == ["it was read", []]


OUT = "OUTSIDE"
"""Stands for a directory beside the checkpoints."""
ORIGINS = [
    ("timm", {"name": "hf-hub:timm/test_vit.r160_in1k"}, "CheckpointError: .* has no model"),
    ("timm", {"name": "hf_hub:timm/test_vit.r160_in1k"}, "CheckpointError: .* has no model"),
    ("timm", {"name": f"local-dir:{OUT}"}, "CheckpointError: .* has no model"),
    ("timm", {"options": {"checkpoint_path": f"{OUT}/weights.pt"}}, "FileError: .*checkpoint_path"),
    ("timm", {"options": {"pretrained": True}}, "FileError: .*pretrained"),
    ("timm", {"options": {"num_classes": "hf-hub:x/y"}}, "FileError: .*num_classes"),
    ("torchvision", {"name": "ShuffleNet_v2_x0_5"}, "CheckpointError: .* has no model"),
    ("torchvision", {"options": {"weights": "DEFAULT"}}, "FileError: .*weights"),
    ("torchvision", {"options": {"pretrained_backbone": True}}, "FileError: .*pretrained_back"),
    ("torchvision", {"library": "torch.hub"}, "FileError: .*library"),
]


@pytest.mark.parametrize(("name", "changes", "refused"), ORIGINS, ids=lambda one: str(one)[:40])
def test_a_manifest_names_models_of_a_library_and_options_of_ours(
    name, changes, refused, written, tmp_path
):
    copy = edited(written[name], tmp_path, "osscar.json", changes, origin=True)
    for read in (osscar.load, load_model):
        came, strays = outcome(read, copy, tmp_path)
        assert not strays
        assert came.startswith(refused.partition(":")[0])
        with pytest.raises((CheckpointError, FileError), match=refused.partition(": ")[2]):
            read(copy)


CODE_OF = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Net"}
CONFIGS = [
    ("wrapped", {"architecture": "hf-hub:timm/test_vit"}),
    ("wrapped", {"architecture": f"local-dir:{OUT}"}),
    ("wrapped", {"model_args": {"checkpoint_path": f"{OUT}/weights.pt"}}),
    ("wrapped", {"model_args": {"pretrained_cfg": {"file": f"{OUT}/weights.pt"}}}),
    ("opt", {"architectures": ["TimmWrapperModel"], "architecture": f"local-dir:{OUT}"}),
    ("opt", {"model_type": "detr", "backbone": "someone/net", "use_timm_backbone": False}),
    ("opt", {"model_type": "dpt", "backbone": "somenet", "is_hybrid": True}),
    ("wrapped", {"configuration_files": ["config.4.0.0.json"]}),
    ("opt", {"model_type": "evil", "auto_map": CODE_OF}),
    ("opt", {"model_type": "evil", "auto_map": {"AutoConfig": "someone/net--evil.Config"}}),
    ("opt", {"_name_or_path": "someone/net", "auto_map": CODE_OF}),
]


@pytest.mark.parametrize(("name", "changes"), CONFIGS, ids=lambda one: str(one)[:60])
def test_a_config_has_nothing_fetched_or_read_elsewhere(name, changes, written, tmp_path):
    copy = edited(written[name], tmp_path, "config.json", changes)
    for read in (osscar.load, load_model):
        came, strays = outcome(read, copy, tmp_path / "copy")
        assert not strays
        assert "let through" not in came


def test_a_tokenizer_is_that_of_the_directory(written, tmp_path):
    names = {"fast_tokenizer_files": [f"{OUT}/tokenizer.4.0.0.json"]}
    copy = edited(written["opt"], tmp_path, "tokenizer_config.json", names)
    came, strays = outcome(load_model, copy, tmp_path)
    assert not strays
    assert "a file that lies elsewhere" in came


def test_a_report_as_a_file_of_options_allows_no_code(runs, tmp_path):
    report = runs["opt"].result.record()
    report["settings"]["trust_remote_code"] = True
    (tmp_path / "osscar_report.json").write_text(json.dumps(report))
    with pytest.raises(OptionError, match="trust_remote_code"):
        _options(tmp_path / "osscar_report.json")
