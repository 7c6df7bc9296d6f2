"""The scripts of results/ train what is missing, and their tables say what the models are."""

import csv
from dataclasses import asdict

import pytest
import torch
from helpers import ROOT, make_photos, run_inside

from minvqgan import VQGAN, VQGANConfig
from minvqgan.harness import checkpoint, data, runtime
from minvqgan.harness.judges import Classifier, save_classifier
from minvqgan.orders import ORDERS

pytestmark = pytest.mark.slow

FLAGS = (
    "--ch 8 --ch-mult 1 2 --z-channels 8 --code-dim 4 --codebook-size 16 --batch-size 4 --val-images 8 "
    "--disc-channels 8 --no-amp"
)


@pytest.fixture(autouse=True)
def beside(monkeypatch):
    """A script finds what lies beside it."""
    monkeypatch.syspath_prepend(ROOT / "results")


@pytest.fixture
def house(tmp_path):
    """A folder with images of two classes and two judges."""
    for part in ("train", "val"):
        for name in ("bird", "cat"):
            make_photos(tmp_path / "photos" / part / name, 6)
    for name in ("classes", "rotations"):
        save_classifier(tmp_path / f"{name}.pt", Classifier(("bird", "cat")))
    return tmp_path


def run(script: str, words: str, house, *more: str) -> None:
    done = run_inside(f"results/{script}", *words.split(), *more, cwd=house)
    assert done.returncode == 0, done.stderr[-3000:]


def table(path) -> list[dict]:
    return list(csv.DictReader(path.open()))


def l1(run, x: torch.Tensor):
    """Of a run's reconstructions of x, as a table rounds it."""
    with torch.no_grad():
        x_hat, _ = checkpoint.load_vqgan(run / "last.pt")(x)
    return pytest.approx((x - x_hat).abs().mean().item(), rel=2e-3)


def test_images_are_held_out_by_class_and_none_is_lost(house):
    def files(folder: str) -> set:
        return {path.relative_to(house / folder) for path in (house / folder).rglob("*.*")}

    for out in ("split", "again"):
        run("split.py", f"--data photos/train --out {out} --held-out 2", house)
    assert files("split") == files("again")
    for name in ("bird", "cat"):
        train, val = files(f"split/train/{name}"), files(f"split/val/{name}")
        assert len(val) == 2 and not train & val and train | val == files(f"photos/train/{name}")


def test_a_table_of_losses(house):
    """Of photographs without classes: several crops of each, and nothing to be right about."""
    for part in ("train", "val"):
        make_photos(house / "scenes" / part, 9)
    words = "--data scenes --resize 40 --crops 3 --judges classes.pt rotations.pt --runs runs --steps 2 --train"
    run("losses.py", f"{words} --table table.csv --figure figure.png", house, "--flags", FLAGS)
    rows = table(house / "table.csv")
    assert [row["loss"] for row in rows] == ["real images", "squared error", "L1", "L1 + D", "L1 + P", "L1 + P + D"]
    assert "class accuracy" not in rows[0] and (house / "figure.png").stat().st_size > 1000

    _, val_set = data.open_data(str(house / "scenes"), 32, 40)
    x = torch.stack([val_set[i, 3 * i + n]["image"] for i in range(9) for n in range(3)])
    assert (x[0] - x[1]).abs().max() > 0.1  # two places of one photograph
    for row, name in ((rows[1], "squared_error_0"), (rows[4], "L1_P_0"), (rows[5], "L1_P_D_0")):
        assert float(row["L1"]) == l1(house / "runs" / name, x)
    assert checkpoint.read(house / "runs" / "squared_error_0" / "last.pt")["flags"]["loss"] == "vqvae"


def test_models_made_with_other_settings_are_not_taken(house):
    from judging import same_settings

    for _ in range(2):
        same_settings(house / "runs", data="photos", steps=2)
    with pytest.raises(runtime.UserError, match="made with steps = 2, not 3"):
        same_settings(house / "runs", data="photos", steps=3)


def test_a_table_of_orders_and_models(house):
    first = VQGAN(VQGANConfig(ch=8, z_channels=8, code_dim=4, codebook_size=16))
    checkpoint.save(house / "vqgan.pt", "vqgan", config=asdict(first.config), model=first.state_dict())
    words = "--data photos --vqgan vqgan.pt --runs runs --steps 2 --long 3 --images 8 --table t.csv --figure f.png"
    words += " --orders orders.csv"
    run("second_stage.py", words, house)
    ends = {(row["model"], row["lr"], row["seed"], row["steps"]): row for row in table(house / "t.csv")}
    # Of both models three rates, a second seed, a longer training.
    assert len(ends) == 2 * (3 + 1 + 1) and all(row["step"] == row["steps"] for row in ends.values())
    assert sorted(row["steps"] for row in ends.values()) == ["2"] * 8 + ["3"] * 2
    orders = table(house / "orders.csv")
    assert {(row["order"], row["seed"]) for row in orders} == {(name, seed) for name in ORDERS for seed in "01"}
    # Row by row is the best transformer of the other table.
    assert {row["nats"] for row in orders if row["order"] == "row"} <= {row["nats"] for row in ends.values()}
    assert all(0 < float(row["nats"]) < 4 for row in orders)  # guessing costs ln 16
    # What is there is not trained again.
    before = {path: path.stat().st_mtime_ns for path in (house / "runs").iterdir()}
    run("second_stage.py", words, house)
    assert before == {path: path.stat().st_mtime_ns for path in (house / "runs").iterdir()}


def test_a_table_of_contexts(house):
    flags = FLAGS.replace("--ch-mult 1 2 ", "").replace("--codebook-size 16 ", "")
    words = "--data photos --judges classes.pt rotations.pt --runs runs --train --vqgan-steps 2 --steps 2 --images 8"
    run("context.py", f"{words} --table t.csv --figure f.png", house, "--flags", flags)
    _, *rows = table(house / "t.csv")
    assert [(row["f"], row["codes"]) for row in rows] == [("1", "1024"), ("2", "256"), ("4", "64"), ("8", "16")]
    assert (house / "f.png").stat().st_size > 1000
    assert all(0 <= float(row["class accuracy"]) <= 1 for row in rows)
    _, val_set = data.open_data(str(house / "photos"), 32)
    x = torch.stack([val_set[i * 12 // 8, None]["image"] for i in range(8)])  # evenly spread: they are sorted by class
    assert float(rows[3]["L1"]) == l1(house / "runs" / "vqgan_f8", x)


def test_a_palette():
    """The nearest colour by brute force, and colours that are the means of their pixels."""
    from context import Palette

    torch.manual_seed(0)
    pixels = torch.rand(1200, 3) * 2 - 1
    palette = Palette(pixels, rounds=100)
    x = pixels.view(2, 20, 30, 3).permute(0, 3, 1, 2)
    indices, brute = palette.encode_indices(x), (pixels[:, None] - palette.colours).square().sum(2).argmin(1)
    assert (indices.flatten() == brute).float().mean() > 0.999  # rounding decides between two equally far colours
    assert torch.equal(palette.decode_indices(indices), palette.colours[indices].permute(0, 3, 1, 2))
    for k in range(5):
        assert torch.allclose(palette.colours[k], pixels[brute == k].mean(0), atol=1e-4)
