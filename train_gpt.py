"""Stage two: learn which codes follow which, p(s | c) (Sec. 3.2 of arXiv:2012.09841).

    python train_gpt.py                                     on the codes of runs/vqgan/last.pt
    python train_gpt.py --vqgan V.pt --data photos --cond none
    python train_gpt.py --vqgan V.pt --cond spatial --cond-vqgan LABELS.pt --data streets

The first stage is frozen: where pictures are not cropped at random, their codes are computed once and the loop below
only ever sees tokens.
"""

import json
import math
import time
from argparse import BooleanOptionalAction
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from minvqgan.conditioning import ClassCondition, CoordinateCondition, NoCondition, SpatialCondition
from minvqgan.gpt import GPT, GPTConfig, parameter_groups
from minvqgan.harness import checkpoint, data, flags, official, pictures, runtime, tokens
from minvqgan.harness.runtime import UserError
from minvqgan.orders import ORDERS
from minvqgan.two_stage import TwoStage, TwoStageConfig, condition_length
from minvqgan.vqgan import VQGAN

# A preset is a set of defaults; every flag overrides it. `small` and `gpt2-medium` say only what differs from `tiny`.
PRESETS = {
    # 0.9 M parameters: for the built-in shapes and for a laptop.
    "tiny": {
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 128,
        "dropout": 0.0,
        "batch_size": 64,
        "steps": 3000,
        "lr": 2e-3,
        "log_every": 50,
        "val_every": 500,
        "save_every": 500,
    },
    # 26 M parameters: for a folder of your own on one GPU.
    "small": {
        "n_layer": 8,
        "n_head": 8,
        "n_embd": 512,
        "dropout": 0.1,
        "steps": 50_000,
        "lr": 5e-4,
        "log_every": 100,
        "val_every": 1000,
        "save_every": 1000,
    },
    # The paper's of 307 M parameters (Tab. 8); 306 M with 1024 codes and as many classes.
    "gpt2-medium": {
        "n_layer": 24,
        "n_head": 16,
        "n_embd": 1024,
        "dropout": 0.0,
        "batch_size": 32,
        "steps": 500_000,
        "lr": 1.5e-4,
        "log_every": 100,
        "val_every": 5000,
        "save_every": 2000,
    },
}

# What a checkpoint must hold beside the model for training to go on from it.
RESUME_NEEDS = {
    "opt": dict,
    "step": int,
    "seconds": float,
    "best": float,
    "best_step": int,
    "flags": dict,
    "random": dict,
}

# What a resumed run may be given anew, as in train_vqgan.py.
MAY_CHANGE = "steps device amp compile workers resume val_every val_images save_every log_every out preset".split()
MAY_CHANGE += ["lr", "accumulate"]

COLUMNS = "step seconds lr loss val_nats val_bits_per_pixel".split()


def parse_flags():
    p = flags.Parser(description=__doc__.split("\n")[0])
    g = flags.add_run_flags(p, PRESETS, out="runs/gpt")
    g.add_argument("--vqgan", default="runs/vqgan/last.pt", help="checkpoint of train_vqgan.py: the first stage")
    g.add_argument("--official-config", metavar="YAML", help="--vqgan is a checkpoint of the paper's authors; its yaml")
    g.add_argument("--data", help="as in train_vqgan.py (what the first stage was trained on)")
    g.add_argument("--image-size", type=flags.positive, help="side of the pictures or crops (the first stage's)")
    g.add_argument(
        "--resize", type=flags.positive, help="scale the shorter side to this, then crop (the first stage's)"
    )
    g.add_argument("--flip", action=BooleanOptionalAction, default=True, help="learn mirrored pictures of a folder too")

    g = p.add_argument_group("condition")
    g.add_argument("--cond", default="class", choices=["none", "class", "coords", "spatial"], help="what c is")
    g.add_argument("--cond-vqgan", help="checkpoint of the second first stage, for --cond spatial")
    g.add_argument("--coord-levels", type=flags.positive, default=1024, help="steps that coordinates are rounded to")
    g.add_argument("--drop-cond", type=flags.share, default=0.1, help="share of the steps without c, for guidance")

    g = p.add_argument_group("transformer")
    g.add_argument("--n-layer", type=flags.positive, help="blocks")
    g.add_argument("--n-head", type=flags.positive, help="attention heads a block")
    g.add_argument("--n-embd", type=flags.positive, help="width")
    g.add_argument("--dropout", type=flags.share, help="share of activations dropped; 0.1 and more on small data")
    g.add_argument("--order", default="row", choices=ORDERS, help="in which the codes are read")

    g = p.add_argument_group("training")
    g.add_argument("--steps", type=flags.positive, help="optimizer steps in all")
    g.add_argument("--batch-size", type=flags.positive, help="pictures a step, over all processes")
    g.add_argument("--accumulate", type=flags.positive, default=1, help="parts that a batch is computed in")
    g.add_argument("--lr", type=flags.rate, help="highest learning rate of AdamW (betas 0.9, 0.95)")
    g.add_argument("--warmup", type=flags.share, default=0.02, help="share of the steps over which lr rises")
    g.add_argument("--weight-decay", type=flags.weight, default=0.01, help="on matrices only")
    g.add_argument("--pkeep", type=flags.share, default=1.0, help="share of input codes kept; the rest become random")
    return flags.parse(p, PRESETS, "two_stage", RESUME_NEEDS, MAY_CHANGE)


def learning_rate(args, step: int) -> float:
    """Linear warm-up, then a half cosine down to a tenth."""
    warm = max(1, round(args.warmup * args.steps))
    if step < warm:
        return args.lr * step / warm
    progress = (step - warm) / max(1, args.steps - warm)
    return args.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def open_first_stage(args) -> tuple[VQGAN, dict]:
    """The first stage and the flags it was trained with. Raises UserError."""
    if not args.official_config:
        return checkpoint.load_vqgan(args.vqgan), checkpoint.read(args.vqgan, "vqgan").get("flags", {})
    model = official.load(args.vqgan, args.official_config)
    if not args.data:
        raise UserError("--official-config needs --data: pictures such as that model was trained on")
    return model.vqgan if isinstance(model, TwoStage) else model, {}


def make_condition(args, vqgan):
    """The condition, or None for classes: how many there are only the data knows."""
    if args.cond == "none":
        return NoCondition()
    if args.cond == "coords":
        return CoordinateCondition(vqgan.config.f, args.coord_levels)
    if args.cond == "class":
        return None
    if not args.cond_vqgan:
        raise UserError("--cond spatial needs --cond-vqgan: the checkpoint of a VQGAN of label maps, edges, depth, ...")
    other = checkpoint.load_vqgan(args.cond_vqgan)
    if other.config.f != vqgan.config.f:
        raise UserError(
            f"{args.cond_vqgan} has f = {other.config.f}, the first stage {vqgan.config.f}; they must agree"
        )
    return SpatialCondition(other)


def fill_in(args, trained_with: dict, config, world: int) -> None:
    """Flags not given are those of the first stage; then what argparse cannot know, before anything is built."""
    args.data = args.data or trained_with.get("data", "shapes")
    args.image_size = args.image_size or config.image_size
    args.resize = args.resize or trained_with.get("resize")
    flags.check_image_size(args.image_size, config.f)
    if args.n_embd % args.n_head:
        raise UserError(f"--n-head {args.n_head} does not divide --n-embd {args.n_embd}")
    if args.batch_size % (world * args.accumulate):
        raise UserError(
            f"--batch-size {args.batch_size} cannot be split into {world} processes x {args.accumulate} parts"
        )


def main() -> int:
    args, saved = parse_flags()
    device = runtime.pick_device(args.device)
    rank, world = runtime.init_processes(device)
    amp = device.type == "cuda" if args.amp is None else args.amp
    workers = (0 if device.type == "cpu" else 8) if args.workers is None else args.workers
    out = Path(args.out)
    if (out / "last.pt").exists() and not args.resume:
        raise UserError(f"{out} already holds a run; add --resume to go on with it, or choose another --out")

    torch.manual_seed(args.seed)
    if saved:
        model = checkpoint.unpack_two_stage(saved, out / "last.pt")
        vqgan, condition = model.vqgan, model.condition
    else:
        vqgan, trained_with = open_first_stage(args)
        fill_in(args, trained_with, vqgan.config, world)
        condition = make_condition(args, vqgan)
    sources, num_labels = tokens.sources_of(vqgan, condition)
    train_set, val_set = data.open_data(
        args.data, args.image_size, args.resize, sources, num_labels, args.seed, args.flip
    )
    if not saved:
        if condition is None and len(train_set.classes) < 2:
            raise UserError(f"{args.data} has no classes (subfolders); train with --cond none")
        condition = condition or ClassCondition(len(train_set.classes))
        n = args.image_size // vqgan.config.f
        guided = args.drop_cond > 0 and args.cond != "none"
        length = condition_length(condition, n) + n * n - 1  # the last code is predicted and never read
        sizes = (args.n_layer, args.n_head, args.n_embd, args.dropout)
        gpt = GPT(GPTConfig(vqgan.config.codebook_size, condition.num_tokens + guided, length, *sizes))
        model = TwoStage(vqgan, condition, gpt, TwoStageConfig(n, args.order, guided, classes=tuple(train_set.classes)))
    model.to(device, memory_format=torch.channels_last)  # as in train_vqgan.py: E reads half as fast again on a CPU
    gpt, T, K = model.gpt, len(model.order), vqgan.config.codebook_size
    opt = torch.optim.AdamW(
        parameter_groups(gpt, args.weight_decay), args.lr, betas=(0.9, 0.95), fused=device.type in ("cpu", "cuda")
    )
    start, seconds_before, best, best_step = 0, 0.0, float("inf"), 0
    if saved:
        checkpoint.restore(saved, {"opt": opt}, out / "last.pt")
        start, seconds_before, best, best_step = (saved[k] for k in ("step", "seconds", "best", "best_step"))
        if start >= args.steps:
            raise UserError(f"{out} is at step {start} of {args.steps} already; give more --steps to go on")
    if args.compile:
        gpt.compile()
    parallel = runtime.distributed(model, device)

    part_size = args.batch_size // (world * args.accumulate)
    to_c = tokens.condition_input(model)
    val_tokens = tokens.held_out(model, val_set, to_c, args.val_images, device)
    if rank == 0 and train_set.fixed:
        print(f"computing the codes of {len(train_set)} pictures, once")
    seen = start * args.batch_size
    batches = tokens.batches(model, train_set, to_c, part_size, args.seed, seen, workers, rank, world, device)
    if rank == 0:
        (out / "images").mkdir(parents=True, exist_ok=True)
        described = {"flags": vars(args), "gpt": asdict(gpt.config), "model": asdict(model.config)}
        (out / "config.json").write_text(json.dumps(described, indent=2))
        log = runtime.MetricsFile(out / "metrics.csv", COLUMNS, start)
        print(
            f"{len(train_set)} pictures to learn from, {len(val_tokens[0])} held out; "
            f"{sum(p.numel() for p in gpt.parameters()) / 1e6:.1f} M parameters; sentences of {T} codes after "
            f"{condition_length(condition, model.config.n)} of the condition; guessing costs ln K = {math.log(K):.3f} "
            f"nats a token; on {device}"
        )
    if saved:
        runtime.set_random_state(saved["random"])

    model.train()
    stopper, began, warned = runtime.Stopper(), time.time(), False
    bar = tqdm(range(start + 1, args.steps + 1), initial=start, total=args.steps, disable=rank > 0, dynamic_ncols=True)
    for step in bar:
        for group in opt.param_groups:
            group["lr"] = learning_rate(args, step)
        parts: list[dict[str, torch.Tensor]] = []
        for part in range(args.accumulate):
            with runtime.averaged(parallel, last_part=part == args.accumulate - 1):
                s, r = next(batches)  # (B, T) codes, (B, R) condition tokens

                # pkeep: what is read is partly wrong, as it will be when the model reads what it has written itself.
                s_in = s
                if args.pkeep < 1:
                    wrong = torch.rand(s.shape, device=device) >= args.pkeep
                    s_in = torch.where(wrong, torch.randint_like(s, K), s)
                # Without c every tenth time, so that the same model also knows p(s), which guidance leads away from.
                if model.null is not None:
                    dropped = torch.rand(len(r), 1, device=device) < args.drop_cond
                    r = torch.where(dropped, model.null, r)

                # -log p(s | r), the mean over all codes (Eq. 9, 10).
                with runtime.autocast(device, amp):
                    loss = parallel(s, r, s_in).mean()
                (loss / args.accumulate).backward()
            parts.append({"loss": loss})
        losses = runtime.mean_of(parts)
        runtime.check_finite(losses, step, out)
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        opt.step()
        opt.zero_grad()

        stopping, last = stopper.stop(device), step == args.steps
        if rank > 0:
            if stopping:
                return stopper.exit_code
            continue
        row = {}
        if step % args.log_every == 0 or last:
            row = losses | {"lr": learning_rate(args, step)}
            bar.set_postfix(loss=f"{losses['loss']:.3f}")

        def content(step=step):
            return checkpoint.pack_two_stage(model) | {"step": step, "flags": vars(args)}

        if step % args.val_every == 0 or last:
            nats = tokens.mean_nats(model, val_tokens, part_size)
            bits = nats * T / math.log(2) / args.image_size**2
            row |= {"val_nats": nats, "val_bits_per_pixel": bits}
            tqdm.write(
                f"step {step}: held out {nats:.4f} nats a token of ln K = {math.log(K):.3f}, {bits:.3f} bits a pixel"
            )
            if nats < best:
                best, best_step = nats, step
                checkpoint.save(out / "best.pt", "two_stage", **content())
            elif not warned and nats > best + 0.02:
                warned = True
                tqdm.write(
                    f"  held-out loss has risen since step {best_step}: the model now learns its pictures by heart. "
                    "best.pt is from there; more data, --dropout, --pkeep 0.9 or a smaller model help"
                )
            save_pictures(args, model, val_set, to_c, device, out / "images", f"step_{step:07d}")
        if row:
            log.write(step=step, seconds=seconds_before + time.time() - began, **row)
        if step % args.val_every == 0 or last or stopping:
            pictures.plot_columns(out / "loss.png", log.rows(), [["loss", "val_nats"], ["val_bits_per_pixel"]])
        if step % args.save_every == 0 or last or stopping:
            checkpoint.save(
                out / "last.pt",
                "two_stage",
                **content(),
                opt=opt.state_dict(),
                seconds=seconds_before + time.time() - began,
                best=best,
                best_step=best_step,
                random=runtime.random_state(),
            )
        if stopping and not last:
            bar.close()
            print(f"stopped and saved at step {step}; go on with: python train_gpt.py --out {out} --resume")
            return stopper.exit_code

    if rank == 0:
        bar.close()
        minutes = (seconds_before + time.time() - began) / 60
        print(f"done in {minutes:.1f} minutes: {nats:.4f} nats a token held out (best {best:.4f} at step {best_step})")
        print(f"samples: {out / 'images'}   curves: {out / 'loss.png'}")
        print(f"next: python sample.py --gpt {out / 'best.pt'}")
    return 0


@torch.no_grad()
def save_pictures(args, model, val_set, to_c, device, folder: Path, name: str) -> None:
    """Samples, completions of the upper halves of held-out pictures, and c | sample | truth where c is a picture."""
    model.eval()
    kind = model.vqgan.config.input_kind
    batch = {k: v.to(device) for k, v in next(data.held_out_batches(val_set, 8, 8)).items()}
    x, c = data.to_input(batch, kind, model.vqgan.config.in_channels), to_c(batch)
    if args.cond == "class":  # every class in turn instead of those that happen to be held out
        c = (torch.arange(8 * 3, device=device) % len(model.config.classes)).sort().values
    elif args.cond != "spatial":
        c = torch.cat([c] * 3)
    samples = model.sample(c)
    if args.cond == "spatial":
        shown = pictures.to_rgb(c, model.condition.vqgan.config.input_kind)
        rows = [shown, pictures.to_rgb(samples, kind), pictures.to_rgb(x, kind)]
    else:
        rows = list(pictures.to_rgb(samples, kind).chunk(3))
    pictures.save_grid(folder / f"{name}_samples.png", [row.cpu() for row in rows])
    if model.config.order == "row":
        completed = model.complete(x, 0.5, to_c(batch))
        rows = [pictures.to_rgb(x, kind), pictures.to_rgb(completed, kind)]
        pictures.save_grid(folder / f"{name}_completions.png", [row.cpu() for row in rows])
    model.train()


if __name__ == "__main__":
    runtime.run(main)
