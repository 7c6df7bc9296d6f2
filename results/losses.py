"""VQGAN or VQ-VAE? (Sec. 3.1, 4.1) One first stage trained under five losses, judged on images that no training saw.

    python results/losses.py --data cifar10_split --judges classes.pt rotations.pt --runs runs/losses --train

`--train` trains what is not there yet, with train_vqgan.py and equal steps: an hour on two cores. Without it the table
is remade from the checkpoints. The judges are residual classifiers of minvqgan.harness.classifier, trained on the
training images, sharp ones only. What each can tell: the judge of classes looks at what makes a cat a cat, and the
perceptual network was trained on the same labels, so the two may share their taste; the judge of rotations never saw a
label, and looks at shape and orientation more than at texture.
"""

import subprocess
import sys
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from minvqgan.harness import checkpoint, data, flags, metrics, runtime
from minvqgan.harness.classifier import match_classes
from minvqgan.harness.distances import frechet_distance, precision_recall
from minvqgan.harness.pictures import to_pixels

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
# What is learned, as flags of train_vqgan.py. D that starts after the last step is no D.
LOSSES = {
    "squared error": "--loss vqvae",
    "L1": "--perceptual none --disc-start 1",
    "L1 + D": "--perceptual none",
    "L1 + P": "--disc-start 1",
    "L1 + P + D": "",
}
SHOWN = [4, 60, 130, 190, 260, 315, 380, 440]  # of 500 held-out images in the order of their classes


def folder(runs: Path, loss: str, seed: int) -> Path:
    return runs / f"{loss.replace(' + ', '_').replace(' ', '_')}_{seed}"


def train(args, loss: str, seed: int) -> None:
    out = folder(args.runs, loss, seed)
    words = f"--data {args.data} --steps {args.steps} --seed {seed} --out {out} {LOSSES[loss]} {args.flags}".split()
    if (out / "last.pt").exists():
        if checkpoint.read(out / "last.pt")["step"] >= args.steps:
            return
        words.append("--resume")
    subprocess.run([sys.executable, ROOT / "train_vqgan.py", *words], check=True)


def measure(x: Tensor, x_hat: Tensor, classes: Tensor, judges: list, real: list[Tensor]) -> dict[str, float]:
    """The numbers of one model: held-out images x and reconstructions x_hat (N, 3, S, S), their classes (N,), the
    judges and their features of x."""
    row = {name: value.mean().item() for name, value in metrics.image_metrics(x, x_hat, None).items()}
    for judge, known in zip(judges, real, strict=True):
        seen = [judge(part.clamp(-1, 1)) for part in x_hat.split(100)]
        features, probabilities = (torch.cat(parts) for parts in zip(*seen, strict=True))
        row[f"Fréchet ({judge.name})"] = frechet_distance(known, features)
        precision, recall = precision_recall(known, features)
        row |= {f"precision ({judge.name})": precision, f"recall ({judge.name})": recall}
        if judge is judges[0]:
            row["class accuracy"] = (probabilities.argmax(1) == classes).double().mean().item()
    return row


@torch.no_grad()
def main() -> int:
    p = flags.Parser(description=__doc__.split("\n")[0])
    p.add_argument("--data", required=True, help="as in train_vqgan.py; with train/ and val/")
    p.add_argument("--judges", nargs="+", required=True, help="classifiers' files; the first knows the data's classes")
    p.add_argument("--runs", type=Path, default=Path("runs/losses"), help="folder of the run folders")
    p.add_argument("--train", action="store_true", help="train the models that are missing")
    p.add_argument("--steps", type=flags.positive, default=1800, help="of each training")
    p.add_argument("--seeds", type=flags.natural, nargs="+", default=[0, 1], help="of the trainings")
    p.add_argument("--flags", default="", help="more flags for each training")
    p.add_argument("--images", type=flags.positive, default=5000, help="held-out images")
    p.add_argument("--table", type=Path, default=ROOT / "results" / "losses.md", help="file to write")
    p.add_argument("--figure", type=Path, default=ROOT / "figures" / "losses.png", help="file to write")
    args = p.parse_args()
    if args.train:
        for seed in args.seeds:
            for loss in LOSSES:
                train(args, loss, seed)

    _, val_set = data.open_data(args.data, 32)
    batches = list(data.held_out_batches(val_set, 100, args.images))
    x, classes = torch.cat([b["image"] for b in batches]), torch.cat([b["class"] for b in batches])
    judges = [metrics.load_features(name) for name in args.judges]
    classes = torch.tensor(match_classes(judges[0].classifier.classes, val_set.classes))[classes]
    real = [torch.cat([judge(part)[0] for part in x.split(100)]) for judge in judges]
    # Two halves of the real images: what a perfect model would get, of half as many images.
    floor = [frechet_distance(features[::2], features[1::2]) for features in real]
    real_right = (torch.cat([judges[0](part)[1] for part in x.split(100)]).argmax(1) == classes).double().mean().item()

    rows, shown = {}, {"real": x[torch.tensor(SHOWN) * len(x) // 500]}
    for loss in LOSSES:
        found = [folder(args.runs, loss, seed) / "last.pt" for seed in args.seeds]
        for path in filter(Path.exists, found):
            model = checkpoint.load_vqgan(path)
            x_hat = torch.cat([model(part)[0] for part in x.split(100)])
            rows.setdefault(loss, []).append(measure(x, x_hat, classes, judges, real))
            shown.setdefault(loss, x_hat[torch.tensor(SHOWN) * len(x) // 500])
            print(loss, path, {k: round(v, 3) for k, v in rows[loss][-1].items()}, flush=True)
    note = (
        f"{len(x)} held-out images. Real images: class accuracy {real_right:.1%}; Fréchet distance of two halves "
        + ", ".join(f"{d:.2f} ({judge.name})" for d, judge in zip(floor, judges, strict=True))
    )
    args.table.write_text(f"{table(rows)}\n\n{note}\n")
    print(args.table.read_text())
    figure(shown, args.figure)
    return 0


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: a line a loss, mean over the seeds ± half the range of them."""
    names = list(next(iter(rows.values()))[0])
    lines = ["| loss | seeds | " + " | ".join(names) + " |", "| --- " * (len(names) + 2) + "|"]
    for loss, runs in rows.items():
        cells = []
        for name in names:
            values = [run[name] for run in runs]
            mean, half = sum(values) / len(values), (max(values) - min(values)) / 2
            cells.append(f"{mean:.3g}" + (f" ± {half:.2g}" if len(values) > 1 else ""))
        lines.append(f"| {loss} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(shown: dict[str, Tensor], path: Path) -> None:
    """The same images under each loss, a row each, enlarged four times."""
    fig, axes = plt.subplots(len(shown), 1, figsize=(10.5, 1.35 * len(shown)), layout="constrained")
    for axis, (name, images) in zip(axes, shown.items(), strict=True):
        strip = to_pixels(torch.cat(list(images), 2)).permute(1, 2, 0).numpy()
        axis.imshow(strip.repeat(4, 0).repeat(4, 1), interpolation="nearest")
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set_xticks([]), axis.set_yticks([])
    fig.savefig(path, dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    runtime.run(main)
