"""VQGAN or VQ-VAE? (Sec. 3.1, 4.1) One first stage trained under five losses, judged on images that no training saw.

    python results/losses.py --data cifar10_split --judges classes.pt rotations.pt --runs runs/losses --train
    python results/losses.py --data camvid --resize 128 --size 64 --crops 4 --steps 600 --runs runs/losses_camvid \
        --judges classes.pt rotations.pt photographs.pt --flags="--ch-mult 1 2 4 4 --batch-size 16" \
        --table results/losses_camvid.csv --figure figures/losses_camvid.png --train

`--train` trains what is not there yet, with train_vqgan.py and equal steps. Without it the table is remade from the
checkpoints. What the judges can tell: judging.py.
"""

import subprocess
import sys
from pathlib import Path

import matplotlib
import torch
from judging import Judges, add_flags, same_settings, write
from torch import Tensor

from minvqgan.harness import checkpoint, flags, metrics, runtime
from minvqgan.harness.pictures import to_pixels
from minvqgan.harness.runtime import UserError

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
    words = ["--data", args.data, "--out", str(out)]  # names may hold spaces
    words += f"--image-size {args.size} --resize {args.resize or args.size}".split()
    words += f"--steps {args.steps} --seed {seed} {LOSSES[loss]} {args.flags}".split()
    if (out / "last.pt").exists():
        if checkpoint.read(out / "last.pt")["step"] >= args.steps:
            return
        words.append("--resume")
    if subprocess.run([sys.executable, ROOT / "train_vqgan.py", *words]).returncode:
        raise UserError(f"the training of {out} did not end, see above")


@torch.no_grad()
def measure(args, judges: Judges) -> tuple[list[dict], dict[str, Tensor]]:
    """Numbers, a row a model, and a few of its reconstructions by loss."""
    x, some = judges.x, torch.tensor(SHOWN) * len(judges.x) // 500
    rows, shown = [{"loss": "real images", **judges.floor()}], {"real": x[some]}
    for loss in LOSSES:
        for seed in args.seeds:
            path = folder(args.runs, loss, seed) / "last.pt"
            if not path.exists():
                continue
            model = checkpoint.load_vqgan(path)
            x_hat = torch.cat([model(part)[0] for part in x.split(100)])
            errors = {
                name.upper(): value.mean().item() for name, value in metrics.image_metrics(x, x_hat, None).items()
            }
            rows.append({"loss": loss, "seed": seed, **errors, **judges.measure(x_hat, judges.c)})
            shown.setdefault(loss, x_hat[some])
            print(rows[-1], flush=True)
    return rows, shown


def figure(shown: dict[str, Tensor], path: Path) -> None:
    """The same images under each loss, a row each, enlarged."""
    fig, axes = plt.subplots(len(shown), 1, figsize=(10.5, 1.35 * len(shown)), layout="constrained")
    for axis, (name, images) in zip(axes, shown.items(), strict=True):
        strip = to_pixels(torch.cat(list(images), 2)).permute(1, 2, 0).numpy()
        axis.imshow(strip.repeat(4, 0).repeat(4, 1), interpolation="nearest")
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set_xticks([]), axis.set_yticks([])
    fig.savefig(path, dpi=110, bbox_inches="tight")


def main() -> int:
    p = flags.Parser(description=__doc__)
    add_flags(p, "losses", images=2500)
    p.add_argument("--runs", type=Path, default=Path("runs/losses"), help="folder of the run folders")
    p.add_argument("--size", type=flags.size, default=32, help="side of the images")
    p.add_argument("--resize", type=flags.size, help="as in train_vqgan.py")
    p.add_argument("--crops", type=flags.positive, default=1, help="of each held-out image")
    p.add_argument("--train", action="store_true", help="train the models that are missing")
    p.add_argument("--steps", type=flags.positive, default=1800, help="of each training")
    p.add_argument("--seeds", type=flags.natural, nargs="+", default=[0], help="of the trainings")
    p.add_argument("--flags", type=str, default="", help="more flags for each training")
    args = p.parse_args()
    if args.train:
        same_settings(args.runs, data=args.data, size=args.size, resize=args.resize, flags=args.flags)
        for seed in args.seeds:
            for loss in LOSSES:
                train(args, loss, seed)
    if not any((folder(args.runs, loss, seed) / "last.pt").exists() for loss in LOSSES for seed in args.seeds):
        raise UserError(f"there is no model in {args.runs}; --train makes them")
    rows, shown = measure(args, Judges(args.judges, args.data, args.size, args.images, args.resize, args.crops))
    write(args.table, rows)
    figure(shown, args.figure)
    return 0


if __name__ == "__main__":
    runtime.run(main)
