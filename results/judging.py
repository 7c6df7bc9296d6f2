"""What the scripts of this folder share: the judges and their numbers.

A judge is a residual classifier that no training has seen, itself trained on sharp images only. The first one knows the
classes of the data, if the data has any. The perceptual network was trained on the same labels, so the two may agree
too well. A judge of rotations never saw a label; it looks at shape and orientation more than at texture. The judges of
the tables (80.6 and 65.5 % of the held-out images right) come from

    python -m minvqgan.harness.judges --data cifar10_split --steps 2800 --amp --out classes.pt
    python -m minvqgan.harness.judges --data cifar10_split --steps 1500 --seed 1 --task rotations --amp \
        --out rotations.pt

where cifar10_split holds train/ (45,000 images) and val/ (5,000, as many of each class), made by split.py. A third
judge, of rotations of other photographs (BSDS500's 300, 64 pixels), belongs to the table of road scenes:

    python -m minvqgan.harness.judges --data bsds500 --image-size 64 --batch-size 32 --steps 1500 --task rotations \
        --amp --out photographs.pt
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from minvqgan.harness import data, flags
from minvqgan.harness.judges import features_of, load_features, match_classes
from minvqgan.harness.metrics import frechet_distance, precision_recall

ROOT = Path(__file__).parent.parent


def parser(description: str, name: str, images: int) -> flags.Parser:
    """The flags of all scripts that judge. name: of the table and the figure. images: held-out images that are used."""
    p = flags.Parser(description=description)
    p.add_argument("--data", required=True, help="as in train_vqgan.py; with train/ and val/")
    p.add_argument("--judges", nargs="+", required=True, help="classifiers; the first knows the data's classes")
    p.add_argument("--images", type=flags.positive, default=images, help="held-out images")
    p.add_argument("--table", type=Path, default=ROOT / "results" / f"{name}.csv", help="file to write")
    p.add_argument("--figure", type=Path, default=ROOT / "figures" / f"{name}.png", help="file to write")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    return p


@torch.no_grad()
def in_parts(function: Callable[[Tensor], Tensor], x: Tensor, device: torch.device) -> Tensor:
    """function(x), a few rows at a time on the device: (N, ...) on the CPU."""
    return torch.cat([function(part.to(device)).cpu() for part in x.split(100)])


class Judges:
    """The judges of the files, and the held-out images x (N, 3, S, S) with their classes c (N,), centre-cropped."""

    def __init__(self, args, device: torch.device, size: int, resize: int | None = None):
        args.table.parent.mkdir(parents=True, exist_ok=True)  # what cannot be written must not be found out at the end
        _, val_set = data.open_data(args.data, size, resize)
        batch = next(data.held_out_batches(val_set, args.images, args.images))
        self.x, self.c, self.classes, self.device = batch["image"], batch["class"], val_set.classes, device
        self.judges = [load_features(name).to(device) for name in args.judges]
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
        numbers = torch.tensor(match_classes(self.judges[0].net.classes, self.classes))
        return {"class accuracy": (probabilities.argmax(1) == numbers[classes]).double().mean().item()}
