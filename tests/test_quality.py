"""A floor for quality: both default models learn `shapes` in some seconds.

The bounds leave more room than seeds have needed: ten gave 0.22 to 0.27, 0.18 to 0.52 and 0.19 to 0.41 in the first
test, six 4.62 to 4.70 in the second.
"""

from helpers import ROOT, metrics_rows, run_inside, succeeded

import minvqgan
from minvqgan.harness import data, pictures


def test_the_default_first_stage_learns_in_60_steps(tmp_path):
    """Held-out L1, codes in use, and a D that tells real from fake."""
    words = "--steps 60 --batch-size 8 --val-images 32 --no-amp --out run".split()
    succeeded(run_inside("train_vqgan.py", *words, cwd=tmp_path))
    last = metrics_rows(tmp_path / "run")[-1]
    assert float(last["val_l1"]) < 0.32 and float(last["val_usage"]) > 0.1, last
    assert float(last["disc_loss"]) < 0.6 and float(last["logits_real"]) > 0.2 > -0.2 > float(last["logits_fake"]), last


def test_the_default_transformer_learns_in_60_steps(tmp_path):
    """Nats per code on a trained first stage; the frequencies of the codes alone give 5.42, ln K = 5.55."""
    vqgan = minvqgan.load(ROOT / "notebooks/checkpoints/gpt.pt").vqgan
    minvqgan.save_model(tmp_path / "first.pt", vqgan)
    for part, images, n in zip(("train", "val"), data.open_data("shapes", 32), (256, 64), strict=True):
        for i in range(n):
            item = images[i, None]
            folder = tmp_path / "data" / part / images.classes[item["class"]]
            folder.mkdir(parents=True, exist_ok=True)
            pictures.save(pictures.to_image(item["image"]), folder / f"{i}.png")
    words = "--vqgan first.pt --data data --steps 60 --batch-size 16 --val-images 64 --no-amp --out run".split()
    succeeded(run_inside("train_gpt.py", *words, cwd=tmp_path))
    assert float(metrics_rows(tmp_path / "run")[-1]["val_nats"]) < 4.85
