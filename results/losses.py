"""VQGAN or VQ-VAE? (Sec. 3.1, 4.1) One first-stage model trained with five losses, judged on held-out images.

    python results/losses.py --data cifar10_split --judges classes.pt rotations.pt --runs runs/losses --train
    python results/losses.py --data camvid --resize 128 --size 64 --crops 4 --steps 600 --runs runs/losses_camvid \
        --judges classes.pt rotations.pt photographs.pt --flags="--ch-mult 1 2 4 4 --batch-size 16" \
        --table results/losses_camvid.csv --figure figures/losses_camvid.png --train

`--train` trains the models that are missing, by train_vqgan.py with equal steps. Without it the table is made anew from
the checkpoints. What the judges can tell: judging.py.
"""

import itertools
from pathlib import Path

import judging
import torch

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


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    p = flags.Parser(description=__doc__)
    judging.add_flags(p, "losses", images=2500)
    p.add_argument("--runs", type=Path, default=Path("runs/losses"), help="folder of the run folders")
    p.add_argument("--size", type=flags.size, default=32, help="side of the images")
    p.add_argument("--resize", type=flags.size, help="as in train_vqgan.py")
    p.add_argument("--crops", type=flags.positive, default=1, help="of each held-out image")
    p.add_argument("--train", action="store_true", help="train the models that are missing")
    p.add_argument("--steps", type=flags.positive, default=1800, help="of each training")
    p.add_argument("--seeds", type=flags.natural, nargs="+", default=[0], help="of the trainings")
    p.add_argument("--flags", type=str, default="", help="more flags for each training")
    args = p.parse_args(argv)
    device, models = runtime.pick_device(args.device), {}  # their files, by (loss, seed)
    for loss, seed in itertools.product(LOSSES, args.seeds):
        models[loss, seed] = args.runs / f"{loss.replace(' + ', '_').replace(' ', '_')}_{seed}" / "last.pt"
    if args.train:
        judging.same_settings(args.runs, data=args.data, size=args.size, resize=args.resize, flags=args.flags)
        for (loss, seed), path in models.items():
            words = f"--image-size {args.size} --resize {args.resize or args.size} --seed {seed} {LOSSES[loss]}"
            judging.train_first_stage(args, path.parent, args.steps, f"{words} {args.flags}")
    models = {name: path for name, path in models.items() if path.exists()}
    if not models:
        raise UserError(f"there is no model in {args.runs}; --train makes them")
    judges = judging.Judges(args, device, args.size, args.resize, args.crops)
    some = torch.linspace(0, len(judges.x) - 1, 8).long()  # of all classes: images are sorted by class
    rows, shown = [{"loss": "real images", **judges.floor()}], {"real": [judges.x[some]]}
    for (loss, seed), path in models.items():
        model = checkpoint.load_vqgan(path).to(device)
        x_hat = judging.in_parts(lambda x, model=model: model(x)[0], judges.x, device)
        errors = {name.upper(): e.mean().item() for name, e in metrics.image_metrics(judges.x, x_hat, None).items()}
        rows.append({"loss": loss, "seed": seed, **errors, **judges.measure(x_hat, judges.c)})
        shown.setdefault(loss, [x_hat[some]])
        print(rows[-1], flush=True)
    judging.write(args.table, rows)
    judging.strips(args.figure, shown, [""])
    return 0


if __name__ == "__main__":
    runtime.run(main)
