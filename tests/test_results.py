"""The scripts of results/ train what is missing, and their tables say what the models are."""

import csv

import pytest
import torch
from helpers import ROOT, assert_one_line_error, make_photos, run_inside

import minvqgan
from minvqgan import VQGAN, VQGANConfig
from minvqgan.harness import checkpoint, data
from minvqgan.harness.judges import Classifier, load_classifier, save_classifier
from minvqgan.orders import ORDERS

pytestmark = pytest.mark.slow

FLAGS = (
    "--ch 8 --ch-mult 1 2 --z-channels 8 --code-dim 4 --codebook-size 16 --batch-size 4 --val-images 8 "
    "--disc-channels 8 --no-amp"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with images of two classes and two judges. A script finds what lies beside it."""
    monkeypatch.syspath_prepend(ROOT / "results")
    for part in ("train", "val"):
        for name in ("bird", "cat"):
            make_photos(tmp_path / "photos" / part / name, 6)
    for name in ("classes", "rotations"):
        save_classifier(tmp_path / f"{name}.pt", Classifier(("bird", "cat")))
    return tmp_path


def run(script: str, words: str, folder, *more: str) -> None:
    done = run_inside(f"results/{script}", *words.split(), *more, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]


def table(path) -> list[dict]:
    return list(csv.DictReader(path.open()))


def test_a_table_of_losses(folder):
    """Of photographs without classes: nothing to be right about."""
    for part in ("train", "val"):
        make_photos(folder / "scenes" / part, 9)
    words = "--data scenes --resize 40 --judges classes.pt rotations.pt --runs runs --steps 2"
    run("losses.py", f"{words} --table table.csv --figure figure.png", folder, "--flags", FLAGS)
    rows = table(folder / "table.csv")
    assert [row["loss"] for row in rows] == ["real images", "squared error", "L1", "L1 + D", "L1 + P", "L1 + P + D"]
    assert "class accuracy" not in rows[0] and (folder / "figure.png").stat().st_size > 1000

    _, val_set = data.open_data(str(folder / "scenes"), 32, 40)
    x = next(data.held_out_batches(val_set, 9, 9))["image"]
    for row, name in ((rows[1], "squared_error_0"), (rows[4], "L1_P_0"), (rows[5], "L1_P_D_0")):
        with torch.no_grad():
            x_hat, _ = checkpoint.load_vqgan(folder / "runs" / name / "last.pt")(x)
        assert float(row["L1"]) == pytest.approx((x - x_hat).abs().mean().item(), rel=1e-4)
    assert checkpoint.read(folder / "runs" / "squared_error_0" / "last.pt")["flags"]["loss"] == "vqvae"


def test_a_table_of_orders_and_models(folder):
    model = VQGAN(VQGANConfig(ch=8, z_channels=8, code_dim=4, codebook_size=16))
    checkpoint.save_model(folder / "vqgan.pt", model)
    words = "--data photos --model vqgan.pt --steps 2 --long 3 --images 8 --out ."
    run("second_stage.py", words, folder)
    ends = {(row["model"], row["lr"], row["seed"], row["steps"]): row for row in table(folder / "second_stage.csv")}
    # Of both models three rates, a second seed, a longer training.
    assert len(ends) == 2 * (3 + 1 + 1) and all(row["step"] == row["steps"] for row in ends.values())
    assert sorted(row["steps"] for row in ends.values()) == ["2"] * 8 + ["3"] * 2
    orders = table(folder / "orders.csv")
    assert {(row["order"], row["seed"]) for row in orders} == {(name, seed) for name in ORDERS for seed in "01"}
    # Row by row is the best transformer of the other table.
    assert {row["nats"] for row in orders if row["order"] == "row"} <= {row["nats"] for row in ends.values()}
    assert all(0 < float(row["nats"]) < 4 for row in orders)  # guessing costs ln 16


def test_a_table_of_samples(folder, house):
    """The rejector, by default one of CIFAR-10, need not know the model's classes if nothing is rejected."""
    for part in ("train", "val"):
        for name in ("one", "two"):
            make_photos(folder / "two" / part / name, 6, size=(16, 16))
    words = f"--gpt {house}/class/best.pt --data two --judges {house}/judge.pt --images 12 --table t.csv --figure f.png"
    run("sampling.py", words, folder, "--only", "as it is", "guidance")
    rows = table(folder / "t.csv")
    assert [row["sampling"] for row in rows] == ["real images", "reconstructions", "as it is", *["guidance"] * 4]
    model, judge = minvqgan.load(house / "class" / "best.pt"), load_classifier(house / "judge.pt")
    with torch.no_grad():  # the very samples again: class c with seed c
        right = [judge(model.sample(torch.tensor([c] * 6), seed=c).clamp(-1, 1)).argmax(1) == c for c in (0, 1)]
    assert float(rows[2]["class accuracy"]) == pytest.approx(torch.cat(right).double().mean().item(), rel=1e-3)
    done = run_inside("results/sampling.py", *words.split(), "--only", "rejection, kept", cwd=folder)
    assert_one_line_error(done, "does not know the class 'one'")
