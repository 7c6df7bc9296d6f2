"""results/losses.py trains what is missing, and its table says what the models are."""

import csv
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, make_photos

from minvqgan.harness import checkpoint, data
from minvqgan.harness.classifier import Classifier, save_classifier

FLAGS = (
    "--ch 8 --ch-mult 1 2 --z-channels 8 --code-dim 4 --codebook-size 16 --batch-size 4 --val-images 8 "
    "--disc-channels 8 --no-amp"
)


def test_a_table_of_losses(tmp_path):
    for part in ("train", "val"):
        for name in ("bird", "cat"):
            make_photos(tmp_path / "photos" / part / name, 6)
    for name in ("classes", "rotations"):
        save_classifier(tmp_path / f"{name}.pt", Classifier(("bird", "cat")))
    words = "--data photos --judges classes.pt rotations.pt --runs runs --seeds 0 --steps 2 --images 12".split()
    files = ["--table", "table.csv", "--figure", "figure.png", "--flags", FLAGS]
    command = [sys.executable, ROOT / "results" / "losses.py", *words, *files]
    done = subprocess.run([*command, "--train"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [row["loss"] for row in rows] == ["real images", "squared error", "L1", "L1 + D", "L1 + P", "L1 + P + D"]
    assert (tmp_path / "figure.png").stat().st_size > 1000

    # The L1 of a row is that of the model which the loss in its name trained.
    x = next(data.held_out_batches(data.open_data(str(tmp_path / "photos"), 32)[1], 12, 12))["image"]
    for folder, row in (("squared_error_0", rows[1]), ("L1_P_D_0", rows[5])):
        with torch.no_grad():
            x_hat, _ = checkpoint.load_vqgan(tmp_path / "runs" / folder / "last.pt")(x)
        assert float(row["L1"]) == pytest.approx((x - x_hat).abs().mean().item(), rel=2e-3)
        assert checkpoint.read(tmp_path / "runs" / folder / "last.pt")["flags"]["seed"] == 0
    assert checkpoint.read(tmp_path / "runs" / "squared_error_0" / "last.pt")["flags"]["loss"] == "vqvae"
