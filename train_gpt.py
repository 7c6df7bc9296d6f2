"""Stage two: learn which codes follow which, p(s | c) (Sec. 3.2 of arXiv:2012.09841).

    python train_gpt.py                                     on the codes of runs/vqgan/last.pt
    python train_gpt.py --vqgan V.pt --data photos --cond none
    python train_gpt.py --vqgan V.pt --cond spatial --cond-vqgan LABELS.pt --data streets

The loop in `main` sees tokens alone: the first-stage model is frozen, and where images are not cropped at random their
codes are computed once. The loss is `TwoStage.forward`, in `minvqgan/two_stage.py`.
"""

import math
import shlex
from argparse import BooleanOptionalAction

import torch

from minvqgan.conditioning import ClassCondition, CoordinateCondition, NoCondition, SpatialCondition
from minvqgan.gpt import GPT, GPTConfig, parameter_groups
from minvqgan.harness import checkpoint, data, flags, official, pictures, processes, runtime, tokens
from minvqgan.harness.run import Run
from minvqgan.harness.runtime import UserError
from minvqgan.two_stage import TwoStage, TwoStageConfig, condition_length, sequence_length
from minvqgan.vqgan import VQGAN

# A preset is a line of flags, complete in itself; flags on the command line win over it. How they were found:
# results/LOG.md.
PRESETS = {
    # 0.9 M parameters: for the built-in shapes, CIFAR-10 and a laptop.
    "tiny": """
        --n-layer 4 --n-head 4 --n-embd 128 --dropout 0 --batch-size 64 --steps 3000 --lr 2e-3 --warmup 0.02
        --weight-decay 0.01 --drop-cond 0.1 --pkeep 1 --log-every 50 --val-every 500 --save-every 500""",
    # 26 M parameters: for a folder of your own on one GPU.
    "small": """
        --n-layer 8 --n-head 8 --n-embd 512 --dropout 0.1 --batch-size 64 --steps 20000 --lr 5e-4 --warmup 0.02
        --weight-decay 0.01 --drop-cond 0.1 --pkeep 1 --log-every 100 --val-every 1000 --save-every 1000""",
    # The paper's, 307 M parameters (Tab. 8); 306 M with 1024 codes and 1024 classes.
    # DEPARTURE: the official configurations keep lr constant, do not clip gradients and never drop the condition.
    "gpt2-medium": """
        --n-layer 24 --n-head 16 --n-embd 1024 --dropout 0 --batch-size 32 --steps 500000 --lr 1.5e-4 --warmup 0.02
        --weight-decay 0.01 --drop-cond 0.1 --pkeep 1 --log-every 100 --val-every 5000 --save-every 2000""",
}

PANELS = [["loss", "val_nats"], ["val_bits_per_pixel"]]  # columns of metrics.csv in loss.png


def parse_flags(argv: list[str] | None = None):
    """(flags, checkpoint to resume from or None). Raises UserError."""
    p = flags.Parser(description=__doc__)
    t = flags.add_run_flags(p, PRESETS, out="runs/gpt")
    t.add_argument("--lr", type=flags.rate, help="highest learning rate of AdamW (betas 0.9, 0.95)")
    t.add_argument("--weight-decay", type=flags.weight, help="on matrices only")
    t.add_argument("--pkeep", type=flags.fraction, help="fraction of input codes kept; the rest become random")

    g, inherited = p.add_argument_group("data and condition"), "(the first-stage model's)"
    g.add_argument("--vqgan", default="runs/vqgan/last.pt", help="checkpoint of train_vqgan.py: the first-stage model")
    g.add_argument("--official-config", metavar="YAML", help="--vqgan is a checkpoint of the paper's authors; its yaml")
    g.add_argument("--data", help=f"as in train_vqgan.py {inherited}")
    g.add_argument("--image-size", type=flags.size, help=f"side of the images or crops {inherited}")
    g.add_argument("--resize", type=flags.size, help=f"scale the shorter side to this, then crop {inherited}")
    g.add_argument("--flip", action=BooleanOptionalAction, help=f"train on mirrored images too {inherited}")
    g.add_argument("--cond", default="class", choices=["none", "class", "coords", "spatial"], help="what c is")
    g.add_argument("--cond-vqgan", help="checkpoint of the first-stage model of c, for --cond spatial")
    g.add_argument("--coord-levels", type=flags.size, default=1024, help="steps that coordinates are rounded to")
    g.add_argument("--drop-cond", type=flags.fraction, help="fraction of the sequences read without c, for guidance")

    g = p.add_argument_group("transformer")
    flags.add_fields(g, GPTConfig)
    flags.add_fields(g, TwoStageConfig)
    return flags.parse(p, PRESETS, "two_stage", argv)


def learning_rate(args, step: int) -> float:
    """Linear warm-up, then a half cosine down to a tenth."""
    warm = max(1, round(args.warmup * args.steps))
    if step < warm:
        return args.lr * step / warm
    progress = (step - warm) / max(1, args.steps - warm)
    return args.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def open_first_stage(args) -> VQGAN:
    """The first-stage model; --data, --image-size, --resize and --flip that were not given become those it was trained
    with. Raises UserError."""
    if args.official_config:
        if not args.data:
            raise UserError("--official-config needs --data: images such as that model was trained on")
        model, trained_with = official.load(args.vqgan, args.official_config), {}
        vqgan = getattr(model, "vqgan", model)
    else:
        vqgan, trained_with = checkpoint.load_vqgan(args.vqgan), checkpoint.trained_with(args.vqgan)
    args.data = args.data or trained_with.get("data", "shapes")
    args.image_size = args.image_size or vqgan.config.image_size
    args.resize = args.resize or trained_with.get("resize")
    args.flip = trained_with.get("flip", True) if args.flip is None else args.flip
    flags.check_image_size(args.image_size, vqgan.config.f)
    return vqgan


def make_condition(args, vqgan: VQGAN):
    """The condition, or None for classes, whose number only the data knows. Raises UserError."""
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
        raise UserError(f"{args.cond_vqgan} has f = {other.config.f}, the first-stage model {vqgan.config.f}")
    return SpatialCondition(other)


def build(args, vqgan: VQGAN, condition, classes: tuple[str, ...]) -> TwoStage:
    """Both stages, the transformer untrained. Raises UserError for data without classes."""
    if condition is None and len(classes) < 2:
        raise UserError(f"{args.data} has fewer than two classes (subfolders with images); train with --cond none")
    condition = condition or ClassCondition(len(classes))
    n, guided = args.image_size // vqgan.config.f, args.drop_cond > 0 and args.cond != "none"
    sizes = {"num_codes": vqgan.config.codebook_size, "num_cond": condition.num_tokens + guided}
    with runtime.seeded(args.seed, "gpt"):
        gpt = GPT(flags.config(GPTConfig, args, **sizes, block_size=sequence_length(condition, n)))
    return TwoStage(vqgan, condition, gpt, flags.config(TwoStageConfig, args, n=n, guided=guided, classes=classes))


def open_all(args, run: Run, saved):
    """(model, training set, held-out set), new or as in the checkpoint `saved`. Raises UserError."""
    if saved:
        model = checkpoint.unpack_two_stage(saved, run.out / "last.pt")
        vqgan, condition = model.vqgan, model.condition
    else:
        vqgan = open_first_stage(args)
        condition = make_condition(args, vqgan)
    data.check_outside(args.out, args.data)
    sources, num_labels = tokens.sources_of(vqgan, condition)
    sets = data.open_data(args.data, args.image_size, args.resize, sources, num_labels, args.seed, args.flip)
    classes = tuple(sets[0].classes)
    if not saved:
        model = build(args, vqgan, condition, classes)
        if args.init:
            run.say(checkpoint.init_from(args.init, model))
    elif condition.kind == "class":
        data.check_classes(args.data, classes, model.config.classes, condition.num_tokens)
    return model.to(run.device, memory_format=torch.channels_last), *sets  # this layout halves E's time on a CPU


@runtime.global_state_restored()
def main(argv: list[str] | None = None) -> int:
    args, saved = parse_flags(argv)
    run = Run(args, "two_stage", PANELS, ["loss"], saved)
    model, train_set, val_set = open_all(args, run, saved)
    gpt, fused = model.gpt, run.device.type in ("cpu", "cuda")
    opt = torch.optim.AdamW(parameter_groups(gpt, args.weight_decay), args.lr, betas=(0.9, 0.95), fused=fused)
    if args.compile:
        gpt.compile()

    to_c = tokens.condition_input(model)
    val_tokens = tokens.held_out(model, val_set, to_c, args.val_images, run.device)
    batches = tokens.batches(run, model, train_set, to_c)
    run.start({"opt": opt}, lambda: checkpoint.pack_two_stage(model), describe(model, train_set, val_tokens))
    del saved  # a second copy of the weights
    parallel = processes.distributed(model, run.device)
    drop_cond = args.drop_cond if model.config.guided else 0.0

    @run.cuda_graph(gpt)
    def gradients(s, r):
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.amp):
            loss = parallel(s, r, args.pkeep, drop_cond).mean()  # -log p(s | r), Eq. 9 and 10
        (loss / args.accumulate).backward()
        return loss

    model.train()
    for step in run.steps():
        lr = learning_rate(args, step)
        for group in opt.param_groups:
            group["lr"] = lr
        for s, r in run.micro_batches(batches, parallel):  # (B, T) codes, (B, R) condition tokens
            run.add({"loss": gradients(s, r)})
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        opt.step()
        opt.zero_grad()

        if run.is_log_step:
            run.note(lr=lr)
        if run.is_val_step:
            validate(run, model, val_set, val_tokens, to_c)
    if run.rank == 0 and run.is_last_step:
        finish(run)
    return run.exit_code


def describe(model: TwoStage, train_set, val_tokens) -> str:
    K, parameters = model.gpt.config.num_codes, sum(p.numel() for p in model.gpt.parameters()) / 1e6
    return (
        f"{len(train_set)} training images, {len(val_tokens[0])} held-out; {parameters:.1f} M parameters; sequences of "
        f"{len(model.order)} codes after {condition_length(model.condition, model.config.n)} of the condition; a "
        f"uniform guess costs ln K = {math.log(K):.3f} nats per code"
    )


def finish(run: Run) -> None:
    """Say where the results are, and the next command."""
    print(f"done in {run.seconds / 60:.1f} minutes: {run.best:.4f} held-out nats per code, at step {run.best_step}")
    image = " --cond-image IMAGE" if run.args.cond == "spatial" else ""
    print(f"next: python sample.py --gpt {shlex.quote(str(run.out / 'best.pt'))}{image}")


def validate(run: Run, model: TwoStage, val_set, val_tokens, to_c) -> None:
    """Held-out nats, best.pt, and grids of samples."""
    nats = tokens.mean_nats(model, val_tokens, run.micro_batch)
    bits = nats * len(model.order) / math.log(2) / run.args.image_size**2
    run.save_best({"nats": nats, "bits_per_pixel": bits}, score=nats)
    if nats > run.best + 0.02:
        run.say(
            f"held-out loss has risen since step {run.best_step}: the model overfits. best.pt is from there; "
            "more data, --dropout, --pkeep 0.9 or a smaller model help"
        )
    model.eval()
    save_samples(run, model, val_set, to_c)
    model.train()


@torch.no_grad()
def save_samples(run: Run, model: TwoStage, val_set, to_c) -> None:
    """Samples; held-out images with their lower halves completed; c | sample | truth where c is an image."""
    kind, cond = model.vqgan.config.input_kind, model.condition.kind
    batch = {k: v.to(run.device) for k, v in next(data.held_out_batches(val_set, 8, 8)).items()}
    x, c = data.to_input(batch, kind, model.vqgan.config.in_channels), to_c(batch)
    truth = pictures.to_rgb(x, kind).cpu()
    if cond == "spatial":
        shown = pictures.to_rgb(c, model.condition.vqgan.config.input_kind).cpu()
        run.save_images([shown, pictures.to_rgb(model.sample(c), kind).cpu(), truth], "samples")
    else:
        n = 8 * 3  # every class in turn, not those that happen to be held out
        classes = (torch.arange(n, device=run.device) % max(1, len(model.config.classes))).sort().values
        samples = model.sample(classes if cond == "class" else torch.cat([c] * 3))
        run.save_images(list(pictures.to_rgb(samples, kind).cpu().chunk(3)), "samples")
    if model.config.order == "row":
        completed = model.complete(x, 0.5, to_c(batch))
        run.save_images([truth, pictures.to_rgb(completed, kind).cpu()], "completions")


if __name__ == "__main__":
    runtime.run(main)
