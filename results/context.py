"""How much should a code stand for? (Sec. 4.3, Fig. 11) One transformer that reads 64 codes, over f = 1, 2, 4, 8.

    python results/context.py --data cifar10_split --judges classes.pt rotations.pt --train

f = 1 has no first stage: a code is a pixel, in one of 256 colours (k-means of training pixels). The others are trained
by train_vqgan.py with equal steps. An image of 32 pixels is 32 x 32, 16 x 16, 8 x 8 or 4 x 4 codes. The transformer is
trained on windows of at most 8 x 8 and slides over what is larger.
"""

from pathlib import Path

import judging
import torch
import torch.nn.functional as F
from judging import in_parts, seconds
from torch import Tensor

from minvqgan import Sampling
from minvqgan.course import fit
from minvqgan.gpt import GPT, GPTConfig
from minvqgan.harness import checkpoint, data, flags, runtime
from minvqgan.quantizer import nearest_code
from minvqgan.sampler import slide, uniforms

CH_MULT = {2: "1 2", 4: "1 2 4", 8: "1 2 4 4"}
K, WINDOW, SHOWN = 256, 8, 10


class Palette(torch.nn.Module):
    """f = 1: every pixel is the nearest of K colours, the means that Lloyd's algorithm finds in pixels (N, 3)."""

    def __init__(self, pixels: Tensor, rounds: int = 20):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("colours", pixels[torch.randperm(len(pixels), generator=generator)[:K]].clone())
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
    if args.train:
        judging.train_first_stage(args, out, args.vqgan_steps, f"--ch-mult {CH_MULT[f]} {args.flags}")
    return checkpoint.load_vqgan(out / "last.pt").to(memory_format=torch.channels_last)


def transformer(args, f: int, num_classes: int, codes, held_out, device) -> tuple[GPT, float]:
    """A transformer trained on windows of codes, and its nats per code in the middle window of the held-out images.

    codes, held_out: (maps (N, h, w), classes (N,)).
    """
    side = codes[0].shape[1]
    n, path = min(side, WINDOW), args.runs / f"gpt_f{f}.pt"
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(K, num_classes, WINDOW**2, n_layer=4, n_head=4, n_embd=128)).to(device)

    def loss(maps: Tensor, classes: Tensor, place: tuple[int, int] | None = None) -> Tensor:
        top, left = place or torch.randint(side - n + 1, (2,)).tolist()
        return judging.gpt_loss(gpt, maps[:, top : top + n, left : left + n].flatten(1), classes, args.amp)

    if path.exists():
        gpt.load_state_dict(torch.load(path, weights_only=True))
    else:
        with torch.enable_grad():
            fit.fit_tokens(gpt, loss, codes, args.steps)
        torch.save(gpt.state_dict(), path)
    middle, parts = ((side - n) // 2,) * 2, zip(*(t.split(250) for t in held_out), strict=True)
    return gpt.eval(), sum(loss(m, c, middle).item() * len(m) for m, c in parts) / len(held_out[0])


def draw(gpt: GPT, side: int, classes: Tensor) -> Tensor:
    """Codes (N, side, side) for classes (N,), image i from the random numbers of seed 0, number i."""
    drawn = []
    for numbers in torch.arange(len(classes)).split(100):
        c = K + classes[numbers, None]
        u = uniforms(0, numbers.tolist(), side * side).view(-1, side, side).to(c.device)
        drawn.append(slide(gpt, c, torch.zeros_like(u, dtype=torch.long), u, min(side, WINDOW), Sampling()))
    return torch.cat(drawn)


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    p = flags.Parser(description=__doc__)
    judging.add_flags(p, "context", images=300)
    p.add_argument("--runs", type=Path, default=Path("runs/context"), help="folder of the models")
    p.add_argument("--train", action="store_true", help="train the first-stage models that are missing")
    p.add_argument("--vqgan-steps", type=flags.positive, default=700, help="of each first-stage model")
    p.add_argument("--steps", type=flags.positive, default=800, help="of each transformer, of 64 images")
    p.add_argument("--flags", type=str, default="", help="more flags for the first-stage models")
    args = p.parse_args(argv)
    device = runtime.pick_device(args.device)
    args.amp = runtime.pick_amp(None, device)
    judging.same_settings(args.runs, data=args.data, flags=args.flags, vqgan_steps=args.vqgan_steps, steps=args.steps)
    train_set, val_set = data.open_data(args.data, 32)
    judges = judging.Judges(args, device, 32)
    rows, shown = [{"f": "real images", **judges.floor()}], {}
    for f in (1, *CH_MULT):
        stage = first_stage(args, f, train_set).to(device)
        codes, held_out = judging.codes_of(stage, train_set, val_set, 1000, device)
        gpt, nats = transformer(args, f, len(train_set.classes), codes, held_out, device)
        side = codes[0].shape[1]
        x_hat = in_parts(lambda x, stage=stage: stage.decode_indices(stage.encode_indices(x)), judges.x, device)
        classes = torch.arange(args.images) % len(train_set.classes)
        began = seconds(device)
        samples = in_parts(stage.decode_indices, draw(gpt, side, classes.to(device)), device)
        spent = (seconds(device) - began) / args.images
        row = {"f": f, "codes": side * side, "nats a code": nats, "nats a pixel": nats * side * side / 32**2}
        row |= {"seconds a sample": spent, "L1": (x_hat - judges.x).abs().mean().item()}
        rebuilt = judges.measure(x_hat, judges.c)
        row |= {f"reconstructions: {k}": v for k, v in rebuilt.items() if k.startswith("Fréchet")}
        rows.append(row | judges.measure(samples, classes))
        print(rows[-1], flush=True)
        shown[f"f = {f}"] = [x_hat[:: max(1, args.images // SHOWN)][:SHOWN], samples[:SHOWN]]
    judging.write(args.table, rows)
    judging.strips(args.figure, shown, ["reconstructions of held-out images", "samples, a class each"])
    return 0


if __name__ == "__main__":
    runtime.run(main)
