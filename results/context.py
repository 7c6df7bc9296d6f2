"""How much should a code stand for? (Sec. 4.3, Fig. 11) One transformer that reads 64 codes, over f = 1, 2, 4, 8.

    python results/context.py --data cifar10_split --judges classes.pt rotations.pt --train

f = 1 has no first stage: a code is a pixel, in one of 256 colours (k-means of training pixels). The others are trained
with train_vqgan.py and equal steps. An image of 32 pixels is 32 x 32, 16 x 16, 8 x 8 or 4 x 4 codes; the transformer is
trained on windows of 8 x 8 at most and slides over what is larger.
"""

import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from judging import Judges, add_flags, same_settings, write
from torch import Tensor

from minvqgan import Sampling
from minvqgan.course import fit
from minvqgan.gpt import GPT, GPTConfig
from minvqgan.harness import checkpoint, data, flags, runtime
from minvqgan.harness.pictures import to_pixels
from minvqgan.harness.runtime import UserError
from minvqgan.quantizer import nearest_code
from minvqgan.sampler import slide, uniforms

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
CH_MULT = {2: "1 2", 4: "1 2 4", 8: "1 2 4 4"}
K, WINDOW, SHOWN = 256, 8, 10


class Palette:
    """f = 1: every pixel is the nearest of K colours, the means that Lloyd's algorithm finds in pixels (N, 3)."""

    def __init__(self, pixels: Tensor, rounds: int = 20):
        generator = torch.Generator().manual_seed(0)
        self.colours = pixels[torch.randperm(len(pixels), generator=generator)[:K]].clone()
        for _ in range(rounds):
            sums = torch.zeros(K, 4).index_add_(0, nearest_code(pixels, self.colours), F.pad(pixels, (0, 1), value=1.0))
            used = sums[:, 3] > 0
            self.colours[used] = sums[used, :3] / sums[used, 3:]

    def encode_indices(self, x: Tensor) -> Tensor:
        return nearest_code(x.permute(0, 2, 3, 1).reshape(-1, 3), self.colours).view(len(x), *x.shape[2:])

    def decode_indices(self, indices: Tensor) -> Tensor:
        return self.colours[indices].permute(0, 3, 1, 2)


def first_stage(args, f: int, train_set):
    """What turns images into codes and back."""
    if f == 1:
        x = fit.held_out(train_set, 1000)["image"]
        return Palette(x.permute(0, 2, 3, 1).reshape(-1, 3))
    out = args.runs / f"vqgan_f{f}"
    if args.train and not ((out / "last.pt").exists() and checkpoint.read(out / "last.pt")["step"] >= args.vqgan_steps):
        words = f"--steps {args.vqgan_steps} --ch-mult {CH_MULT[f]} {args.flags}".split()
        words += ["--data", args.data, "--out", str(out)] + ["--resume"] * (out / "last.pt").exists()
        if subprocess.run([sys.executable, ROOT / "train_vqgan.py", *words]).returncode:
            raise UserError(f"the training of {out} did not end, see above")
    return checkpoint.load_vqgan(out / "last.pt").to(memory_format=torch.channels_last)


def transformer(args, f: int, num_classes: int, codes, held_out) -> tuple[GPT, float]:
    """A transformer trained on windows of codes, and its nats a code in the middle window of those held out.

    codes, held_out: (maps (N, h, w), classes (N,)).
    """
    side = codes[0].shape[1]
    n, path = min(side, WINDOW), args.runs / f"gpt_f{f}.pt"
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(K, num_classes, WINDOW**2, n_layer=4, n_head=4, n_embd=128))

    def loss(maps: Tensor, classes: Tensor, top: int | None = None) -> Tensor:
        left = top
        if top is None:
            top, left = torch.randint(side - n + 1, (2,)).tolist()
        s = maps[:, top : top + n, left : left + n].flatten(1)  # (B, n * n)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.amp):
            logits = gpt(torch.cat([K + classes[:, None], s[:, :-1]], 1))  # (B, n * n, K)
        return F.cross_entropy(logits.float().flatten(0, 1), s.flatten())

    if path.exists():
        gpt.load_state_dict(torch.load(path, weights_only=True))
    else:
        fit.fit_tokens(gpt, loss, codes, args.steps)
        torch.save(gpt.state_dict(), path)
    with torch.no_grad():
        parts = zip(*(t.split(250) for t in held_out), strict=True)
        nats = sum(loss(m, c, (side - n) // 2).item() * len(m) for m, c in parts) / len(held_out[0])
    return gpt.eval(), nats


@torch.no_grad()
def draw(gpt: GPT, side: int, classes: Tensor, part: int = 100) -> Tensor:
    """Codes (N, side, side), one seed an image."""
    drawn = []
    for i in range(0, len(classes), part):
        c = K + classes[i : i + part, None]
        u = uniforms(0, range(i, i + len(c)), side * side).view(len(c), side, side)
        blank = torch.zeros(len(c), side, side, dtype=torch.long)
        drawn.append(slide(gpt, c, blank, u, min(side, WINDOW), Sampling()))
    return torch.cat(drawn)


def figure(shown: dict[int, tuple[Tensor, Tensor]], path: Path) -> None:
    """For every f a row of reconstructions and a row of samples, enlarged three times."""
    fig, axes = plt.subplots(len(shown), 2, figsize=(13, 0.72 * len(shown)), layout="constrained")
    for row, (f, images) in zip(axes, shown.items(), strict=True):
        for axis, some in zip(row, images, strict=True):
            strip = to_pixels(torch.cat(list(some), 2)).permute(1, 2, 0).numpy()
            axis.imshow(strip.repeat(3, 0).repeat(3, 1), interpolation="nearest")
            axis.set_xticks([]), axis.set_yticks([])
        row[0].set_ylabel(f"f = {f}", rotation=0, ha="right", va="center")
    axes[0][0].set_title("reconstructions of held-out images"), axes[0][1].set_title("samples, a class each")
    fig.savefig(path, dpi=110)


@torch.no_grad()
def main() -> int:
    p = flags.Parser(description=__doc__)
    add_flags(p, "context", images=300)
    p.add_argument("--runs", type=Path, default=Path("runs/context"), help="folder of the models")
    p.add_argument("--train", action="store_true", help="train the first stages that are missing")
    p.add_argument("--vqgan-steps", type=flags.positive, default=700, help="of each first stage")
    p.add_argument("--steps", type=flags.positive, default=800, help="of each transformer, of 64 images")
    p.add_argument("--flags", type=str, default="", help="more flags for the first stages")
    args = p.parse_args()
    args.amp = runtime.pick_amp(None, torch.device("cpu"))
    made = {"data": args.data, "flags": args.flags, "vqgan_steps": args.vqgan_steps, "steps": args.steps}
    same_settings(args.runs, **made)
    train_set, val_set = data.open_data(args.data, 32)
    judges = Judges(args.judges, args.data, 32, args.images)
    rows, shown = [{"f": "real images", **judges.floor()}], {}
    for f in (1, *CH_MULT):
        stage = first_stage(args, f, train_set)
        codes, held_out = (fit.codes_of(stage, d, count) for d, count in ((train_set, len(train_set)), (val_set, 1000)))
        with torch.enable_grad():
            gpt, nats = transformer(args, f, len(train_set.classes), codes, held_out)
        side = codes[0].shape[1]
        x_hat = torch.cat([stage.decode_indices(stage.encode_indices(part)) for part in judges.x.split(100)])
        classes = torch.arange(args.images) % len(train_set.classes)
        began = time.process_time()
        samples = torch.cat([stage.decode_indices(s) for s in draw(gpt, side, classes).split(100)])
        spent = (time.process_time() - began) / args.images
        row = {"f": f, "codes": side * side, "nats a code": nats, "nats a pixel": nats * side * side / 32**2}
        row |= {"seconds a sample": spent, "L1": (x_hat - judges.x).abs().mean().item()}
        rebuilt = judges.measure(x_hat, judges.c)
        row |= {f"reconstructions: {k}": v for k, v in rebuilt.items() if k.startswith("Fréchet")}
        rows.append(row | judges.measure(samples, classes))
        print(rows[-1], flush=True)
        shown[f] = (x_hat[:: max(1, args.images // SHOWN)][:SHOWN], samples[:SHOWN])
    write(args.table, rows)
    figure(shown, args.figure)
    return 0


if __name__ == "__main__":
    runtime.run(main)
