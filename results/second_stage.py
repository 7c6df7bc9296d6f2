"""Transformer or PixelSNAIL (Sec. 4.1, Tab. 1), and in which order (the paper's appendix)? Held-out nats per code.

    python results/second_stage.py --data cifar10_split --model notebooks/checkpoints/cifar_gpt.pt

All models read the codes of one first-stage model, after the class, in the same batches, and have about as many
parameters. Each is trained at three learning rates. The best rate is repeated with another seed, for --long steps, and
(the transformer) in all orders. Seconds are of CPU time in training, without the measuring.
"""

import functools
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from judging import ROOT
from torch import Tensor

from minvqgan.course import fit
from minvqgan.course.pixelsnail import PixelSNAIL
from minvqgan.gpt import GPT, GPTConfig
from minvqgan.harness import checkpoint, data, flags, runtime
from minvqgan.harness.run import write_csv
from minvqgan.orders import ORDERS

RATES = {"transformer": (5e-4, 1e-3, 2e-3), "PixelSNAIL": (2e-3, 4e-3, 8e-3)}
POINTS = 12  # of each curve
SEEDS = (0, 1)  # the first one chooses the rate


def loss(model, order: Tensor, maps: Tensor, classes: Tensor) -> Tensor:
    """-log p(s | c) of maps (B, n, n) after classes (B,), the mean over all codes."""
    s = maps.flatten(1)[:, order]  # (B, T)
    if isinstance(model, PixelSNAIL):
        logits = model(maps, classes).flatten(2).mT  # (B, T, K)
    else:
        logits = model(torch.cat([model.config.num_codes + classes[:, None], s[:, :-1]], 1))
    return F.cross_entropy(logits.flatten(0, 1), s.flatten())


def train(codes, held_out, K: int, classes: int, kind: str, order: str, lr: float, seed: int, steps: int) -> list[dict]:
    """The curve of one training. codes, held_out: (maps (N, n, n), classes (N,))."""
    torch.manual_seed(seed)
    n, device = codes[0].shape[1], codes[0].device
    if kind == "PixelSNAIL":  # 0.88 M parameters for 8 x 8 of 256 codes and ten classes, the transformer 0.87 M
        model = PixelSNAIL(K, n, classes, channels=76, blocks=2, res_blocks=2).to(device)
    else:
        model = GPT(GPTConfig(K, classes, n * n, n_layer=4, n_head=4, n_embd=128)).to(device)
    of = functools.partial(loss, model, ORDERS[order](n).to(device))
    about = {"model": kind, "order": order, "lr": lr, "seed": seed, "steps": steps}
    about["parameters"] = sum(p.numel() for p in model.parameters())
    rows, began = [], time.process_time()

    @torch.no_grad()
    def measure(step: int) -> None:
        nonlocal began
        if step % max(1, steps // POINTS) and step != steps:
            return
        now = time.process_time()
        model.eval()
        parts = zip(*(t.split(250) for t in held_out), strict=True)
        nats = sum(of(m, c).item() * len(m) for m, c in parts) / len(held_out[0])
        model.train()
        rows.append({**about, "step": step, "seconds": now - began, "nats": nats})
        began += time.process_time() - now  # measuring does not count

    fit.fit_tokens(model, of, codes, steps, lr=lr, seed=seed, each=measure)
    print(rows[-1], flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    p = flags.Parser(description=__doc__)
    p.add_argument("--data", required=True, help="as in train_vqgan.py; with train/ and val/")
    p.add_argument("--model", required=True, help="a checkpoint with the first-stage model whose codes are read")
    p.add_argument("--images", type=flags.positive, default=1000, help="held-out images")
    p.add_argument("--steps", type=flags.positive, default=500, help="of each training, of 64 images")
    p.add_argument("--long", type=flags.positive, default=2000, help="steps of the longest training of each model")
    p.add_argument("--out", type=Path, default=ROOT / "results", help="folder of second_stage.csv and orders.csv")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps; the seconds are of a CPU")
    args = p.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    device, model = runtime.pick_device(args.device), checkpoint.load(args.model)
    vqgan = getattr(model, "vqgan", model).to(device, memory_format=torch.channels_last)
    train_set, val_set = data.open_data(args.data, vqgan.config.image_size)
    wanted = ((train_set, len(train_set)), (val_set, args.images))
    codes, held_out = ([t.to(device) for t in fit.codes_of(vqgan, images, n)] for images, n in wanted)
    given = codes, held_out, vqgan.config.codebook_size, len(train_set.classes)
    curve = functools.cache(functools.partial(train, *given))  # no training is repeated

    table = []
    for kind, rates in RATES.items():
        tried = {lr: curve(kind, "row", lr, SEEDS[0], args.steps) for lr in rates}
        best = min((rows[-1]["nats"], lr) for lr, rows in tried.items())[1]
        again = [curve(kind, "row", best, seed, args.steps) for seed in SEEDS[1:]]
        table += [*tried.values(), *again, curve(kind, "row", best, SEEDS[0], args.long)]
        if kind == "transformer":
            orders = [curve(kind, name, best, seed, args.steps)[-1] for name in ORDERS for seed in SEEDS]
    write_csv(args.out / "second_stage.csv", [row for rows in table for row in rows])
    write_csv(args.out / "orders.csv", [{name: row[name] for name in ("order", "seed", "nats")} for row in orders])
    return 0


if __name__ == "__main__":
    runtime.run(main)
