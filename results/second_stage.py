"""Transformer or PixelSNAIL (Sec. 4.1, Tab. 1), and in which order (the paper's appendix)? Held-out nats per code.

    python results/second_stage.py --data cifar10_split --model notebooks/checkpoints/cifar_gpt.pt

All models read the codes of one first-stage model, after the class, in the same batches, and have about as many
parameters. Each is trained at three learning rates. The best rate is repeated with another seed, for --long steps, and
(the transformer) in all orders. A training that is in --runs already is not repeated. Seconds are those of training,
without the measuring: CPU seconds on a CPU.
"""

import csv
import time
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from judging import ROOT, parser, write
from torch import Tensor

from minvqgan.course import fit
from minvqgan.course.pixelsnail import PixelSNAIL
from minvqgan.gpt import GPT, GPTConfig
from minvqgan.harness import checkpoint, data, flags, runtime
from minvqgan.orders import ORDERS

RATES = {"transformer": (5e-4, 1e-3, 2e-3), "PixelSNAIL": (2e-3, 4e-3, 8e-3)}
POINTS = 12  # of each curve
SEEDS = (0, 1)  # the first one chooses the rate


def loss(model, order: Tensor, amp: bool, maps: Tensor, classes: Tensor) -> Tensor:
    """-log p(s | c) of maps (B, n, n) after classes (B,), the mean over all codes."""
    s = maps.flatten(1)[:, order]  # (B, T)
    with torch.autocast(maps.device.type, torch.bfloat16, enabled=amp):
        if isinstance(model, PixelSNAIL):
            logits = model(maps, classes).flatten(2).mT  # (B, T, K)
        else:
            logits = model(torch.cat([model.config.num_codes + classes[:, None], s[:, :-1]], 1))
    return F.cross_entropy(logits.float().flatten(0, 1), s.flatten())


def seconds(device: torch.device) -> float:
    """A clock: CPU time on a CPU, which may have other work to do; on a GPU wall time once its work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def train(args, device, codes, held_out, K: int, classes: int, kind, order, lr, seed: int, steps: int) -> list[dict]:
    """The curve of one training, from its file if it is there. codes, held_out: (maps (N, n, n), classes (N,))."""
    path = args.runs / f"{kind}_{order}_{lr}_{seed}_{steps}.csv"
    if path.exists():
        return list(csv.DictReader(path.open()))
    torch.manual_seed(seed)
    n = codes[0].shape[1]
    if kind == "PixelSNAIL":  # 0.88 M parameters for 8 x 8 of 256 codes and ten classes, the transformer 0.87 M
        model = PixelSNAIL(K, n, classes, channels=76, blocks=2, res_blocks=2).to(device)
    else:
        model = GPT(GPTConfig(K, classes, n * n, n_layer=4, n_head=4, n_embd=128)).to(device)
    of = partial(loss, model, ORDERS[order](n).to(device), args.amp)
    about = {"model": kind, "order": order, "lr": lr, "seed": seed, "steps": steps}
    about["parameters"] = sum(p.numel() for p in model.parameters())
    rows, began = [], seconds(device)

    def measure(step: int) -> None:
        nonlocal began
        if step % max(1, steps // POINTS) and step != steps:
            return
        now = seconds(device)
        model.eval()
        with torch.no_grad():
            parts = zip(*(t.split(250) for t in held_out), strict=True)
            nats = sum(of(m, c).item() * len(m) for m, c in parts) / len(held_out[0])
        model.train()
        rows.append({**about, "step": step, "seconds": now - began, "nats": nats})
        began += seconds(device) - now  # measuring does not count

    fit.fit_tokens(model, of, codes, steps, lr=lr, seed=seed, each=measure)
    print(rows[-1], flush=True)
    write(path, rows)
    return list(csv.DictReader(path.open()))


def figure(curves: dict[str, list], orders: list[dict], path: Path) -> None:
    """Nats over steps and over seconds, both seeds and lengths of each model; nats of all orders."""
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    for ax, across in zip(axes, ("step", "seconds"), strict=False):
        for number, (name, runs) in enumerate(curves.items()):
            for i, rows in enumerate(runs):
                places, nats = ([float(r[column]) for r in rows] for column in (across, "nats"))
                ax.plot(places, nats, "-o", ms=2.5, color=f"C{number}", label=None if i else name)
        ax.set(xlabel=f"{across} of training", ylabel="held-out nats per code")
        ax.legend()
    axes[2].plot([row["order"] for row in orders], [float(row["nats"]) for row in orders], "o")
    axes[2].set(ylabel="held-out nats per code", xlabel="order; one dot per seed")
    axes[2].tick_params(axis="x", rotation=20)
    fig.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    p = parser(__doc__, "second_stage", images=1000, judged=False)
    p.add_argument("--runs", type=Path, default=Path("runs/second_stage"), help="folder of the curves")
    p.add_argument("--orders", type=Path, default=ROOT / "results" / "orders.csv", help="file to write")
    p.add_argument("--model", required=True, help="a checkpoint with the first-stage model whose codes are read")
    p.add_argument("--steps", type=flags.positive, default=500, help="of each training, of 64 images")
    p.add_argument("--long", type=flags.positive, default=2000, help="steps of the longest training of each model")
    args = p.parse_args(argv)
    device = runtime.pick_device(args.device)
    args.amp = runtime.pick_amp(None, device)
    model = checkpoint.load(args.model)
    vqgan = getattr(model, "vqgan", model).to(device, memory_format=torch.channels_last)
    train_set, val_set = data.open_data(args.data, vqgan.config.image_size)
    wanted = ((train_set, len(train_set)), (val_set, args.images))
    codes, held_out = ([t.to(device) for t in fit.codes_of(vqgan, images, n)] for images, n in wanted)
    run = partial(train, args, device, codes, held_out, vqgan.config.codebook_size, len(train_set.classes))

    table, curves = [], {}
    for kind, rates in RATES.items():
        tried = {lr: run(kind, "row", lr, SEEDS[0], args.steps) for lr in rates}
        best = min(rates, key=lambda lr, tried=tried: float(tried[lr][-1]["nats"]))
        again = [run(kind, "row", best, seed, args.steps) for seed in SEEDS[1:]]
        curves[kind] = [tried[best], *again, run(kind, "row", best, SEEDS[0], args.long)]
        table += [row for rows in [*tried.values(), *curves[kind][1:]] for row in rows]
        if kind == "transformer":
            ends = [run(kind, name, best, seed, args.steps)[-1] for name in ORDERS for seed in SEEDS]
    orders = [{name: row[name] for name in ("order", "seed", "nats")} for row in ends]
    write(args.table, table)
    write(args.orders, orders)
    figure(curves, orders, args.figure)
    return 0


if __name__ == "__main__":
    runtime.run(main)
