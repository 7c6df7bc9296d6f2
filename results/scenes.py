"""The README's figures of scenes, and the sliding window against tiles in numbers (Sec. 3.2, 4.2).

    python results/scenes.py --data scenes_split --judges classes.pt rotations.pt

Panoramas eight images wide are cut into squares at every offset. If the window leaves no seams, the distance of the
squares to real images does not depend on the offset. Tiles are independent samples side by side: at offset 0 each cut
is one sample, at the others it holds a seam.
"""

import matplotlib.pyplot as plt
import torch
from judging import ROOT, Judges, add_flags, in_parts, write
from torch import Tensor

from minvqgan import Sampling, TwoStage
from minvqgan.harness import checkpoint, flags, pictures, runtime
from minvqgan.sampler import continue_tokens, uniforms

LANDSCAPES = ("forests", "glacier", "mountains", "sea")
WIDTH = 8  # of a panorama, in images
HOW = Sampling(guidance=1.5)


def panoramas(model: TwoStage, classes: Tensor, wide: int = WIDTH) -> Tensor:
    """(N, 3, S, wide * S) for classes (N,), by the sliding window."""
    n = model.config.n
    return model.sample(classes, size=(n, n * wide), sampling=HOW).clamp(-1, 1).cpu()


def tiles(model: TwoStage, classes: Tensor) -> Tensor:
    """The same width from independent samples."""
    images = model.sample(classes.repeat(WIDTH), seed=1, sampling=HOW).clamp(-1, 1).cpu()  # (WIDTH * N, 3, S, S)
    return torch.cat(list(images.chunk(WIDTH)), 3)


def cuts(wide: Tensor, offset: int) -> Tensor:
    """All squares that begin at `offset`, one image apart: (N * (WIDTH - 1), 3, S, S)."""
    side = wide.shape[2]
    return torch.cat([wide[..., left : left + side] for left in range(offset, offset + side * (WIDTH - 1), side)])


def way(model: TwoStage, x: Tensor, c: Tensor, path) -> None:
    """An image's way: x (1, 3, S, S) -> codes -> the transformer's next code -> a new image of class c (1,)."""
    s = model.image_tokens(x)
    half = s.shape[1] // 2
    with torch.inference_mode():
        tokens = torch.cat([model.condition_tokens(c), s[:, :half]], 1)
        p, likeliest = model.gpt(tokens, last_only=True)[0, 0].softmax(0).topk(8)
    n, codes = model.config.n, model.to_map(s)
    fig, axes = plt.subplots(1, 5, figsize=(13, 2.9), layout="constrained")
    drawn = model.sample_indices(c, seed=3, sampling=HOW)
    new = [(pictures.code_map(model.vqgan, drawn, 8), "new codes"), (model.vqgan.decode_indices(drawn), "a new image")]
    own = [(x, "a photograph x"), (pictures.code_map(model.vqgan, codes, 8), f"{n} x {n} codes s = q(E(x))")]
    for axis, item in zip(axes, [*own, None, *new], strict=True):
        if item is None:
            axis.barh(range(8), p.tolist()[::-1], color="#0072B2")
            axis.set_yticks(range(8), [str(i) for i in likeliest.tolist()[::-1]], fontsize=7)
            axis.set_title(f"p(s_{half + 1} | s_1 ... s_{half}, c)", fontsize=9)
            continue
        axis.imshow(pictures.to_image(item[0][0]), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_title(item[1], fontsize=9)
    for (i, j), code in ((divmod(t, n), code) for t, code in enumerate(codes.flatten().tolist())):
        axes[1].text(j * 8 + 3.5, i * 8 + 3.5, code, ha="center", va="center", fontsize=5.5)
    fig.savefig(path, dpi=110)


def completions(model: TwoStage, x: Tensor, c: Tensor, wide: int = 4) -> list[Tensor]:
    """x (N, 3, S, S) -> [x, upper halves completed, x continued to the right]. A window that has seen the photograph
    draws its columns: each row of codes is read up to the border and continued."""
    n = model.config.n
    below = model.complete(x, 0.5, c, sampling=HOW).clamp(-1, 1)
    r, s = model.condition_tokens(c).flatten(1), model.vqgan.encode_indices(x)  # (N, 1), (N, n, n)
    half = n // 2
    for step in range((wide - 1) * n // half):  # half a window at a time: its left half is given
        window = torch.cat([s[..., -half:], torch.zeros_like(s[..., :half])], 2)
        u = uniforms(step, range(len(x)), n * half).view(-1, n, half).to(x.device)
        for i in range(n):
            prefix = torch.cat([window[:, :i].flatten(1), window[:, i, :half]], 1)
            window[:, i, half:] = continue_tokens(model.gpt, r, prefix, u[:, i], HOW, model.null)
        s = torch.cat([s, window[..., half:]], 2)
    return [x, below, model.vqgan.decode_indices(s).clamp(-1, 1)]


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    p = flags.Parser(description=__doc__)
    add_flags(p, "panoramas", images=900)
    p.add_argument("--gpt", default=str(ROOT / "notebooks" / "checkpoints" / "scenes.pt"), help="both stages")
    p.add_argument("-n", type=flags.positive, default=64, help="panoramas")
    args = p.parse_args(argv)
    device = runtime.pick_device(args.device)
    model = checkpoint.load(args.gpt).to(device)
    side = model.config.n * model.vqgan.config.f
    judges = Judges(args, device, side)
    numbers = [judges.classes.index(name) for name in LANDSCAPES]
    classes = torch.tensor(numbers, device=device).repeat_interleave(args.n // len(numbers))
    wide = panoramas(model, classes)
    judges.real = [tuple(t[torch.isin(judges.c, torch.tensor(numbers))] for t in seen) for seen in judges.real]
    rows = []
    for name, images in (("window", wide), ("tiles", tiles(model, classes))):
        for offset in range(0, side, side // 8):
            row = judges.measure(cuts(images, offset), classes.cpu().repeat(WIDTH - 1))
            rows.append({"panoramas": name, "offset": offset, **row})
            print(rows[-1], flush=True)
    write(args.table, rows)
    first = [wide[i * len(wide) // len(numbers)][None] for i in range(len(numbers))]
    pictures.save_grid(args.figure, first + [tiles(model, classes[-1:])])
    chosen = [int((judges.c == number).nonzero()[2]) for number in numbers]
    x, c = judges.x[chosen].to(device), judges.c[chosen].to(device)
    way(model, x[2:3], c[2:3], args.figure.with_name("way.png"))
    done = in_parts(lambda t: t, torch.cat(completions(model, x, c), 3), device)
    pictures.save_grid(args.figure.with_name("completions.png"), list(done[:, None]))
    return 0


if __name__ == "__main__":
    runtime.run(main)
