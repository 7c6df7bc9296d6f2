"""Stage one: learn a codebook of image patches (Sec. 3.1 of arXiv:2012.09841).

    python train_vqgan.py                                   the built-in shapes on a laptop
    python train_vqgan.py --data photos --preset small      a folder of your own
    torchrun --nproc_per_node=8 train_vqgan.py --preset paper --data imagenet

The loop in `main` calls one step of the paper's objective, `minvqgan/objective.py`, which leaves gradients in E, G, the
codebook and D, and then moves them.
"""

import shlex
from argparse import BooleanOptionalAction
from dataclasses import asdict
from itertools import chain

import torch

from minvqgan.discriminator import PatchDiscriminator
from minvqgan.harness import checkpoint, data, flags, judges, metrics, pictures, processes, runtime
from minvqgan.harness.run import Run
from minvqgan.harness.runtime import UserError
from minvqgan.objective import ObjectiveConfig, adversarial_ramp, stage_one_step
from minvqgan.quantizer import codebook_stats
from minvqgan.vqgan import VQGAN, VQGANConfig

# A preset is a line of flags, complete in itself but for the defaults that all three share; flags on the command line
# win over it. How they were found: results/LOG.md.
PRESETS = {
    # DEPARTURE: in tiny and small D has a rate of its own, and both rates rise at the start and fall at the end; the
    # official code has one constant rate.
    # 32 px, f = 4: for the built-in shapes, CIFAR-10 and a laptop.
    "tiny": """
        --image-size 32 --ch 16 --ch-mult 1 2 4 --num-res-blocks 1 --attn-resolutions --norm-groups 1 --no-legacy
        --z-channels 64 --codebook-size 256 --code-dim 16 --revive-every 20
        --batch-size 32 --steps 1800 --lr 1e-3 --disc-lr 2e-4 --warmup 0.01 --lr-decay 0.4 --flip
        --perceptual small --perceptual-weight 0.3 --disc-weight 0.3 --max-lambda 0.05 --delta 1e-6
        --disc-start 0.4 --disc-warmup 0.1 --disc-ramp 0.1 --disc-channels 32 --disc-layers 2
        --log-every 20 --val-every 200 --save-every 200""",
    # 64 px, f = 8: for a folder of your own.
    "small": """
        --image-size 64 --ch 32 --ch-mult 1 2 4 4 --num-res-blocks 1 --attn-resolutions --norm-groups 2
        --z-channels 128 --codebook-size 1024 --code-dim 16 --no-legacy --revive-every 20
        --batch-size 32 --steps 20000 --lr 4e-4 --disc-lr 8e-5 --warmup 0.01 --lr-decay 0.4 --flip
        --perceptual small --perceptual-weight 0.3 --disc-weight 0.5 --max-lambda 0.1 --delta 1e-6
        --disc-start 0.4 --disc-warmup 0.1 --disc-ramp 0.1 --disc-channels 64 --disc-layers 2
        --log-every 50 --val-every 1000 --save-every 1000""",
    # 256 px, f = 16: the official ImageNet model with 1024 codes, by the official recipe: 4.5e-6 for each image of the
    # batch, D at full weight from step 250,001 on, no revival, beta on the codebook term, a cap on lambda that is never
    # reached. (--disc-start is a fraction: with other --steps, scale it.)
    # DEPARTURE: even here bfloat16 where it is faster (--no-amp), D's step beside G's, and an end.
    "paper": """
        --image-size 256 --ch 128 --ch-mult 1 1 2 2 4 --num-res-blocks 2 --attn-resolutions 16 --norm-groups 32
        --z-channels 256 --codebook-size 1024 --code-dim 256 --legacy --revive-every 0
        --batch-size 12 --steps 1000000 --base-lr 4.5e-6 --warmup 0 --lr-decay 0 --no-flip
        --perceptual vgg16 --perceptual-weight 1 --disc-weight 0.8 --max-lambda 1e4 --delta 1e-4
        --disc-start 0.25 --disc-warmup 0 --disc-ramp 0 --disc-channels 64 --disc-layers 3
        --log-every 100 --val-every 5000 --save-every 2000""",
}

# Which columns of metrics.csv loss.png shows, panel by panel.
PANELS = [
    ["rec_loss", "l1", "val_l1", "val_cross_entropy"],
    ["perceptual", "val_lpips", "val_perceptual"],
    ["val_psnr"],
    ["disc_loss", "logits_real", "logits_fake"],
    ["usage", "val_usage"],
]


def parse_flags(argv: list[str] | None = None):
    """(flags, checkpoint to resume from or None). Raises UserError."""
    p = flags.Parser(description=__doc__)
    t = flags.add_run_flags(p, PRESETS, out="runs/vqgan")
    g = p.add_argument_group("data")
    g.add_argument("--data", default="shapes", help=f"folder, `shapes`, or one of {', '.join(data.TORCHVISION)}")
    g.add_argument("--input", default="rgb", choices=data.KINDS, help="what the images are read as")
    g.add_argument("--num-labels", type=flags.size, help="number of labels, for --input labels")
    resize = "scale the shorter side to this (--image-size), then crop at random, which covers the longer side too"
    g.add_argument("--resize", type=flags.size, help=resize)
    g.add_argument("--flip", action=BooleanOptionalAction, help="mirror half of the images (not digits)")

    t.add_argument("--checkpoint-grad", action="store_true", help="less memory, more time: recompute G's activations")
    t.add_argument("--lr", type=flags.rate, help="learning rate of Adam (betas 0.5, 0.9) for E, G and the codebook")
    t.add_argument("--disc-lr", type=flags.rate, help="learning rate of D's Adam")
    t.add_argument("--base-lr", type=flags.rate, help="both for each image of the batch, where the preset gives none")
    t.add_argument("--lr-decay", type=flags.fraction, help="last fraction of the steps, over which lr falls to 5 %%")
    t.add_argument("--revive-every", type=flags.natural, help="steps between revivals of dead codes; 0: never")
    t.add_argument("--disc-start", type=flags.fraction, help="fraction of the steps after which D begins to learn")
    t.add_argument("--disc-warmup", type=flags.fraction, help="fraction of the steps that D then learns alone")
    t.add_argument("--disc-ramp", type=flags.fraction, help="fraction of the steps over which its gradient comes in")

    g = p.add_argument_group("objective")
    flags.add_fields(g, ObjectiveConfig)
    g.add_argument("--perceptual", help="small (in the package), vgg16 (LPIPS), none, or a classifier's file")
    g.add_argument("--disc-channels", type=flags.size, help="channels of D's first layer")
    g.add_argument("--disc-layers", type=flags.positive, help="2: patches of 34 pixels, 3: of 70")
    flags.add_fields(p.add_argument_group("model (names of the official configuration)"), VQGANConfig)
    return flags.parse(p, PRESETS, "vqgan", argv)


def check(args) -> None:
    """Fill in what follows from other flags. Raises UserError for flags that contradict each other."""
    if args.input == "labels":
        if args.loss == "vqvae":
            raise UserError("--loss vqvae compares pixels; for --input labels leave --loss out")
        args.loss = "labels"
    elif args.loss == "labels":
        raise UserError(f"--loss labels needs --input labels, not {args.input}")
    smallest = 2 ** (args.disc_layers + 2)
    if args.loss == "vqgan" and args.image_size < smallest:
        raise UserError(f"--disc-layers {args.disc_layers} needs images of {smallest} pixels or more")
    args.lr = args.lr or args.base_lr * args.batch_size
    args.disc_lr = args.disc_lr or args.base_lr * args.batch_size


def lr_fraction(args, step: int) -> float:
    """Fraction of the learning rates at `step`: linear warm-up, constant, linear fall to 5 %."""
    warm = min(1.0, step / max(1, round(args.steps * args.warmup)))
    left = (args.steps - step) / max(1.0, args.steps * args.lr_decay)
    return warm * (max(0.05, min(1.0, left)) if args.lr_decay else 1.0)


def build(args, device: torch.device):
    """VQGAN, D, the perceptual network (or None), and the optimizers of the first two. Raises UserError."""
    in_channels = data.input_channels(args.input, args.num_labels)
    config = flags.config(VQGANConfig, args, in_channels=in_channels, input_kind=args.input)
    perceptual = judges.load_perceptual(args.perceptual, args.image_size) if args.loss == "vqgan" else None
    with runtime.seeded(args.seed, "vqgan"):
        vqgan = VQGAN(config)
    with runtime.seeded(args.seed, "discriminator"):
        disc = PatchDiscriminator(in_channels, args.disc_channels, args.disc_layers)

    # channels_last: convolutions of few channels are up to six times as fast on a CPU, those in bfloat16 on a GPU too.
    networks = [n.to(device, memory_format=torch.channels_last) for n in (vqgan, disc, perceptual) if n]
    adam = {"betas": (0.5, 0.9), "fused": device.type in ("cpu", "cuda")}
    opt_g = torch.optim.Adam(vqgan.parameters(), args.lr, **adam)
    opt_d = torch.optim.Adam(disc.parameters(), args.disc_lr, **adam)
    vqgan.decoder.checkpoint_grad = args.checkpoint_grad
    if args.compile:
        # Not conv_out: lambda needs the gradient of this one layer, and a compiled backward pass is all or nothing.
        runtime.compile_modules(vqgan.encoder, vqgan.decoder.layers, *networks[1:])
    return vqgan, disc, perceptual, opt_g, opt_d


@runtime.global_state_restored()
def main(argv: list[str] | None = None) -> int:
    args, saved = parse_flags(argv)
    check(args)
    run = Run(args, "vqgan", PANELS, ["rec_loss", "disc_loss", "usage"], saved)
    data.check_outside(args.out, args.data)
    how = ((data.SOURCE_OF[args.input],), args.num_labels, args.seed, args.flip)
    train_set, val_set = data.open_data(args.data, args.image_size, args.resize, *how)
    vqgan, disc, perceptual, opt_g, opt_d = build(args, run.device)
    if args.init and not saved:
        run.say(checkpoint.init_from(args.init, vqgan, discriminator=disc))
    objective, counts = flags.config(ObjectiveConfig, args), vqgan.quantizer.counts
    uses_disc = args.loss == "vqgan"
    # Of the steps planned at the start: resuming with more --steps must not move D's start behind the present step.
    disc_steps = [round(f * run.planned_steps) for f in (args.disc_start, args.disc_warmup, args.disc_ramp)]
    run.start(
        {"model": vqgan, "discriminator": disc, "opt_g": opt_g, "opt_d": opt_d, "counts": counts},
        lambda: {"config": asdict(vqgan.config), "model": vqgan.state_dict()},
        describe(args, vqgan, train_set, val_set),
    )
    batches, revives = run.batches(train_set), args.revive_every > 0 and not args.gumbel
    if revives and not saved:
        batches = place_codes(run, vqgan, batches)
    del saved  # a second copy of the weights
    parallel = [processes.distributed(network, run.device) for network in (vqgan, disc)]

    @run.cuda_graph(vqgan, disc)
    def gradients(x, adv_fraction):
        return stage_one_step(*parallel, perceptual, x, objective, adv_fraction, run.amp, scale=1 / args.accumulate)

    vqgan.train()
    for step in run.steps():
        lr = lr_fraction(args, step)
        opt_g.param_groups[0]["lr"], opt_d.param_groups[0]["lr"] = lr * args.lr, lr * args.disc_lr
        if args.gumbel:  # from soft choices to almost hard ones
            # DEPARTURE: a straight line; the official f8 model falls along a cosine, and almost to 0.
            vqgan.quantizer.temperature = max(1 / 16, 1 - step / (0.8 * run.planned_steps))
        disc_on = uses_disc and step > disc_steps[0]
        adv_fraction = adversarial_ramp(step, *disc_steps) if disc_on else None

        for batch in run.micro_batches(batches, *parallel):
            x = to_x(run, batch)  # (B, C, H, W)
            terms, quantized = gradients(x, adv_fraction)
            run.add(terms)
        opt_g.step()
        opt_g.zero_grad()
        if disc_on:
            opt_d.step()
            opt_d.zero_grad()
        if revives and step % args.revive_every == 0:
            run.add({"revived": vqgan.quantizer.revive_dead_codes(quantized.z)})

        if disc_on and step == disc_steps[0] + 1:
            run.say(DISC_BEGINS.format(step + disc_steps[1]))
        if run.is_log_step:
            usage, perplexity = codebook_stats(counts)
            run.note(lr=lr * args.lr, adv_fraction=adv_fraction or 0.0, usage=usage, perplexity=perplexity)
            counts.zero_()
        if run.is_val_step:
            validate(run, vqgan, val_set, perceptual, d_full=sum(disc_steps) if uses_disc else 0)
    if run.rank == 0 and run.is_last_step:
        finish(run, train_set)
    return run.exit_code


def place_codes(run: Run, vqgan: VQGAN, batches):
    """Move every code onto a latent of the first batch: before the first step all count as dead (but those of --init),
    and are revived. Returns the batches, the first one included."""
    first = next(batches)
    with torch.no_grad():
        vqgan.quantizer.revive_dead_codes(vqgan.eval().encode(to_x(run, first)).z)
    return chain([first], batches)


DISC_BEGINS = (
    "D begins to learn; its gradient reaches G from step {} on. Then expect L1 to rise a little and edges to sharpen. "
    "logits_real should stay above logits_fake; a difference that keeps growing means that D overpowers G."
)


@torch.no_grad()
def validate(run: Run, vqgan: VQGAN, val_set, perceptual, d_full: int) -> None:
    """Held-out numbers, best.pt, and a grid of always the same images: originals, reconstructions, codes.

    d_full: the last step before D's gradient has its full weight; 0 without D.
    """
    args, c = run.args, vqgan.config
    batches = data.held_out_batches(val_set, run.micro_batch, args.val_images)
    values = metrics.evaluate_vqgan(vqgan, batches, run.device, perceptual)
    # best.pt starts anew once D is at full weight: earlier models have lower errors, but they are blurry.
    score = sum(values.get(name, 0.0) for name in ("cross_entropy", "l1", "lpips", "perceptual"))
    run.save_best(values, score, since=d_full)
    positions = min(len(val_set), args.val_images) * (args.image_size // c.f) ** 2
    if values["usage"] < 0.5 and positions >= 4 * c.codebook_size:  # fewer positions could not show all codes
        run.say("less than half of the codes in use: fewer codes, --revive-every 20 or --l2-norm help")

    x = to_x(run, next(data.held_out_batches(val_set, 8, 8)))
    x_hat, quantized = vqgan.eval()(x)
    vqgan.train()
    codes = pictures.code_map(vqgan, quantized.indices, c.f)
    run.save_images([*(pictures.to_rgb(images, c.input_kind).cpu() for images in (x, x_hat)), codes])


def to_x(run: Run, batch: dict) -> torch.Tensor:
    """A dataset's batch as (B, C, H, W) on the device."""
    batch = {k: v.to(run.device, non_blocking=True) for k, v in batch.items()}
    return data.to_input(batch, run.args.input, run.args.num_labels).contiguous(memory_format=torch.channels_last)


def describe(args, vqgan: VQGAN, train_set, val_set) -> str:
    side, parameters = args.image_size // vqgan.config.f, sum(p.numel() for p in vqgan.parameters()) / 1e6
    images = f"{len(train_set)} training images, {min(len(val_set), args.val_images)} held-out"
    return f"{images}; {parameters:.1f} M parameters; an image becomes {side} x {side} of {args.codebook_size} codes"


def finish(run: Run, train_set) -> None:
    """Say where the results are, and the next command."""
    print(f"done in {run.seconds / 60:.1f} minutes; originals, reconstructions, codes: {run.out / 'images'}")
    model, cond = shlex.quote(str(run.out / "last.pt")), "" if len(train_set.classes) > 1 else " --cond none"
    print(f"next: python train_gpt.py --vqgan {model}{cond}")
    if run.args.input != "rgb":
        print(f"or, as the condition of photos: python train_gpt.py --vqgan RGB.pt --cond spatial --cond-vqgan {model}")


if __name__ == "__main__":
    runtime.run(main)
