"""VQGAN or VQ-VAE? (Sec. 3.1, 4.1) One first-stage model trained with five losses, judged on held-out images.

    python results/losses.py --data cifar10_split --judges classes.pt rotations.pt --runs runs/losses --train
    python results/losses.py --data camvid --resize 128 --size 64 --crops 4 --steps 600 --runs runs/losses_camvid \
        --judges classes.pt rotations.pt photographs.pt --flags="--ch-mult 1 2 4 4 --batch-size 16" \
        --table results/losses_camvid.csv --figure figures/losses_camvid.png --train

`--train` trains the models that are missing, by train_vqgan.py with equal steps. Without it the table is made anew from
the checkpoints. What the judges can tell: judging.py.
"""

from pathlib import Path

import torch
from judging import Judges, add_flags, add_judges, in_parts, same_settings, strips, train_first_stage, write

from minvqgan.harness import checkpoint, flags, metrics, runtime
from minvqgan.harness.runtime import UserError

# The losses as flags of train_vqgan.py. A D that starts after the last step never learns.
LOSSES = {
    "squared error": "--loss vqvae",
    "L1": "--perceptual none --disc-start 1",
    "L1 + D": "--perceptual none",
    "L1 + P": "--disc-start 1",
    "L1 + P + D": "",
}


def folder(runs: Path, loss: str, seed: int) -> Path:
    return runs / f"{loss.replace(' + ', '_').replace(' ', '_')}_{seed}"


def parse_flags(argv: list[str] | None):
    p = flags.Parser(description=__doc__)
    add_flags(p, "losses")
    add_judges(p, images=2500)
    p.add_argument("--runs", type=Path, default=Path("runs/losses"), help="folder of the run folders")
    p.add_argument("--size", type=flags.size, default=32, help="side of the images")
    p.add_argument("--resize", type=flags.size, help="as in train_vqgan.py")
    p.add_argument("--crops", type=flags.positive, default=1, help="of each held-out image")
    p.add_argument("--train", action="store_true", help="train the models that are missing")
    p.add_argument("--steps", type=flags.positive, default=1800, help="of each training")
    p.add_argument("--seeds", type=flags.natural, nargs="+", default=[0], help="of the trainings")
    p.add_argument("--flags", type=str, default="", help="more flags for each training")
    return p.parse_args(argv)


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    device, models = runtime.pick_device(args.device), [(loss, seed) for seed in args.seeds for loss in LOSSES]
    if args.train:
        same_settings(args.runs, data=args.data, size=args.size, resize=args.resize, flags=args.flags)
        for loss, seed in models:
            words = f"--image-size {args.size} --resize {args.resize or args.size} --seed {seed} {LOSSES[loss]}"
            train_first_stage(args, folder(args.runs, loss, seed), args.steps, f"{words} {args.flags}")
    if not any((folder(args.runs, *model) / "last.pt").exists() for model in models):
        raise UserError(f"there is no model in {args.runs}; --train makes them")
    judges = Judges(args, device, args.size, args.resize, args.crops)
    some = torch.linspace(0, len(judges.x) - 1, 8).long()  # of all classes: images are sorted by class
    rows, shown = [{"loss": "real images", **judges.floor()}], {"real": [judges.x[some]]}
    for loss, seed in sorted(models, key=lambda model: list(LOSSES).index(model[0])):
        path = folder(args.runs, loss, seed) / "last.pt"
        if not path.exists():
            continue
        model = checkpoint.load_vqgan(path).to(device)
        x_hat = in_parts(lambda x, model=model: model(x)[0], judges.x, device)
        errors = {name.upper(): e.mean().item() for name, e in metrics.image_metrics(judges.x, x_hat, None).items()}
        rows.append({"loss": loss, "seed": seed, **errors, **judges.measure(x_hat, judges.c)})
        shown.setdefault(loss, [x_hat[some]])
        print(rows[-1], flush=True)
    write(args.table, rows)
    strips(args.figure, shown, [""])
    return 0


if __name__ == "__main__":
    runtime.run(main)
