"""Tiny trained models that many test files use, made once a session; and one thread.

Models of this size gain nothing from a second thread, and processes side by side lose by it.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from helpers import STAGE_ONE, STAGE_TWO, make_photos, run_inside, succeeded
from PIL import Image

from minvqgan.harness.judges import Classifier, save_classifier


@pytest.fixture(scope="session")
def house(tmp_path_factory):
    """A folder with everything that the scripts take, trained by the scripts in a few seconds. Tests read it, and write
    to a folder of their own.

    photos: two classes (one, two) of six 16 x 16 images. pairs: eight images of 24 x 20 with label maps of 0, 1, 2.
    rgb, labels, edges: run folders of first-stage models. class, none, coords, spatial: of transformers.
    judge.pt: a classifier of photos' classes, untrained.
    """
    folder = tmp_path_factory.mktemp("house")
    for seed, name in enumerate(("one", "two")):
        make_photos(folder / "photos" / name, n=6, size=(16, 16), seed=seed)
    (folder / "pairs" / "labels").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for photo in make_photos(folder / "pairs" / "images", n=8, size=(24, 20)):
        coarse = Image.fromarray(rng.integers(0, 3, (5, 6), dtype=np.uint8))
        coarse.resize((24, 20), Image.Resampling.NEAREST).save(folder / "pairs" / "labels" / photo.name)
    torch.manual_seed(0)
    save_classifier(folder / "judge.pt", Classifier(("one", "two")))
    crops, second = "--data pairs --resize 20", "--vqgan rgb/last.pt"
    for script, out, flags in (
        (STAGE_ONE, "rgb", "--data photos"),
        (STAGE_ONE, "labels", f"{crops} --input labels --num-labels 3"),
        (STAGE_ONE, "edges", f"{crops} --input edges"),
        (STAGE_TWO, "class", second),
        (STAGE_TWO, "none", f"{second} --cond none"),
        (STAGE_TWO, "coords", f"{second} {crops} --cond coords --coord-levels 63"),
        (STAGE_TWO, "spatial", f"{second} {crops} --cond spatial --cond-vqgan labels/last.pt"),
    ):
        succeeded(run_inside(*script, *flags.split(), "--out", out, cwd=folder))
    return folder
