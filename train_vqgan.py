"""Stage one: learn a codebook of image parts (Sec. 3.1 of arXiv:2012.09841).

    python train_vqgan.py                                   the built-in shapes on a laptop
    python train_vqgan.py --data photos --preset small      a folder of your own
    torchrun --nproc_per_node=8 train_vqgan.py --preset paper --data imagenet

The loop in `main` is the paper's, in the order of its equations: x_hat = G(q(E(x))), the generator's losses and lambda,
one backward pass, then the discriminator.
"""

import json
import time
from argparse import BooleanOptionalAction
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from minvqgan.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    adversarial_ramp,
    generator_loss,
    hinge_loss,
    log_loss,
)
from minvqgan.harness import checkpoint, data, flags, metrics, pictures, runtime
from minvqgan.harness.runtime import UserError
from minvqgan.quantizer import codebook_stats
from minvqgan.vqgan import VQGAN, VQGANConfig

# A preset is a set of defaults; every flag overrides it. `small` and `paper` say only what differs from `tiny`.
PRESETS = {
    # 32 px, f = 4: for the built-in shapes and for a laptop. Measured on shapes, 900 steps without D, one run each
    # (codes used, perplexity of 256, held-out PSNR):
    #     codebook as the paper begins it (--revive-every 0)    25 %    50   28.1 dB
    #     begun from data, dead codes revived                  100 %   206   29.0
    #     the same with --l2-norm                              100 %   229   29.0
    #     the same with --rotation                             100 %   188   29.4
    #     the same with --code-dim 64                          100 %   200   29.9
    # Over the whole run with D, 16 and 64 dimensions reach the same (32.4 and 32.5 dB), 16 with the higher perplexity.
    # D, one run each (disc_loss at the end, where 1.00 with equal logits means that D has given up):
    #     shapes, D's rate 1e-3, no cap: lambda climbs from 0.01 to 2 when G has learned to fool D    1.00   32.4 dB
    #     the same, lambda capped at 0.03                                                            0.89   33.0
    #     CIFAR-10, 1800 steps, capped, rate 1e-3, weight 0.2: D sees through everything             0.00   23.9
    #     the same, rate 1e-4: it still does                                                         0.00   23.9
    #     the same, weight 0.8: a fair game, visibly sharper                                         0.95   22.7
    # A weight of 0.6 makes the L1 of shapes rise by a quarter when D joins, 0.3 that of CIFAR-10 by 19 % (9000 steps),
    # 0.2 by 3 % (4500 steps): the default is the one that breaks nothing, not the sharpest.
    "tiny": {
        "image_size": 32,
        "ch": 16,
        "ch_mult": [1, 2, 4],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "norm_groups": 1,
        "z_channels": 64,
        "codebook_size": 256,
        "code_dim": 16,
        "l2_norm": False,
        "batch_size": 32,
        "steps": 1800,
        "lr": 1e-3,
        "lr_decay": 0.4,
        "perceptual": "none",
        "revive_every": 20,
        "disc_start": 0.4,
        "disc_warmup": 0.1,
        "disc_ramp": 0.1,
        "disc_lr": 1e-4,
        "disc_weight": 0.2,
        "max_lambda": 0.03,
        "disc_channels": 32,
        "disc_layers": 2,
        "log_every": 20,
        "val_every": 200,
        "save_every": 200,
    },
    # 64 px, f = 8: for a folder of your own. Only begun, not measured to the end: 400 steps on 367 photographs, without
    # LPIPS, came to use 78 % of the codes on held-out ones, and rising. max_lambda is not measured: LPIPS makes L_rec's
    # gradient, and so lambda, larger than in tiny.
    "small": {
        "image_size": 64,
        "ch": 32,
        "ch_mult": [1, 2, 4, 4],
        "norm_groups": 2,
        "z_channels": 128,
        "codebook_size": 1024,
        "steps": 50_000,
        "lr": 4e-4,
        "disc_lr": 4e-5,
        "max_lambda": 0.1,
        "disc_channels": 64,
        "perceptual": "vgg16",
        "val_every": 1000,
        "save_every": 1000,
        "log_every": 50,
    },
    # 256 px, f = 16: the official ImageNet model with 1024 codes, with its learning rate of 4.5e-6 a picture.
    "paper": {
        "image_size": 256,
        "ch": 128,
        "ch_mult": [1, 1, 2, 2, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [16],
        "norm_groups": 32,
        "z_channels": 256,
        "codebook_size": 1024,
        "code_dim": 256,
        "batch_size": 12,
        "steps": 1_000_000,
        "lr": 4.5e-6 * 12,
        "lr_decay": 0.0,
        "perceptual": "vgg16",
        "disc_start": 0.25,
        "disc_lr": 4.5e-6 * 12,
        "disc_weight": 0.8,
        "max_lambda": 1e4,
        "disc_channels": 64,
        "disc_layers": 3,
        "val_every": 5000,
        "save_every": 2000,
        "log_every": 100,
    },
}

# Flags that are fields of VQGANConfig, under the same names.
MODEL_FLAGS = (
    "image_size ch ch_mult num_res_blocks attn_resolutions norm_groups z_channels dropout "
    "codebook_size code_dim beta legacy l2_norm rotation gumbel"
).split()

# What a checkpoint must hold beside the weights for training to go on from it.
RESUME_NEEDS = {"discriminator": dict, "opt_g": dict, "opt_d": dict, "step": int, "seconds": float, "best": float}
RESUME_NEEDS |= {"disc_steps": list, "counts": torch.Tensor, "revived": int, "flags": dict, "random": dict}

# What a resumed run may be given anew: where it runs and for how long, what it writes, and the ways out of a loss that
# is not a number and of too little memory. Everything else would make another model of it.
MAY_CHANGE = "steps device amp compile checkpoint_grad workers resume val_every val_images save_every log_every".split()
MAY_CHANGE += ["out", "preset", "lr", "disc_lr", "accumulate"]

COLUMNS = (
    "step seconds lr rec_loss l1 perceptual codebook_loss gen_loss disc_loss logits_real logits_fake lambda adv_share "
    "usage perplexity revived val_l1 val_psnr val_lpips val_perceptual val_cross_entropy val_pixel_accuracy val_usage "
    "val_perplexity"
).split()

# Which columns loss.png shows, panel by panel.
PANELS = [
    ["rec_loss", "l1", "val_l1", "val_cross_entropy"],
    ["perceptual", "val_lpips", "val_perceptual"],
    ["val_psnr"],
    ["disc_loss", "logits_real", "logits_fake"],
    ["usage", "val_usage"],
]


def parse_flags():
    p = flags.Parser(description=__doc__.split("\n")[0])
    g = flags.add_run_flags(p, PRESETS, out="runs/vqgan")
    g.add_argument("--data", default="shapes", help="folder of pictures, `shapes`, or a torchvision set by name")
    g.add_argument("--input", default="rgb", choices=data.KINDS, help="what the pictures are read as")
    g.add_argument("--num-labels", type=flags.positive, help="number of labels, for --input labels")
    g.add_argument("--image-size", type=flags.positive, help="side of the training pictures, in pixels")
    g.add_argument("--resize", type=flags.positive, help="scale the shorter side to this, then crop (the image size)")
    g.add_argument("--flip", action=BooleanOptionalAction, default=True, help="mirror half of the pictures of a folder")

    g = p.add_argument_group("model (names of the official configuration)")
    g.add_argument("--ch", type=flags.positive, help="channels at full resolution")
    g.add_argument("--ch-mult", type=flags.positive, nargs="+", help="channel factor of each level; f = 2^(levels - 1)")
    g.add_argument("--num-res-blocks", type=flags.positive, help="residual blocks a level")
    g.add_argument("--attn-resolutions", type=flags.positive, nargs="*", help="sides of further maps with attention")
    g.add_argument("--norm-groups", type=flags.positive, help="groups of each GroupNorm; 16 channels a group or more")
    g.add_argument("--z-channels", type=flags.positive, help="channels of the latent map")
    g.add_argument("--dropout", type=flags.share, default=0.0, help="in the residual blocks")
    g.add_argument("--codebook-size", type=flags.positive, help="number of codes K")
    g.add_argument("--code-dim", type=flags.positive, help="dimensions of a code")
    g.add_argument("--beta", type=flags.weight, default=0.25, help="weight of the commitment term")
    g.add_argument("--legacy", action="store_true", help="beta on the codebook term, as the official code did for long")
    g.add_argument("--l2-norm", action=BooleanOptionalAction, help="compare latents and codes by direction")
    g.add_argument("--rotation", action="store_true", help="rotation trick instead of straight-through")
    g.add_argument("--gumbel", action="store_true", help="Gumbel-softmax quantizer instead of nearest neighbours")

    g = p.add_argument_group("training")
    g.add_argument("--steps", type=flags.positive, help="optimizer steps in all")
    g.add_argument("--batch-size", type=flags.positive, help="pictures a step, over all processes")
    g.add_argument(
        "--accumulate", type=flags.positive, default=1, help="parts that a batch is computed in, for small memory"
    )
    g.add_argument("--checkpoint-grad", action="store_true", help="less memory, more time: G's maps are computed twice")
    g.add_argument("--lr", type=flags.rate, help="learning rate of Adam (betas 0.5, 0.9)")
    g.add_argument("--lr-decay", type=flags.share, help="last share of the steps, over which lr falls to 5 %%")
    g.add_argument("--loss", default="vqgan", choices=["vqgan", "vqvae"], help="vqvae: squared error, no LPIPS, no D")
    g.add_argument("--perceptual", help="vgg16 (LPIPS), none, or the file of a classifier")
    g.add_argument("--perceptual-weight", type=flags.weight, default=1.0, help="of the perceptual distance beside L1")
    g.add_argument(
        "--revive-every", type=flags.natural, help="steps between revivals of dead codes; 0: never, start as the paper"
    )
    g.add_argument("--disc-start", type=flags.share, help="share of the steps after which D begins to learn")
    g.add_argument("--disc-warmup", type=flags.share, help="share of the steps that D then learns alone")
    g.add_argument("--disc-ramp", type=flags.share, help="share of the steps over which its gradient comes in")
    g.add_argument("--disc-lr", type=flags.rate, help="learning rate of D's Adam")
    g.add_argument("--disc-weight", type=flags.weight, help="times lambda")
    g.add_argument(
        "--disc-loss",
        default="hinge",
        choices=["hinge", "log"],
        help="the paper writes log, its code trains with hinge",
    )
    g.add_argument("--disc-channels", type=flags.positive, help="channels of D's first layer")
    g.add_argument("--disc-layers", type=flags.positive, help="2: patches of 34 pixels, 3: of 70")
    g.add_argument("--max-lambda", type=flags.weight, help="cap of the adaptive weight")

    return flags.parse(p, PRESETS, "vqgan", RESUME_NEEDS, MAY_CHANGE)


def check(args, world: int) -> None:
    """What argparse cannot know, before anything is built."""
    flags.check_image_size(args.image_size, 2 ** (len(args.ch_mult) - 1))
    if args.checkpoint_grad and args.compile:
        raise UserError("--checkpoint-grad and --compile exclude each other: what is compiled is not computed in parts")
    if args.batch_size % (world * args.accumulate):
        raise UserError(
            f"--batch-size {args.batch_size} cannot be split into {world} processes x {args.accumulate} parts"
        )
    for channels in [args.ch] + [args.ch * m for m in args.ch_mult]:
        if channels % args.norm_groups:
            raise UserError(f"--norm-groups {args.norm_groups} does not divide {channels} channels")
    if uses_disc(args) and args.image_size < 2 ** (args.disc_layers + 2):
        raise UserError(
            f"--disc-layers {args.disc_layers} needs pictures of {2 ** (args.disc_layers + 2)} pixels or more"
        )


def uses_disc(args) -> bool:
    return args.loss == "vqgan" and args.input != "labels"


def lr_share(args, step: int) -> float:
    """Share of --lr and --disc-lr: linear warm-up over 1 % of the steps, constant, linear fall to 5 % over the last
    --lr-decay of them."""
    warm = min(1.0, step / max(1, args.steps // 100))
    left = (args.steps - step) / max(1.0, args.steps * args.lr_decay)
    return warm * max(0.05, min(1.0, left))


def reconstruction_loss(args, x, x_hat, perceptual) -> dict[str, torch.Tensor]:
    """L_rec of x, x_hat (B, C, H, W) as {"rec_loss": scalar} with its parts beside it."""
    if args.input == "labels":
        return {"rec_loss": F.cross_entropy(x_hat, x.argmax(1))}
    if args.loss == "vqvae":  # Eq. 4 as it stands, with the squared error
        return {"rec_loss": (x - x_hat).square().mean()}
    l1 = (x - x_hat).abs().mean()
    if perceptual is None:
        return {"rec_loss": l1, "l1": l1}
    distance = perceptual(x, x_hat).mean()
    return {"rec_loss": l1 + args.perceptual_weight * distance, "l1": l1, "perceptual": distance}


def main() -> int:
    args, saved = parse_flags()
    device = runtime.pick_device(args.device)
    rank, world = runtime.init_processes(device)
    check(args, world)
    amp = device.type == "cuda" if args.amp is None else args.amp
    workers = (0 if device.type == "cpu" else 8) if args.workers is None else args.workers
    out = Path(args.out)
    if (out / "last.pt").exists() and not args.resume:
        raise UserError(f"{out} already holds a run; add --resume to go on with it, or choose another --out")

    # Data and the perceptual network can be missing, so they come before anything is built or written.
    in_channels = data.input_channels(args.input, args.num_labels)
    sources = (data.SOURCE_OF[args.input],)
    train_set, val_set = data.open_data(
        args.data, args.image_size, args.resize, sources, args.num_labels, args.seed, args.flip
    )
    perceptual = metrics.load_perceptual(args.perceptual, args.image_size) if uses_disc(args) else None

    # channels_last: on a CPU convolutions of few channels run up to six times as fast, on a GPU bfloat16 gains too.
    placed = {"device": device, "memory_format": torch.channels_last}
    torch.manual_seed(args.seed)
    from_flags = {name: getattr(args, name) for name in MODEL_FLAGS}
    config = VQGANConfig(in_channels=in_channels, input_kind=args.input, **from_flags)
    vqgan = VQGAN(config).to(**placed)
    disc = PatchDiscriminator(in_channels, args.disc_channels, args.disc_layers).to(**placed)
    perceptual = perceptual and perceptual.to(**placed)
    fused = device.type in ("cpu", "cuda")
    opt_g = torch.optim.Adam(vqgan.parameters(), args.lr, betas=(0.5, 0.9), fused=fused)
    opt_d = torch.optim.Adam(disc.parameters(), args.disc_lr, betas=(0.5, 0.9), fused=fused)
    disc_loss_of = {"hinge": hinge_loss, "log": log_loss}[args.disc_loss]

    # Where D comes in, in steps, fixed for good: a resumed run with more --steps must not take D away again.
    disc_steps = [round(share * args.steps) for share in (args.disc_start, args.disc_warmup, args.disc_ramp)]
    start, seconds_before, best = 0, 0.0, float("inf")
    if saved:
        parts = {"model": vqgan, "discriminator": disc, "opt_g": opt_g, "opt_d": opt_d}
        checkpoint.restore(saved, parts, out / "last.pt")
        start, seconds_before, best, disc_steps = (saved[k] for k in ("step", "seconds", "best", "disc_steps"))
        if start >= args.steps:
            raise UserError(f"{out} is at step {start} of {args.steps} already; give more --steps to go on")
    disc_start, disc_joined = disc_steps[0], sum(disc_steps)

    vqgan.decoder.checkpoint_grad = args.checkpoint_grad
    if args.compile:
        torch._functorch.config.donated_buffer = False  # D's graph is used twice (retain_graph), its buffers must stay
        # Not conv_out: lambda needs the gradient of this one layer, and a compiled backward pass is all or nothing.
        for part in (vqgan.encoder, vqgan.decoder.layers, disc, perceptual):
            if part is not None:
                part.compile()
    model, judge = runtime.distributed(vqgan, device), runtime.distributed(disc, device)

    part_size = args.batch_size // (world * args.accumulate)

    def batches_from(step: int):
        seen = step * args.batch_size
        return data.train_loader(train_set, part_size, args.seed, seen, workers, rank, world, device.type == "cuda")

    def to_x(batch: dict) -> torch.Tensor:
        batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
        return data.to_input(batch, args.input, args.num_labels).contiguous(memory_format=torch.channels_last)

    if not saved and args.revive_every and not args.gumbel:
        # Codes begin where latents are. All are "dead" before the first step, so this places every one of them.
        with torch.no_grad():
            vqgan.quantizer.revive_dead_codes(vqgan.eval().encode(to_x(next(batches_from(0)))).z)
    if saved:
        runtime.set_random_state(saved["random"])

    if rank == 0:
        (out / "images").mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps({"flags": vars(args), "model": asdict(config)}, indent=2))
        log = runtime.MetricsFile(out / "metrics.csv", COLUMNS, start)
        print(
            f"{len(train_set)} pictures to learn from, {min(len(val_set), args.val_images)} held out; "
            f"{sum(p.numel() for p in vqgan.parameters()) / 1e6:.1f} M parameters; a picture becomes "
            f"{args.image_size // config.f} x {args.image_size // config.f} of {args.codebook_size} codes; on {device}"
        )

    vqgan.train()
    batches = batches_from(start)
    stopper, began = runtime.Stopper(), time.time()
    counts, revived = torch.zeros(args.codebook_size, device=device), 0  # since the last row of metrics.csv
    if saved:
        counts, revived = saved["counts"].to(device), saved["revived"]
    bar = tqdm(range(start + 1, args.steps + 1), initial=start, total=args.steps, disable=rank > 0, dynamic_ncols=True)
    for step in bar:
        opt_g.param_groups[0]["lr"] = args.lr * lr_share(args, step)
        opt_d.param_groups[0]["lr"] = args.disc_lr * lr_share(args, step)
        if args.gumbel:  # from soft choices to almost hard ones
            vqgan.quantizer.temperature = max(1 / 16, 1 - step / (0.8 * args.steps))
        disc_on = uses_disc(args) and step > disc_start
        adv_share = adversarial_ramp(step, *disc_steps) if disc_on else 0.0
        parts: list[dict[str, torch.Tensor]] = []

        for part in range(args.accumulate):
            with runtime.averaged(model, judge, last_part=part == args.accumulate - 1):
                x = to_x(next(batches))  # (B, C, H, W)

                # x_hat = G(q(E(x)))
                with runtime.autocast(device, amp):
                    x_hat, quantized = model(x)
                x_hat = x_hat.float()

                # G: L_rec + lambda L_GAN + L_VQ (Eq. 6). Each loss goes back to x_hat alone; their weighted sum then
                # goes back through the network once. The derivation stands at `adaptive_weight`.
                x_leaf = x_hat.detach().requires_grad_()
                with runtime.autocast(device, amp):
                    terms = reconstruction_loss(args, x, x_leaf, perceptual) | {"codebook_loss": quantized.loss}
                (grad,) = torch.autograd.grad(terms["rec_loss"], x_leaf)
                if disc_on:
                    with runtime.autocast(device, amp):
                        logits_real, logits_fake = judge(x).float(), judge(x_leaf).float()  # (B, 1, h', w')
                if adv_share > 0:
                    terms["gen_loss"] = generator_loss(logits_fake)
                    # Only x_leaf's gradient is asked for, so none is left in D.
                    (gan_grad,) = torch.autograd.grad(terms["gen_loss"], x_leaf, retain_graph=True)
                    last_layer = vqgan.decoder.conv_out.weight
                    lambda_, _, _ = adaptive_weight(grad, gan_grad, x_hat, last_layer, max_weight=args.max_lambda)
                    grad = grad + adv_share * args.disc_weight * lambda_ * gan_grad
                    terms["lambda"] = lambda_
                scale = torch.tensor(1 / args.accumulate, device=device)
                torch.autograd.backward([x_hat, quantized.loss], [scale * grad, scale])

                # D: real pictures up, reconstructions down (Eq. 5), from the same logits. They were made from x_leaf,
                # which is x_hat.detach(): from x_hat this loss would reach G as well, and train it to make bad
                # pictures.
                if disc_on:
                    terms["disc_loss"] = disc_loss_of(logits_real, logits_fake)
                    (scale * terms["disc_loss"]).backward()
                    terms |= {"logits_real": logits_real.mean(), "logits_fake": logits_fake.mean()}
            parts.append(terms)
            counts += torch.bincount(quantized.indices.flatten(), minlength=args.codebook_size)

        losses = runtime.mean_of(parts)
        runtime.check_finite(losses, step, out)
        opt_g.step()
        opt_g.zero_grad()
        if disc_on:
            opt_d.step()
            opt_d.zero_grad()
        if args.revive_every and step % args.revive_every == 0 and not args.gumbel:
            revived += vqgan.quantizer.revive_dead_codes(quantized.z)

        stopping, last = stopper.stop(device), step == args.steps
        if rank > 0:
            if stopping:
                return stopper.exit_code
            continue
        row = {}
        if step % args.log_every == 0 or last:
            usage, perplexity = codebook_stats(counts.cpu())
            row = losses | {"lr": args.lr * lr_share(args, step), "adv_share": adv_share, "revived": revived}
            row |= {"usage": usage, "perplexity": perplexity}
            counts, revived = torch.zeros_like(counts), 0
            shown = {k: f"{losses[k]:.3f}" for k in ("rec_loss", "disc_loss") if k in losses}
            bar.set_postfix(shown | {"codes": f"{usage:.0%}"})
        if uses_disc(args) and step == disc_start + 1:
            tqdm.write(
                f"step {step}: D begins to learn; its gradient reaches G from step {disc_start + disc_steps[1]} on. "
                "Then expect L1 to rise a little, edges to sharpen, and disc_loss to stay between 0.5 and 1."
            )
        if step % args.val_every == 0 or last:
            values = metrics.evaluate_vqgan(
                vqgan, data.held_out_batches(val_set, part_size, args.val_images), device, perceptual
            )
            row |= {f"val_{k}": v for k, v in values.items()}
            tqdm.write(f"step {step}: held out " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
            if values["usage"] < 0.5:
                tqdm.write("  less than half of the codes in use: fewer codes, --revive-every 20 or --l2-norm help")
            # Best is the lowest held-out error, judged afresh once D has its full weight: D trades some of it for
            # sharpness, and the best of the time before would be a blurry model for good.
            score = sum(values.get(name, 0.0) for name in ("cross_entropy", "l1", "lpips", "perceptual"))
            if uses_disc(args) and step - args.val_every < disc_joined <= step:
                best = float("inf")
            if score < best:
                best = score
                checkpoint.save(
                    out / "best.pt",
                    "vqgan",
                    config=asdict(config),
                    model=vqgan.state_dict(),
                    step=step,
                    flags=vars(args),
                )
            save_pictures(
                vqgan, next(data.held_out_batches(val_set, 8, 8)), device, out / "images" / f"step_{step:07d}.png"
            )
        if row:
            log.write(step=step, seconds=seconds_before + time.time() - began, **row)
        if step % args.val_every == 0 or last or stopping:
            pictures.plot_columns(out / "loss.png", log.rows(), PANELS, mark=disc_start if uses_disc(args) else None)
        if step % args.save_every == 0 or last or stopping:
            checkpoint.save(
                out / "last.pt",
                "vqgan",
                config=asdict(config),
                model=vqgan.state_dict(),
                discriminator=disc.state_dict(),
                opt_g=opt_g.state_dict(),
                opt_d=opt_d.state_dict(),
                step=step,
                seconds=seconds_before + time.time() - began,
                best=best,
                disc_steps=disc_steps,
                counts=counts,
                revived=revived,
                flags=vars(args),
                random=runtime.random_state(),
            )
        if stopping and not last:
            bar.close()
            print(f"stopped and saved at step {step}; go on with: python train_vqgan.py --out {out} --resume")
            return stopper.exit_code

    if rank == 0:
        bar.close()
        minutes = (seconds_before + time.time() - began) / 60
        print(f"done in {minutes:.1f} minutes: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
        print(f"pictures (originals, reconstructions, codes): {out / 'images'}   curves: {out / 'loss.png'}")
        if args.input == "rgb":
            flag = "" if len(train_set.classes) > 1 else " --cond none"
            print(f"next: python train_gpt.py --vqgan {out / 'last.pt'}{flag}")
        else:
            print(f"next: python train_gpt.py --vqgan RGB.pt --cond spatial --cond-vqgan {out / 'last.pt'}")
    return 0


@torch.no_grad()
def save_pictures(vqgan: VQGAN, batch: dict, device: torch.device, path: Path) -> None:
    """A batch of held-out pictures, always the same ones: originals, reconstructions, codes."""
    kind = vqgan.config.input_kind
    x = data.to_input({k: v.to(device) for k, v in batch.items()}, kind, vqgan.config.in_channels)
    vqgan.eval()
    x_hat, quantized = vqgan(x)
    vqgan.train()
    codes = pictures.code_map(vqgan, quantized.indices, vqgan.config.f)
    pictures.save_grid(path, [pictures.to_rgb(x, kind).cpu(), pictures.to_rgb(x_hat, kind).cpu(), codes])


if __name__ == "__main__":
    runtime.run(main)
