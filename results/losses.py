"""VQGAN or VQ-VAE? (Sec. 3.1, 4.1) One first-stage model trained with five losses, judged on held-out images.

    python results/losses.py --data cifar10_split --judges classes.pt rotations.pt
    python results/losses.py --data camvid --resize 128 --size 64 --steps 600 --runs runs/losses_camvid \
        --judges classes.pt rotations.pt photographs.pt --flags="--ch-mult 1 2 4 4 --batch-size 16" \
        --table results/losses_camvid.csv --figure figures/losses_camvid.png

Models that are not in --runs are trained by train_vqgan.py. What the judges can tell: judging.py.
"""

import itertools
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from judging import ROOT, Judges, in_parts, parser
from torch import Tensor

from minvqgan import VQGAN
from minvqgan.harness import checkpoint, flags, metrics, pictures, runtime
from minvqgan.harness.run import write_csv

# The losses as flags of train_vqgan.py. A D that starts after the last step never learns.
LOSSES = {
    "squared error": "--loss vqvae",
    "L1": "--perceptual none --disc-start 1",
    "L1 + D": "--perceptual none",
    "L1 + P": "--disc-start 1",
    "L1 + P + D": "",
}


def trained(args, loss: str, seed: int) -> VQGAN:
    """The model of --runs, trained up to --steps if it is not yet."""
    out = args.runs / f"{loss.replace(' + ', '_').replace(' ', '_')}_{seed}"
    there = (out / "last.pt").exists()
    if not there or checkpoint.read(out / "last.pt")["step"] < args.steps:
        sys.path.insert(0, str(ROOT))
        from train_vqgan import main

        words = f"--image-size {args.size} --resize {args.resize or args.size} --seed {seed} --steps {args.steps}"
        given = ["--data", args.data, "--out", str(out), "--device", args.device, *["--resume"] * there]
        if main([*given, *words.split(), *LOSSES[loss].split(), *args.flags.split()]):
            raise KeyboardInterrupt  # caught by the training, which has saved what there is
    return checkpoint.load_vqgan(out / "last.pt")


def figure(path: Path, shown: dict[str, Tensor]) -> None:
    """A row of images (n, 3, S, S) for each name."""
    figure, axes = plt.subplots(len(shown), figsize=(10.5, 1.3 * len(shown)), layout="constrained")
    for axis, (name, images) in zip(axes, shown.items(), strict=True):
        strip = pictures.to_image(torch.cat(list(images), 2))
        axis.imshow(strip.resize((4 * strip.width, 4 * strip.height), 0), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main(argv: list[str] | None = None) -> int:
    p = parser(__doc__, "losses", images=2500)
    p.add_argument("--runs", type=Path, default=Path("runs/losses"), help="folder of the run folders")
    p.add_argument("--size", type=flags.size, default=32, help="side of the images")
    p.add_argument("--resize", type=flags.size, help="as in train_vqgan.py")
    p.add_argument("--steps", type=flags.positive, default=1800, help="of each training")
    p.add_argument("--seeds", type=flags.natural, nargs="+", default=[0], help="of the trainings")
    p.add_argument("--flags", default="", help="more flags for each training")
    args = p.parse_args(argv)
    device = runtime.pick_device(args.device)
    judges = Judges(args, device, args.size, args.resize)
    some = torch.linspace(0, len(judges.x) - 1, 8).long()  # of all classes: images are sorted by class
    rows, shown = [{"loss": "real images", **judges.floor()}], {"real": judges.x[some]}
    for loss, seed in itertools.product(LOSSES, args.seeds):
        model = trained(args, loss, seed).to(device)
        x_hat = in_parts(lambda x, model=model: model(x)[0], judges.x, device)
        errors = {name.upper(): e.mean().item() for name, e in metrics.image_metrics(judges.x, x_hat, None).items()}
        rows.append({"loss": loss, "seed": seed, **errors, **judges.measure(x_hat, judges.c)})
        shown.setdefault(loss, x_hat[some])
        print(rows[-1], flush=True)
    write_csv(args.table, rows)
    figure(args.figure, shown)
    return 0


if __name__ == "__main__":
    runtime.run(main)
