"""Quality against variety (Sec. 4.4): what top-k, top-p, guidance and rejection do to class-conditional samples.

    python results/sampling.py --gpt notebooks/checkpoints/cifar_gpt.pt --data cifar10_split --judges C.pt R.pt

Equally many new images for each setting, from the same seeds, compared with as many held-out images by networks that no
training has seen (see losses.py). Rejection keeps the images of which the package's small network is surest: another
network than the judges.
"""

from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from minvqgan import Sampling
from minvqgan.harness import checkpoint, data, flags, metrics, runtime
from minvqgan.harness.classifier import load_classifier, match_classes
from minvqgan.harness.distances import frechet_distance, precision_recall
from minvqgan.sampler import reject

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
FAMILIES = {  # name: {label: (sampling, fraction that is kept)}
    "top-k": {f"{k}": (Sampling(top_k=k), 1) for k in (200, 100, 50, 20, 10)},
    "top-p": {f"{p}": (Sampling(top_p=p), 1) for p in (0.98, 0.95, 0.9, 0.8, 0.7)},
    "guidance": {f"{g}": (Sampling(guidance=g), 1) for g in (1.25, 1.5, 2, 3)},
    "guidance, top-p 0.9": {f"{g}": (Sampling(guidance=g, top_p=0.9), 1) for g in (1.25, 1.5, 2, 2.5)},
    "rejection, kept": {f"{rate}": (Sampling(), rate) for rate in (0.5, 0.25, 0.1, 0.05)},
}


def draw(model, sampling: Sampling, keep: float, n: int, rejector) -> tuple[Tensor, Tensor]:
    """n images of the model's classes in turn, the surest `keep` of n / keep -> (n, 3, S, S), classes (n,)."""
    images, classes = [], []
    numbers = match_classes(rejector.classes, tuple(model.config.classes))
    per_class = n // len(numbers)
    for c in range(len(numbers)):
        asked = torch.full((round(per_class / keep),), c)
        x = model.sample(asked, seed=c * 100_000, sampling=sampling).clamp(-1, 1)
        if keep < 1:
            scores = torch.cat([rejector(part).log_softmax(1)[:, numbers[c]] for part in x.split(500)])
            x = x[reject(scores, keep)[:per_class]]
        images.append(x)
        classes += [c] * len(x)
    return torch.cat(images), torch.tensor(classes)


@torch.no_grad()
def main() -> int:
    p = flags.Parser(description=__doc__.split("\n")[0])
    p.add_argument("--gpt", required=True, help="a class-conditional transformer")
    p.add_argument("--data", required=True, help="as in train_vqgan.py; with train/ and val/")
    p.add_argument("--judges", nargs="+", required=True, help="classifiers' files; the first knows the data's classes")
    p.add_argument("--images", type=flags.positive, default=2000, help="of each setting")
    p.add_argument("--table", type=Path, default=ROOT / "results" / "sampling.md", help="file to write")
    p.add_argument("--figure", type=Path, default=ROOT / "figures" / "sampling.png", help="file to write")
    args = p.parse_args()

    model = checkpoint.load(args.gpt)
    _, val_set = data.open_data(args.data, model.config.n * model.vqgan.config.f)
    judges = [metrics.load_features(name) for name in args.judges]
    numbers = torch.tensor(match_classes(judges[0].classifier.classes, tuple(model.config.classes)))
    x = torch.cat([b["image"] for b in data.held_out_batches(val_set, 100, args.images)])
    real = [torch.cat([judge(part)[0] for part in x.split(100)]) for judge in judges]
    # What no transformer can better: the held-out images themselves through the first stage.
    settings = {("reconstructions", ""): None, ("as it is", ""): (Sampling(), 1)}
    settings |= {(family, label): how for family, found in FAMILIES.items() for label, how in found.items()}
    rejector, rows = load_classifier(metrics.SMALL), {}
    for name, how in settings.items():
        if how is None:
            images, classes = torch.cat([model.vqgan(part)[0] for part in x.split(100)]).clamp(-1, 1), None
        else:
            images, classes = draw(model, *how, args.images, rejector)
        rows[name] = measure(images, classes, judges, real, numbers)
        print(*name, {k: round(v, 3) for k, v in rows[name].items()}, flush=True)
    args.table.write_text(table(rows) + f"\n\n{len(x)} images each.\n")
    figure(rows, judges, args.figure)
    return 0


def measure(images: Tensor, classes: Tensor | None, judges: list, real: list[Tensor], numbers: Tensor) -> dict:
    """The numbers of images (N, 3, S, S); the first judge also says whether it sees the classes (N,) asked for."""
    row = {}
    for judge, known in zip(judges, real, strict=True):
        seen = [judge(part) for part in images.split(100)]
        features, probabilities = (torch.cat(parts) for parts in zip(*seen, strict=True))
        row[f"Fréchet ({judge.name})"] = frechet_distance(known, features)
        precision, recall = precision_recall(known, features)
        row |= {f"precision ({judge.name})": precision, f"recall ({judge.name})": recall}
        if judge is judges[0] and classes is not None:
            row["class accuracy"] = (probabilities.argmax(1) == numbers[classes]).double().mean().item()
    return row


def table(rows: dict[tuple[str, str], dict[str, float]]) -> str:
    names = list(rows["as it is", ""])
    lines = ["| sampling | | " + " | ".join(names) + " |", "| --- " * (len(names) + 2) + "|"]
    for (family, label), row in rows.items():
        cells = [f"{row[name]:.3g}" if name in row else "" for name in names]
        lines.append(f"| {family} | {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(rows: dict, judges: list, path: Path) -> None:
    """By each judge: Fréchet distance over class accuracy, and recall over precision; a curve a family."""
    axis_names = [("class accuracy", f"Fréchet ({judge.name})") for judge in judges]
    axis_names += [(f"precision ({judge.name})", f"recall ({judge.name})") for judge in judges]
    fig, axes = plt.subplots(1, len(axis_names), figsize=(4 * len(axis_names), 3.4), layout="constrained")
    for axis, (across, up) in zip(axes, axis_names, strict=True):
        for family in FAMILIES:
            # Each curve begins at the model as it is.
            points = [rows["as it is", ""]] + [row for (name, _), row in rows.items() if name == family]
            axis.plot([q[across] for q in points], [q[up] for q in points], "o-", ms=3, label=family)
        axis.plot(rows["as it is", ""][across], rows["as it is", ""][up], "ko", label="as it is")
        axis.set(xlabel=across, ylabel=up)
    axes[0].legend(fontsize=7)
    fig.savefig(path, dpi=130)


if __name__ == "__main__":
    runtime.run(main)
