"""The two doors through which strangers' files come. Whatever stands there, the answer is a result or one line;
nothing is executed, nothing hangs, and the file is left alone. FUZZ=2000 pytest tests/test_fuzz.py looks longer."""

import io
import os
import pickle
import random
import struct
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import minvqgan
from minvqgan import VQGAN, TwoStage, VQGANConfig
from minvqgan.conditioning import ClassCondition
from minvqgan.gpt import GPT, GPTConfig
from minvqgan.harness import checkpoint, data
from minvqgan.harness.runtime import UserError
from minvqgan.two_stage import TwoStageConfig

often = settings(
    max_examples=int(os.environ.get("FUZZ", 100)),
    deadline=10_000,  # milliseconds: nothing may hang
    derandomize="FUZZ" not in os.environ,  # the same hundred every time: a red run then means a change
    suppress_health_check=list(HealthCheck),
)


def picture(mode: str, size: tuple[int, int], file_format: str, rng: np.random.Generator) -> bytes:
    """A good file."""
    channels = {"RGB": 3, "RGBA": 4, "CMYK": 4, "LA": 2, "YCbCr": 3, "HSV": 3}.get(mode, 1)
    if mode in ("I;16", "I"):
        image = Image.fromarray(rng.integers(0, 65536, size[::-1]).astype(np.uint16 if mode == "I;16" else np.int32))
    elif mode == "F":
        image = Image.fromarray(rng.random(size[::-1]).astype(np.float32))
    elif mode in ("1", "P"):
        image = Image.fromarray(rng.integers(0, 256, size[::-1], np.uint8)).convert(mode)
    else:
        shape = size[::-1] + ((channels,) if channels > 1 else ())
        image = Image.fromarray(rng.integers(0, 256, shape, np.uint8), mode if channels > 1 else None)
    buffer = io.BytesIO()
    try:
        image.save(buffer, file_format)
    except (OSError, ValueError, KeyError):  # this format cannot hold this mode
        image.convert("RGB").save(buffer, file_format)
    return buffer.getvalue()


def spoil(content: bytes, way: str, r: random.Random) -> bytes:
    """A good file made worse."""
    if way == "cut":
        return content[: r.randrange(len(content))]
    if way == "flip":
        spoilt = bytearray(content)
        for _ in range(r.randint(1, 20)):
            spoilt[r.randrange(len(spoilt))] = r.randrange(256)
        return bytes(spoilt)
    if way == "noise":
        return r.randbytes(r.randint(0, 2000))
    if way == "tail":
        return content + r.randbytes(500)
    if way == "head":
        return content[: r.randint(4, 40)] + r.randbytes(400)
    return content


WAYS = st.sampled_from(["good", "cut", "flip", "noise", "tail", "head"])


@often
@given(
    seed=st.integers(0, 2**32),
    mode=st.sampled_from(["RGB", "RGBA", "CMYK", "L", "LA", "1", "P", "I;16", "I", "F", "YCbCr", "HSV"]),
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    file_format=st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"]),
    way=WAYS,
    suffix=st.sampled_from([".png", ".jpg", ".webp", ".bmp", ".tif"]),
)
def test_pictures(tmp_path_factory, seed, mode, size, file_format, way, suffix):
    rng, r = np.random.default_rng(seed), random.Random(seed)
    folder = tmp_path_factory.mktemp("fuzz")
    content = spoil(picture(mode, size, file_format, rng), way, r)
    (folder / f"odd{suffix}").write_bytes(content)
    for i in range(2):
        (folder / f"good{i}.png").write_bytes(picture("RGB", (20, 20), "PNG", rng))
    try:
        sets = data.open_data(str(folder), 16)
        for part in sets:
            for batch in data.held_out_batches(part, 4, 4):
                assert batch["image"].shape[1:] == (3, 16, 16)
                assert batch["image"].isfinite().all() and batch["image"].abs().max() <= 1
    except UserError as error:
        assert len(str(error).strip().splitlines()) == 1
    assert (folder / f"odd{suffix}").read_bytes() == content


def png_that_claims(width: int, height: int) -> bytes:
    """A small file whose header promises a gigantic picture."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [20_000, 60_000, 2**31 - 1])
def test_decompression_bombs_are_skipped(tmp_path, side, capfd):
    rng = np.random.default_rng(0)
    (tmp_path / "bomb.png").write_bytes(png_that_claims(side, side))
    for i in range(3):
        (tmp_path / f"good{i}.png").write_bytes(picture("RGB", (20, 20), "PNG", rng))
    train_set, val_set = data.open_data(str(tmp_path), 16)
    assert len(train_set) + len(val_set) == 3
    assert "bomb.png" in capfd.readouterr().err


def good_checkpoints() -> dict[str, dict]:
    torch.manual_seed(0)
    vqgan = VQGAN(VQGANConfig(ch=4, ch_mult=(1, 2), z_channels=4, code_dim=4, codebook_size=8))
    gpt = GPT(GPTConfig(8, 3, 64, 1, 2, 8))
    two_stage = TwoStage(vqgan, ClassCondition(2), gpt, TwoStageConfig(8, guided=True, classes=("a", "b")))
    one = {"format": checkpoint.FORMAT, "kind": "vqgan", "config": asdict(vqgan.config), "model": vqgan.state_dict()}
    both = {"format": checkpoint.FORMAT, "kind": "two_stage", **checkpoint.pack_two_stage(two_stage)}
    return {"vqgan": one, "two_stage": both}


GOOD = good_checkpoints()


def written(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


BYTES = {kind: written(content) for kind, content in GOOD.items()}


def either_a_model_or_one_line(path: Path) -> None:
    before = path.read_bytes()
    for door in (minvqgan.load, checkpoint.read_foreign):
        try:
            door(path)
        except UserError as error:
            assert len(str(error).strip().splitlines()) == 1
    assert path.read_bytes() == before


@often
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(list(GOOD)), way=WAYS)
@example(seed=9544, kind="two_stage", way="flip")  # a control character in a key's name
def test_bytes_of_checkpoints(tmp_path_factory, seed, kind, way):
    path = tmp_path_factory.mktemp("fuzz") / "odd.pt"
    path.write_bytes(spoil(BYTES[kind], way, random.Random(seed)))
    either_a_model_or_one_line(path)


def places(content: dict, at: tuple = ()) -> list[tuple]:
    """Paths to everything within nested dicts."""
    found = []
    for key, value in content.items():
        found.append((*at, key))
        if isinstance(value, dict):
            found += places(value, (*at, key))
    return found


ODD_VALUES = [
    None, 0, -1, 1, 10**6, 10**30, 1.5, float("nan"), "text", "", [], [1, 2], {}, {"a": 1}, True, (1, 2), (0,) * 2000,
    torch.zeros(0), torch.zeros(3, 3), torch.zeros(2, dtype=torch.int8), torch.full((4,), float("inf")),
    torch.zeros(2, 2, dtype=torch.complex64), torch.zeros(1, dtype=torch.bool),
]  # fmt: skip


@often
@given(
    kind=st.sampled_from(list(GOOD)),
    place=st.integers(0, 10**6),
    other=st.integers(0, 10**6),
    value=st.sampled_from(range(len(ODD_VALUES))),
    way=st.sampled_from(["replace", "delete", "swap", "dtype"]),
)
@example(kind="vqgan", place=1, other=0, value=18, way="replace")  # a tensor is printed over many lines
@example(kind="two_stage", place=957, other=0, value=5, way="replace")  # torch answers 10**30 with a trace of its C++
def test_content_of_checkpoints(tmp_path_factory, kind, place, other, value, way):
    """A key missing, exchanged with another, of another type, shape or number: gigantic ones get no memory."""
    content = torch.load(io.BytesIO(BYTES[kind]), weights_only=True)
    everything = places(content)
    *at, key = everything[place % len(everything)]
    holder = content
    for step in at:
        holder = holder[step]
    if way == "delete":
        del holder[key]
    elif way == "swap":
        keys = list(holder)
        twin = keys[other % len(keys)]
        holder[key], holder[twin] = holder[twin], holder[key]
    elif way == "dtype" and isinstance(holder[key], torch.Tensor):
        kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.complex64)
        holder[key] = holder[key].to(kinds[other % 5])
    else:
        holder[key] = ODD_VALUES[value]
    path = tmp_path_factory.mktemp("fuzz") / "odd.pt"
    path.write_bytes(written(content))
    either_a_model_or_one_line(path)


class Runs:
    """Code in a pickle."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@often
@given(
    kind=st.sampled_from(list(GOOD)),
    place=st.integers(0, 10**6),
    which=st.integers(0, 4),
    protocol=st.sampled_from([2, 3, 4, 5]),
    bare=st.booleans(),
)
def test_code_in_checkpoints(tmp_path_factory, kind, place, which, protocol, bare):
    folder = tmp_path_factory.mktemp("fuzz")
    marker = folder / "executed"
    calls = [(os.mkdir, str(marker)), (os.system, f"touch {marker}"), (eval, f"open({str(marker)!r}, 'w')"),
             (exec, f"open({str(marker)!r}, 'w')"), (Path.touch, marker)]  # fmt: skip
    content = torch.load(io.BytesIO(BYTES[kind]), weights_only=True)
    everything = places(content)
    *at, key = everything[place % len(everything)]
    holder = content
    for step in at:
        holder = holder[step]
    holder[key] = Runs(*calls[which])
    path = folder / "odd.pt"
    if bare:
        path.write_bytes(pickle.dumps(holder[key], protocol))
    else:
        torch.save(content, path, pickle_protocol=protocol)
    with pytest.raises(UserError):
        minvqgan.load(path)
    with pytest.raises(UserError):
        checkpoint.read_foreign(path)
    assert not marker.exists()


def test_the_fixtures_stand(tmp_path):
    """The doors are open for what is good."""
    for kind, content in BYTES.items():
        (tmp_path / f"{kind}.pt").write_bytes(content)
        assert isinstance(minvqgan.load(tmp_path / f"{kind}.pt"), VQGAN if kind == "vqgan" else TwoStage)
    assert checkpoint.read_foreign(ROOT / "tests" / "fixtures" / "lightning_style.ckpt")
