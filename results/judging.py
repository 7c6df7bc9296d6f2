"""What the tables of this folder share: judges, their numbers, and a file of them.

A judge is a residual classifier of minvqgan.harness.judges that no training has seen, itself trained on sharp
images only. The first one knows the classes of the data, where the data has any. The perceptual network was trained on
the same labels, so the two may share their taste; a judge of rotations never saw a label, and looks at shape and
orientation more than at texture. Those of the tables (80.6 and 65.5 % right on held-out images) come from

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
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import default_collate

from minvqgan.harness import data, flags, judges
from minvqgan.harness.judges import match_classes
from minvqgan.harness.metrics import frechet_distance, precision_recall
from minvqgan.harness.runtime import UserError


def same_settings(runs: Path, **settings) -> None:
    """Notes in the folder `runs` what its models are made with. Raises UserError where they were made with something
    else: they would be taken for what is asked now."""
    settings, path = {name: str(value) for name, value in settings.items()}, runs / "settings.json"
    if not path.exists():
        runs.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    there = json.loads(path.read_text())
    odd = [name for name in settings if there.get(name) != settings[name]]
    if odd:
        was, asked = there.get(odd[0]), settings[odd[0]]
        raise UserError(f"{runs} holds models made with {odd[0]} = {was}, not {asked}; choose other --runs")


def add_flags(p: flags.Parser, name: str, images: int) -> None:
    root = Path(__file__).parent.parent
    p.add_argument("--data", required=True, help="as in train_vqgan.py; with train/ and val/")
    p.add_argument("--judges", nargs="+", required=True, help="classifiers' files; the first knows the data's classes")
    p.add_argument("--images", type=flags.positive, default=images, help="held-out images")
    p.add_argument("--table", type=Path, default=root / "results" / f"{name}.csv", help="file to write")
    p.add_argument("--figure", type=Path, default=root / "figures" / f"{name}.png", help="file to write")


class Judges:
    """The judges' files and the held-out images x (N, 3, S, S) with their classes (N,).

    resize: as in train_vqgan.py. crops: of each image, at places drawn once and for all; 1 is the centre.
    """

    def __init__(self, files: list[str], folder: str, size: int, count: int, resize: int | None = None, crops: int = 1):
        _, val_set = data.open_data(folder, size, resize)
        count = min(count, len(val_set))
        if count < 8:  # distances between halves need four each
            raise UserError(f"{count} held-out images are too few to judge by; give 8 at least")
        batches = list(data.held_out_batches(val_set, 100, count))
        if crops > 1:
            keys = ((i * len(val_set) // count, i * crops + n) for i in range(count) for n in range(crops))
            batches = [default_collate([val_set[key] for key in keys])]
        self.judges = [judges.load_features(name) for name in files]
        self.classes = val_set.classes
        if len(self.classes) > 1:
            self.numbers = torch.tensor(match_classes(self.judges[0].net.classes, self.classes))
        self.x, self.c = torch.cat([b["image"] for b in batches]), torch.cat([b["class"] for b in batches])
        self.real = [self._seen(judge, self.x)[0] for judge in self.judges]

    @staticmethod
    @torch.no_grad()
    def _seen(judge, images: Tensor) -> tuple[Tensor, Tensor]:
        features, probabilities = zip(*[judge(part.clamp(-1, 1)) for part in images.split(100)], strict=True)
        return torch.cat(features), torch.cat(probabilities)

    def measure(self, images: Tensor, classes: Tensor) -> dict[str, float]:
        """images (M, 3, S, S) beside the held-out ones; the first judge also says how many have their classes (M,)."""
        row = {}
        for judge, known in zip(self.judges, self.real, strict=True):
            features, probabilities = self._seen(judge, images)
            row[f"Fréchet ({judge.name})"] = frechet_distance(known, features)
            precision, recall = precision_recall(known, features)
            row |= {f"precision ({judge.name})": precision, f"recall ({judge.name})": recall}
            if judge is self.judges[0] and len(self.classes) > 1:
                row["class accuracy"] = (probabilities.argmax(1) == self.numbers[classes]).double().mean().item()
        return row

    def floor(self) -> dict[str, float]:
        """The held-out images themselves: how many the first judge has right, how far two halves of them are apart."""
        halves = zip(self.judges, self.real, strict=True)
        row = {f"Fréchet ({judge.name})": frechet_distance(f[::2], f[1::2]) for judge, f in halves}
        if len(self.classes) > 1:
            right = self._seen(self.judges[0], self.x)[1].argmax(1) == self.numbers[self.c]
            row["class accuracy"] = right.double().mean().item()
        return row


def write(path: Path, rows: list[dict]) -> None:
    """Rows of numbers and names as csv; a number that a row does not have stays empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, names)
        table.writeheader()
        table.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
