"""Transformer or PixelSNAIL (Sec. 4.1, Tab. 1), and in which order (the paper's appendix)? Held-out nats per code.

    python results/second_stage.py --data cifar10_split --vqgan notebooks/checkpoints/cifar_vqgan.pt

All models read the codes of one first-stage model, after the class, in the same batches, and have about as many
parameters. Each is trained at three learning rates. The best rate is repeated with another seed, for --long steps, and
(the transformer) in all orders. A training that is in --runs already is not repeated. Seconds are those of training,
without the measuring: CPU seconds on a CPU.
"""

import csv
from functools import partial
from pathlib import Path

import judging
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from judging import ROOT, seconds, write
from torch import Tensor

from minvqgan.course import fit
from minvqgan.course.pixelsnail import PixelSNAIL
from minvqgan.gpt import GPT, GPTConfig
from minvqgan.harness import checkpoint, data, flags, runtime
from minvqgan.orders import ORDERS

RATES = {"transformer": (5e-4, 1e-3, 2e-3), "PixelSNAIL": (2e-3, 4e-3, 8e-3)}
POINTS = 12  # of each curve


def loss(model, order: Tensor, amp: bool, maps: Tensor, classes: Tensor) -> Tensor:
    """-log p(s | c) of maps (B, n, n), the mean over all codes."""
    if not isinstance(model, PixelSNAIL):
        return judging.gpt_loss(model, maps.flatten(1)[:, order], classes, amp)
    with torch.autocast(maps.device.type, torch.bfloat16, enabled=amp):
        logits = model(maps, classes)  # (B, K, n, n)
    return F.cross_entropy(logits.float(), maps)


def train(
    args, device, codes, held_out, K: int, classes: int, kind: str, order: str, lr: float, seed: int, steps: int
) -> list[dict]:
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
            parts = [of(m, c).item() * len(m) for m, c in zip(*(t.split(250) for t in held_out), strict=True)]
        model.train()
        rows.append({**about, "step": step, "seconds": now - began, "nats": sum(parts) / len(held_out[0])})
        began += seconds(device) - now  # measuring does not count

    fit.fit_tokens(model, of, codes, steps, lr=lr, seed=seed, each=measure)
    print(rows[-1], flush=True)
    write(path, rows)
    return rows


def last(rows: list[dict]) -> float:
    return float(rows[-1]["nats"])


def figure(curves: dict[str, list], orders: dict[str, list], path: Path) -> None:
    """Nats over steps and over seconds, both seeds and lengths of each model; nats of all orders."""
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    for ax, across, label in zip(axes, ("step", "seconds"), ("steps", "seconds of training"), strict=False):
        for number, (name, runs) in enumerate(curves.items()):
            for i, rows in enumerate(runs):
                places, nats = [float(r[across]) for r in rows], [float(r["nats"]) for r in rows]
                ax.plot(places, nats, "-o", ms=2.5, color=f"C{number}", label=None if i else name)
        ax.set(xlabel=label, ylabel="held-out nats per code")
        ax.legend()
    for i, runs in enumerate(orders.values()):
        axes[2].plot([i] * len(runs), [last(rows) for rows in runs], "o", color="C0")
    axes[2].set_xticks(range(len(orders)), list(orders), rotation=20)
    axes[2].set(ylabel="held-out nats per code", xlabel="order; one dot per seed")
    fig.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    p = flags.Parser(description=__doc__)
    judging.add_flags(p, "second_stage")
    p.add_argument("--orders", type=Path, default=ROOT / "results" / "orders.csv", help="file to write")
    p.add_argument("--vqgan", required=True, help="the first-stage model whose codes are read")
    p.add_argument("--resize", type=flags.size, help="as in train_vqgan.py")
    p.add_argument("--runs", type=Path, default=Path("runs/second_stage"), help="folder of the curves")
    p.add_argument("--steps", type=flags.positive, default=500, help="of each training, of 64 images")
    p.add_argument("--long", type=flags.positive, default=2000, help="steps of the longest training of each model")
    p.add_argument("--images", type=flags.positive, default=1000, help="held-out images")
    p.add_argument("--seeds", type=flags.natural, nargs="+", default=[0, 1], help="the first one chooses the rate")
    args = p.parse_args(argv)
    device = runtime.pick_device(args.device)
    args.amp = runtime.pick_amp(None, device)
    judging.same_settings(args.runs, data=args.data, vqgan=args.vqgan, images=args.images, device=device.type)
    vqgan = checkpoint.load_vqgan(args.vqgan).to(device, memory_format=torch.channels_last)
    train_set, val_set = data.open_data(args.data, vqgan.config.image_size, args.resize)
    codes, held_out = judging.codes_of(vqgan, train_set, val_set, args.images, device)
    run = partial(train, args, device, codes, held_out, vqgan.config.codebook_size, len(train_set.classes))

    table, curves, best, first = [], {}, {}, args.seeds[0]
    for kind, rates in RATES.items():
        tried = {lr: run(kind, "row", lr, first, args.steps) for lr in rates}
        best[kind] = min(rates, key=lambda lr, tried=tried: last(tried[lr]))
        curves[kind] = [run(kind, "row", best[kind], seed, args.steps) for seed in args.seeds]
        curves[kind].append(run(kind, "row", best[kind], first, args.long))
        table += [row for rows in [*tried.values(), *curves[kind][1:]] for row in rows]
    orders = {
        name: [run("transformer", name, best["transformer"], seed, args.steps) for seed in args.seeds]
        for name in ORDERS
    }
    write(args.table, table)
    ends = [{"order": name, "seed": r[-1]["seed"], "nats": last(r)} for name, runs in orders.items() for r in runs]
    write(args.orders, ends)
    figure(curves, orders, args.figure)
    return 0


if __name__ == "__main__":
    runtime.run(main)
