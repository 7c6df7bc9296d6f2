"""What the scripts of this folder share: judges and their numbers, trainings, tables, figures.

A judge is a residual classifier that no training has seen, itself trained on sharp images only. The first one knows the
classes of the data, if the data has any. The perceptual network was trained on the same labels, so the two may agree
too well. A judge of rotations never saw a label; it looks at shape and orientation more than at texture. The judges of
the tables (80.6 and 65.5 % of the held-out images right) come from

    python -m minvqgan.harness.judges --data cifar10_split --steps 2800 --amp --out classes.pt
    python -m minvqgan.harness.judges --data cifar10_split --steps 1500 --seed 1 --task rotations --amp \
        --out rotations.pt

where cifar10_split holds train/ (45,000 images) and val/ (5,000), as split.py divides them. A third judge, of rotations
of other photographs (BSDS500's 300, 64 pixels), belongs to the table of road scenes:

    python -m minvqgan.harness.judges --data bsds500 --image-size 64 --batch-size 32 --steps 1500 --task rotations \
        --amp --out photographs.pt
"""

import csv
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

from minvqgan.course import fit
from minvqgan.gpt import GPT
from minvqgan.harness import checkpoint, data, flags
from minvqgan.harness.judges import features_of, load_features, match_classes
from minvqgan.harness.metrics import frechet_distance, precision_recall
from minvqgan.harness.pictures import to_pixels
from minvqgan.harness.runtime import UserError

ROOT = Path(__file__).parent.parent


def add_flags(p: flags.Parser, name: str, images: int = 0) -> None:
    """The flags of the scripts here. name: of the table and the figure. images: that are judged."""
    p.add_argument("--data", required=True, help="as in train_vqgan.py; with train/ and val/")
    p.add_argument("--table", type=Path, default=ROOT / "results" / f"{name}.csv", help="file to write")
    p.add_argument("--figure", type=Path, default=ROOT / "figures" / f"{name}.png", help="file to write")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    if images:
        judges = "classifiers' files; the first knows the data's classes"
        p.add_argument("--judges", nargs="+", required=True, help=judges)
        p.add_argument("--images", type=flags.positive, default=images, help="held-out images")


def same_settings(runs: Path, **settings) -> None:
    """Writes down in the folder `runs` how its models are made. Raises UserError if they were made in another way."""
    path = runs / "settings.json"
    if not path.exists():
        runs.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, default=str))
    there = json.loads(path.read_text())
    for name, asked in settings.items():
        if str(there.get(name)) != str(asked):
            raise UserError(f"{runs} holds models made with {name} = {there.get(name)}, not {asked}; use other --runs")


@torch.enable_grad()
def train_first_stage(args, out: Path, steps: int, words: str) -> None:
    """Train a VQGAN in `out` on --data up to `steps`, if it is not there yet; words: more flags of train_vqgan.py."""
    there = (out / "last.pt").exists()
    if there and checkpoint.read(out / "last.pt")["step"] >= steps:
        return
    sys.path.insert(0, str(ROOT))
    from train_vqgan import main

    given = ["--data", args.data, "--out", str(out), "--device", args.device, "--steps", str(steps)]
    if main([*given, *words.split(), *["--resume"] * there]):
        raise UserError(f"the training of {out} was interrupted")


def in_parts(function: Callable[[Tensor], Tensor], x: Tensor, device: torch.device, size: int = 100) -> Tensor:
    """function(x), a few rows at a time on the device: (N, ...) on the CPU."""
    return torch.cat([function(part.to(device)).cpu() for part in x.split(size)])


def codes_of(vqgan, train_set, val_set, count: int, device: torch.device) -> list[list[Tensor]]:
    """(maps of codes (N, h, w), classes (N,)) of the training set and of `count` held-out images, on the device."""
    wanted = ((train_set, len(train_set)), (val_set, count))
    return [[t.to(device) for t in fit.codes_of(vqgan, images, n)] for images, n in wanted]


def gpt_loss(gpt: GPT, s: Tensor, classes: Tensor, amp: bool) -> Tensor:
    """-log p(s | c), s (B, T) after the classes (B,): the mean over all codes."""
    tokens = torch.cat([gpt.config.num_codes + classes[:, None], s[:, :-1]], 1)  # (B, T)
    with torch.autocast(s.device.type, torch.bfloat16, enabled=amp):
        logits = gpt(tokens)  # (B, T, K)
    return F.cross_entropy(logits.float().flatten(0, 1), s.flatten())


def seconds(device: torch.device) -> float:
    """A clock: CPU time on a CPU, which may have other work to do; on a GPU wall time once its work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


class Judges:
    """The judges of the files, and the held-out images x (N, 3, S, S) with their classes c (N,).

    resize: as in train_vqgan.py. crops: of each image, at places drawn once and for all; 1 is the centre.
    """

    def __init__(self, args, device: torch.device, size: int, resize: int | None = None, crops: int = 1):
        _, val_set = data.open_data(args.data, size, resize)
        count = min(args.images, len(val_set))
        if count < 8:  # distances between halves need four each
            raise UserError(f"{count} held-out images are too few to judge by; at least 8 are needed")
        places = ((i, n) for i in range(count) for n in range(crops))
        keys = [(i * len(val_set) // count, i * crops + n if crops > 1 else None) for i, n in places]
        batch = default_collate([val_set[key] for key in keys])
        self.x, self.c, self.device = batch["image"], batch["class"], device
        self.judges = [load_features(name).to(device) for name in args.judges]
        self.classes = val_set.classes
        if len(self.classes) > 1:
            self.numbers = torch.tensor(match_classes(self.judges[0].net.classes, self.classes))
        self.real = [features_of(judge, self.x.split(100), device) for judge in self.judges]

    def measure(self, images: Tensor, classes: Tensor) -> dict[str, float]:
        """images (M, 3, S, S) against the held-out ones; the first judge also predicts their classes (M,)."""
        row = {}
        for judge, (known, _) in zip(self.judges, self.real, strict=True):
            features, probabilities = features_of(judge, images.split(100), self.device)
            precision, recall = precision_recall(known, features)
            row[f"Fréchet ({judge.name})"] = frechet_distance(known, features)
            row |= {f"precision ({judge.name})": precision, f"recall ({judge.name})": recall}
            if judge is self.judges[0]:
                row |= self._accuracy(probabilities, classes)
        return row

    def floor(self) -> dict[str, float]:
        """The same of the held-out images themselves: the distance between their halves."""
        pairs = zip(self.judges, self.real, strict=True)
        row = {f"Fréchet ({judge.name})": frechet_distance(f[::2], f[1::2]) for judge, (f, _) in pairs}
        return row | self._accuracy(self.real[0][1], self.c)

    def _accuracy(self, probabilities: Tensor, classes: Tensor) -> dict[str, float]:
        if len(self.classes) < 2:
            return {}
        return {"class accuracy": (probabilities.argmax(1) == self.numbers[classes]).double().mean().item()}


def write(path: Path, rows: list[dict]) -> None:
    """Rows as csv; a number that a row does not have stays empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, names)
        table.writeheader()
        table.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def strips(path: Path, shown: dict[str, list[Tensor]], titles: list[str]) -> None:
    """A row for each name, a column for each title: images (n, 3, S, S) side by side."""
    size = (10.5 if len(titles) == 1 else 13, 1.3 / len(titles) * len(shown))
    figure, axes = plt.subplots(len(shown), len(titles), figsize=size, layout="constrained", squeeze=False)
    for row, (name, columns) in zip(axes, shown.items(), strict=True):
        for axis, images in zip(row, columns, strict=True):
            strip = to_pixels(torch.cat(list(images), 2)).permute(1, 2, 0).numpy()
            axis.imshow(strip.repeat(4, 0).repeat(4, 1), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    figure.savefig(path, dpi=110, bbox_inches="tight")
