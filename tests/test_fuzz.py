"""Random damage to images, and random names of classes. FUZZ=2000 pytest -m slow tests/test_fuzz.py looks longer."""

import io
import os
import random
import re
import runpy

import numpy as np
import pytest
from helpers import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from minvqgan.harness import data
from minvqgan.harness.runtime import UserError

pytestmark = pytest.mark.slow
often = settings(
    max_examples=int(os.environ.get("FUZZ", 100)),
    deadline=10_000,  # milliseconds: nothing may hang
    derandomize="FUZZ" not in os.environ,  # the same hundred every time: a red run then means a change
    suppress_health_check=list(HealthCheck),
)


def image_file(mode: str, size: tuple[int, int], file_format: str, rng: np.random.Generator) -> bytes:
    """An image of random pixels, as a file."""
    image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8))
    buffer = io.BytesIO()
    try:
        (image if mode == "RGB" else image.convert("L").convert(mode)).save(buffer, file_format)
    except (OSError, ValueError, KeyError):  # this format cannot hold this mode
        image.save(buffer, file_format)
    return buffer.getvalue()


def spoil(content: bytes, way: str, r: random.Random) -> bytes:
    """A good file, damaged in a way."""
    at = r.randrange(len(content))
    damaged = {
        "good": content,
        "cut": content[:at],
        "flip": content[:at] + r.randbytes(20) + content[at + 20 :],
        "noise": r.randbytes(2000),
        "tail": content + r.randbytes(500),
    }
    return damaged[way]


WAYS = st.sampled_from(["good", "cut", "flip", "noise", "tail"])
MODES = st.sampled_from(["RGB", "RGBA", "CMYK", "L", "LA", "1", "P", "I", "F", "YCbCr"])
SIZES = st.tuples(st.integers(1, 90), st.integers(1, 90))
FORMATS = st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])


@often
@given(seed=st.integers(0, 2**32), mode=MODES, size=SIZES, file_format=FORMATS, way=WAYS)
def test_images(tmp_path_factory, seed, mode, size, file_format, way):
    """A result or one line; nothing hangs, and the file is left alone."""
    rng, r = np.random.default_rng(seed), random.Random(seed)
    folder = tmp_path_factory.mktemp("fuzz")
    content = spoil(image_file(mode, size, file_format, rng), way, r)
    odd = folder / r.choice(("odd.png", "odd.jpg", "odd.tif"))
    odd.write_bytes(content)
    for i in range(2):
        (folder / f"good{i}.png").write_bytes(image_file("RGB", (20, 20), "PNG", rng))

    try:
        for part in data.open_data(str(folder), 16):
            for batch in data.held_out_batches(part, 4, 4):
                assert batch["image"].shape[1:] == (3, 16, 16)
                assert batch["image"].isfinite().all() and batch["image"].abs().max() <= 1
    except UserError as error:  # too few are left
        assert len(str(error).strip().splitlines()) == 1 and str(error).isprintable()
    assert odd.read_bytes() == content


FILE_NAMES = runpy.run_path(str(ROOT / "sample.py"))["file_names"]
ODD_NAMES = ["../../x", "/etc/x", "a/b", "a\\b", ".", "..", "", "CON", "a", "A", "é" * 60, "\x00", "x" * 300, "0_a"]


@often
@given(st.lists(st.one_of(st.text(max_size=60), st.sampled_from(ODD_NAMES)), max_size=12))
def test_class_names_become_names_of_files(classes):
    """Whatever a checkpoint calls its classes: each has a name of its own, in the folder, that any system can write."""
    names = FILE_NAMES(tuple(classes))
    assert len({name.casefold() for name in names}) == len(classes)
    for name in names:
        assert re.fullmatch(r"[\w -]+", name) and len(os.fsencode(f"{name}_0000.png")) < 255
