"""Short trainings of stage one, healthy and sick, for the exercise `diagnose_run` of notebook 04.

python -m minvqgan.course.runs      trains them again and writes runs.csv, in about five minutes
"""

import csv
import itertools
from pathlib import Path

import torch
from torch.utils.data import Dataset

from ..discriminator import PatchDiscriminator
from ..vqgan import VQGAN, VQGANConfig
from . import fit

FILE = Path(__file__).with_suffix(".csv")
STEPS, EVERY, SEEDS = 120, 8, 2
MEASURED = ("l1", "perplexity", "logits_real", "logits_fake", "disc_loss")

# What is wrong -> what was changed in the training, by arguments of `train` or of `fit.fit_vqgan`.
TROUBLES: dict[str, dict] = {
    "healthy": {},
    "collapse": {"revive_every": 0},  # no code is revived, and none begins on a latent
    "D overpowers G": {"disc_lr": 2e-3, "disc_channels": 48},
    "D learns nothing": {"disc_lr": 1e-7},
    "overfitting": {"images": 16},
    "wrong range": {"shown": lambda x: (x + 1) / 2},  # training images in [0, 1], held-out ones in [-1, 1]
}


class Changed(Dataset):
    """The first `images` of a dataset, as `shown` changes them."""

    def __init__(self, dataset, images: int | None, shown):
        self.dataset, self.images, self.shown = dataset, images or len(dataset), shown

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, key: tuple) -> dict:
        item = self.dataset[key]
        return item | {"image": self.shown(item["image"])}


def train(seed: int, disc_channels: int = 16, images: int | None = None, shown=lambda x: x, **how) -> list[dict]:
    """The rows of one run's metrics: means since the last row, and L1 on held-out images."""
    torch.manual_seed(seed)
    train_set, held_out = fit.shapes(16)
    dataset, x = Changed(train_set, images, shown), fit.held_out(held_out, 64)["image"]
    config = VQGANConfig(image_size=16, ch=8, ch_mult=(1, 2), z_channels=16, code_dim=8, codebook_size=64)
    model, disc = VQGAN(config), PatchDiscriminator(channels=disc_channels, num_layers=2)
    since, rows = [], []

    def each(step: int, measured: dict) -> None:
        since.append(measured)
        if step % EVERY == 0:
            with torch.no_grad():
                val_l1 = (x - model.eval()(x)[0]).abs().mean().item()
            model.train()
            row = {name: sum(m[name] for m in since) / len(since) for name in MEASURED} | {"val_l1": val_l1}
            rows.append({"seed": seed, "step": step} | {k: round(v, 4) for k, v in row.items()})
            since.clear()

    fit.fit_vqgan(model, dataset, STEPS, batch_size=16, discriminator=disc, seed=seed, each=each, **how)
    return rows


def load(seed: int = 0) -> dict[str, list[dict[str, float]]]:
    """What is wrong -> the rows of that run, as metrics.csv has them."""
    runs: dict[str, list[dict[str, float]]] = {trouble: [] for trouble in TROUBLES}
    with FILE.open() as file:
        for row in csv.DictReader(file):
            trouble = row.pop("trouble")
            if int(row.pop("seed")) == seed:
                runs[trouble].append({name: float(value) for name, value in row.items()})
    return runs


if __name__ == "__main__":
    kinds = list(itertools.product(range(SEEDS), TROUBLES.items()))
    rows = [{"trouble": name} | row for seed, (name, how) in kinds for row in train(seed, **how)]
    with FILE.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
