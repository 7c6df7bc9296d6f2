"""The README's figures of scenes, and the sliding window against tiles in numbers (Sec. 3.2, 4.2).

    python results/scenes.py --data scenes_split --judges classes.pt rotations.pt

Panoramas eight images wide are cut into squares at every offset. If the window leaves no seams, the distance of the
squares to real images does not depend on the offset. Tiles are independent samples side by side: at offset 0 each cut
is one sample, at the others it holds a seam.
"""

import matplotlib.pyplot as plt
import torch
from judging import ROOT, Judges, parser
from torch import Tensor

from minvqgan import Sampling, TwoStage
from minvqgan.harness import checkpoint, flags, pictures, runtime
from minvqgan.harness.run import write_csv

LANDSCAPES = ("forests", "glacier", "mountains", "sea")
WIDTH = 8  # of a panorama, in images
HOW = Sampling(guidance=1.5)


def cuts(wide: Tensor, offset: int) -> Tensor:
    """All squares that begin at `offset`, one image apart: (N * (WIDTH - 1), 3, S, S)."""
    side = wide.shape[2]
    return torch.cat([wide[..., left : left + side] for left in range(offset, offset + side * (WIDTH - 1), side)])


def way(model: TwoStage, x: Tensor, c: Tensor, path) -> None:
    """An image's way: x (1, 3, S, S) -> codes -> the transformer's next code -> a new image of class c (1,)."""
    s, n = model.image_tokens(x), model.config.n
    half, codes, drawn = n * n // 2, model.to_map(s), model.sample_indices(c, seed=3, sampling=HOW)
    with torch.inference_mode():
        tokens = torch.cat([model.condition_tokens(c), s[:, :half]], 1)
        p, likeliest = model.gpt(tokens, last_only=True)[0, 0].softmax(0).topk(8)
    shown = {
        "a photograph x": x,
        f"{n} x {n} codes s = q(E(x))": pictures.code_map(model.vqgan, codes, 8),
        f"p(s_{half + 1} | s_1 ... s_{half}, c)": None,
        "new codes": pictures.code_map(model.vqgan, drawn, 8),
        "a new image": model.vqgan.decode_indices(drawn),
    }
    fig, axes = plt.subplots(1, 5, figsize=(13, 2.9), layout="constrained")
    for axis, (title, image) in zip(axes, shown.items(), strict=True):
        axis.set_title(title, fontsize=9)
        if image is not None:
            axis.imshow(pictures.to_image(image[0]), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    axes[2].barh(range(8), p.tolist()[::-1], color="#0072B2")
    axes[2].set_yticks(range(8), [str(i) for i in likeliest.tolist()[::-1]], fontsize=7)
    for t, code in enumerate(codes.flatten().tolist()):
        axes[1].text(t % n * 8 + 3.5, t // n * 8 + 3.5, code, ha="center", va="center", fontsize=5.5)
    fig.savefig(path, dpi=110)


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    p = parser(__doc__, "panoramas", images=900)
    p.add_argument("--gpt", default=str(ROOT / "notebooks" / "checkpoints" / "scenes.pt"), help="both stages")
    p.add_argument("-n", type=flags.positive, default=64, help="panoramas")
    args = p.parse_args(argv)
    device = runtime.pick_device(args.device)
    model = checkpoint.load(args.gpt).to(device)
    n = model.config.n
    side = n * model.vqgan.config.f
    judges = Judges(args, device, side)
    numbers = [judges.classes.index(name) for name in LANDSCAPES]
    judges.real = [tuple(t[torch.isin(judges.c, torch.tensor(numbers))] for t in seen) for seen in judges.real]
    classes = torch.tensor(numbers, device=device).repeat_interleave(args.n // len(numbers))
    window = model.sample(classes, size=(n, n * WIDTH), sampling=HOW).clamp(-1, 1).cpu()  # (N, 3, S, WIDTH * S)
    samples = model.sample(classes.repeat(WIDTH), seed=1, sampling=HOW).clamp(-1, 1).cpu()  # (WIDTH * N, 3, S, S)
    tiles = torch.cat(samples.chunk(WIDTH), 3)
    rows = []
    for name, images in (("window", window), ("tiles", tiles)):
        for offset in range(0, side, side // 8):
            row = judges.measure(cuts(images, offset), classes.cpu().repeat(WIDTH - 1))
            rows.append({"panoramas": name, "offset": offset, **row})
            print(rows[-1], flush=True)
    write_csv(args.table, rows)
    first = list(window[:: args.n // len(numbers)].split(1))
    pictures.save_grid(args.figure, [*first, tiles[-1:]])
    shown = (judges.c == judges.classes.index("mountains")).nonzero()[2]
    way(model, judges.x[shown].to(device), judges.c[shown].to(device), args.figure.with_name("way.png"))
    return 0


if __name__ == "__main__":
    runtime.run(main)
