"""New images from a trained transformer: sampled, completed, conditioned, of any size (Sec. 3.2 of arXiv:2012.09841).

python sample.py                                         16 images of each class
python sample.py --classes star,ring -n 4 --guidance 3
python sample.py --complete photo.jpg --keep 0.5         the upper half is kept
python sample.py --gpt G.pt --cond-image labels.png      a label map turned into an image, at the map's own size
python sample.py --gpt G.pt --size 256x512               larger than the images it was trained on
torchrun --nproc_per_node=4 sample.py -n 1000 --out many the same images, made by four processes
"""

import math
import os
import re
import tempfile
import time
from argparse import ArgumentTypeError
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minvqgan.harness import data, flags, imagefiles, judges, official, pictures, processes, runtime
from minvqgan.harness.runtime import UserError
from minvqgan.sampler import reject
from minvqgan.two_stage import TwoStage


def size(text: str) -> tuple[int, int]:
    if not re.fullmatch("[1-9][0-9]{0,6}[xX][1-9][0-9]{0,6}", text):
        raise ArgumentTypeError(f"{text[:40]!r} is not a size like 256x512 (height x width)")
    height, width = text.lower().split("x")
    return int(height), int(width)


def parse_flags(argv: list[str] | None):
    p = flags.Parser(description=__doc__)
    g = p.add_argument_group("what")
    g.add_argument("--gpt", default="runs/gpt/best.pt", help="checkpoint of train_gpt.py")
    g.add_argument("-n", type=flags.positive, default=16, help="images, for each class or for the given image")
    g.add_argument("--classes", help="names or numbers, separated by commas (all)")
    g.add_argument("--complete", metavar="IMAGE", help="keep the first rows of this image and sample the rest")
    g.add_argument("--keep", type=flags.fraction, default=0.5, help="fraction of the rows that --complete keeps")
    g.add_argument("--cond-image", metavar="IMAGE", help="the condition, for a model with --cond spatial")
    g.add_argument("--size", type=size, metavar="HxW", help="in pixels; above the training size a window slides")
    g.add_argument("--stride", type=flags.positive, default=1, help="columns it moves by; 4: about 3 times as fast")
    rate = flags.Number(float, most=1, above=0)
    g.add_argument("--reject", type=rate, metavar="RATE", help="keep this fraction, the best by --classifier")
    g.add_argument("--out", type=flags.filled, default="samples.png", help="a PNG for one grid, or a folder for files")
    g.add_argument("--steps-gif", metavar="FILE", help="a GIF of the images as their codes arrive")
    flags.add_sampling_flags(p, batch_size=64)
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    device = runtime.pick_device(args.device)
    rank, world = processes.start(device)
    model, classifier = open_models(args, device)
    plan = make_plan(args, model)
    check_outputs(args)

    per_row, (h, w) = math.ceil(args.n / (args.reject or 1)), plan.size
    numbers = torch.arange(len(plan.c) * per_row)  # of the images: with --seed they decide what is drawn
    if len(numbers) < world:
        raise UserError(f"{len(numbers)} images are fewer than the {world} processes")
    if rank == 0:
        what = f"{len(numbers)} images of {h * model.vqgan.config.f} x {w * model.vqgan.config.f}"
        print(f"{what} on {device} in {str(model.gpt.head.weight.dtype).removeprefix('torch.')}")
    codes, began, images = len(numbers) * (h * w - plan.keep), time.time(), []
    with runtime.progress_bar(rank, total=codes // world, unit="code", unit_scale=True) as bar:
        sampling = replace(flags.sampling(args), stride=args.stride, on_token=bar.update)
        for some in numbers[rank::world].split(args.batch_size):  # dealt out over the processes
            c = plan.c[some // per_row] if len(plan.c) > 1 else plan.c.expand(len(some), *plan.c.shape[1:])
            given = None if plan.given is None else plan.given.expand(len(some), h, w)
            try:
                indices = model.sample_indices(c, args.seed, some.tolist(), (h, w), sampling, given, plan.keep)
            except ValueError as error:  # a --stride, --size or --guidance that this model does not have
                raise UserError(str(error)) from None
            images += [model.vqgan.decode_indices(part).cpu() for part in indices.split(16)]
    images = processes.gathered(torch.cat(images))
    if rank > 0:
        return 0
    rows = images.split(per_row)  # (per_row, C, H, W) each: of one class, or of the given image
    if classifier is not None:
        rows = [best(args, model, classifier, *row) for row in zip(rows, plan.c.tolist(), strict=True)]
    write(args, model, plan, rows)
    seconds = time.time() - began
    print(f"{sum(map(len, rows))} images in {seconds:.1f} s, {codes / seconds:.0f} codes/s: {args.out}")
    return 0


def open_models(args, device: torch.device) -> tuple[TwoStage, judges.Classifier | None]:
    """The model, and the classifier that rejects. Raises UserError."""
    model = official.load(args.gpt, args.official_config).to(device)
    if not isinstance(model, TwoStage):
        raise UserError(f"{args.gpt} holds a VQGAN, not a transformer; train one: train_gpt.py --vqgan {args.gpt}")
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(runtime.fastest_threads())
    if runtime.pick_amp(args.amp, device, model.gpt.config.n_embd):
        model.gpt.bfloat16()
    if args.reject is None:
        return model, None
    if model.condition.kind != "class" or not args.classifier:
        raise UserError("--reject needs a class-conditional model and --classifier")
    classifier = judges.load_classifier(args.classifier).to(device)
    judges.match_classes(classifier.classes, class_names(model))  # raises UserError for one that it does not know
    return model, classifier


@dataclass
class Plan:
    """What the images have in common, and what each row of the grid is conditioned on."""

    size: tuple[int, int]  # (h, w) of the codes
    c: Tensor  # (rows of the grid, ...), the condition of each
    x: Tensor | None = None  # (1, C, H, W), the image to complete
    given: Tensor | None = None  # its codes (1, h, w)
    keep: int = 0  # of these codes, in reading order


def make_plan(args, model: TwoStage) -> Plan:
    """What the flags ask for. Raises UserError for what this model cannot do."""
    kind, config = model.condition.kind, model.vqgan.config
    if args.classes and kind != "class":
        raise UserError(f"--classes: this model is conditioned on {kind}")
    if args.cond_image and kind != "spatial":
        raise UserError(f"--cond-image: this model is conditioned on {kind}, not on an image")
    if kind == "spatial" and not args.cond_image:
        raise UserError("this model turns one image into another: give it one by --cond-image")
    if args.complete and model.config.order != "row":
        raise UserError(f"--complete keeps rows, but this model reads in {model.config.order} order")
    side = model.config.n * config.f  # of the images it was trained on
    height, width = args.size or (side, side)
    if kind == "spatial":
        other = model.condition.vqgan.config
        c = data.open_image(args.cond_image, other.input_kind, other.in_channels)
        if not args.size and model.config.order == "row":  # the only order in which a window slides
            height, width = (max(side, length // config.f * config.f) for length in c.shape[2:])
    check_size(height, width, model)
    if kind == "spatial":
        c = cover(c, height, width, shrink=False)
    elif kind == "class":
        c = torch.tensor(chosen_classes(args.classes, class_names(model)))
    else:
        c = model.default_condition(1, (height // config.f, width // config.f))
    plan = Plan((height // config.f, width // config.f), c.to(model.order.device))
    if args.complete:
        x = data.open_image(args.complete, config.input_kind, config.in_channels)
        plan.x = cover(x, height, width, shrink=True)
        plan.given = model.vqgan.encode_indices(plan.x.to(model.order.device))
        plan.keep = round(args.keep * plan.size[0]) * plan.size[1]
    return plan


def check_outputs(args) -> None:
    """Raises UserError for an output that would replace an input, or that could not be written after the sampling."""
    out, is_grid = Path(args.out), Path(args.out).suffix.lower() == ".png"
    if not is_grid and out.suffix.lower() in imagefiles.EXTENSIONS:
        raise UserError(f"--out {args.out}: name a .png for one grid, or a folder for single files")
    if args.steps_gif and Path(args.steps_gif).suffix.lower() != ".gif":
        raise UserError(f"--steps-gif {args.steps_gif}: the name must end in .gif")
    files = [out if is_grid else out / "0000.png", *([Path(args.steps_gif)] if args.steps_gif else [])]
    given = {name: getattr(args, name) for name in ("gpt", "official_config", "classifier", "complete", "cond_image")}
    runtime.check_outputs([*files, *(out.iterdir() if out.is_dir() else [])], **given)
    for file in files:
        if file.is_dir():
            raise UserError(f"{file} is a folder")
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()


def chosen_classes(text: str | None, names: tuple[str, ...]) -> list[int]:
    """Numbers of the classes named in `text`. Raises UserError for an unknown one."""
    if text is None:
        if len(names) > 100:
            raise UserError(f"this model has {len(names)} classes; choose some, such as --classes 1,7,22")
        return list(range(len(names)))
    number_of = {str(number): number for number in range(len(names))} | {name: i for i, name in enumerate(names)}
    try:
        return list(dict.fromkeys(number_of[word.strip()] for word in text.split(",")))  # each once
    except KeyError as word:
        known = f"{', '.join(names[:20])} (0 to {len(names) - 1})"
        raise UserError(f"--classes: there is no {word}; there are {known}") from None


def check_size(height: int, width: int, model: TwoStage) -> None:
    """Raises UserError for images that the model cannot draw."""
    f, smallest, name = model.vqgan.config.f, model.config.n * model.vqgan.config.f, f"--size {height}x{width}"
    if min(height, width) < smallest or height % f or width % f:
        fits = "x".join(str(max(smallest, round(side / f) * f)) for side in (height, width))
        raise UserError(f"{name}: both sides must be multiples of f = {f}, and at least {smallest}; {fits} works")
    if height > smallest and not model.condition.is_map:
        print(f"{name}: this model does not know where in an image it is; expect its upper part repeated downwards")


def cover(x: Tensor, height: int, width: int, shrink: bool) -> Tensor:
    """x (1, C, h, w) scaled until it just covers height x width if it is smaller, or also if it is larger (`shrink`),
    then centre-cropped."""
    scale = max(height / x.shape[2], width / x.shape[3])
    if scale > 1 or (scale < 1 and shrink):
        new = max(height, round(x.shape[2] * scale)), max(width, round(x.shape[3] * scale))
        smooth = {"mode": "bilinear", "antialias": True} if scale < 1 else {"mode": "nearest"}
        x = F.interpolate(x, size=new, **smooth)
    top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
    return x[:, :, top : top + height, left : left + width]


def class_names(model: TwoStage) -> tuple[str, ...]:
    """Names by number; numbers if the model has no names."""
    return model.config.classes or tuple(map(str, range(model.condition.num_tokens)))


def file_names(classes: tuple[str, ...]) -> list[str]:
    """Class names as file names. They come from the checkpoint, so one such as `../../x` must not leave the folder: if
    not all are plain and different, they are cleaned and get their numbers in front."""
    safe = [re.sub(r"[^\w -]", "_", name)[:40] for name in classes]
    if all(safe) and safe == list(classes) and len(set(map(str.casefold, safe))) == len(safe):
        return safe
    return [f"{i}_{name}" for i, name in enumerate(safe)]


@torch.no_grad()
def best(args, model: TwoStage, classifier: judges.Classifier, images: Tensor, number: int) -> Tensor:
    """The -n images that the classifier takes most surely for the model's class `number`."""
    column = classifier.classes.index(class_names(model)[number])
    parts = pictures.to_rgb(images, model.vqgan.config.input_kind).split(64)
    scores = torch.cat([classifier(part.to(model.order.device)).softmax(1)[:, column].cpu() for part in parts])
    return images[reject(scores, args.reject)[: args.n]]


def write(args, model: TwoStage, plan: Plan, rows: list[Tensor]) -> None:
    """The grid or the single files, and the animation."""
    kind = model.vqgan.config.input_kind
    shown = [pictures.to_rgb(images, kind) for images in rows]
    if args.steps_gif:
        save_steps(Path(args.steps_gif), model, plan, shown)
    if Path(args.out).suffix.lower() != ".png":
        names = file_names(class_names(model))
        prefixes = [f"{names[i]}_" for i in plan.c.tolist()] if model.condition.kind == "class" else [""]
        for prefix, images in zip(prefixes, shown, strict=True):
            for i, image in enumerate(images):
                pictures.save(pictures.to_image(image), Path(args.out) / f"{prefix}{i:04d}.png")
        return
    if len(shown) == 1:  # one class or none: as square as possible
        shown = list(shown[0].split(math.ceil(len(shown[0]) ** 0.5)))
    if model.condition.kind == "spatial":
        shown.insert(0, pictures.to_rgb(plan.c, model.condition.vqgan.config.input_kind))
    if plan.x is not None:
        shown.insert(0, pictures.to_rgb(plan.x, kind))
    pictures.save_grid(Path(args.out), shown)


def save_steps(path: Path, model: TwoStage, plan: Plan, rows: list[Tensor]) -> None:
    """The finished images uncovered code by code, in the order in which the codes were sampled."""
    (h, w), f = plan.size, model.vqgan.config.f
    turns = model.order.cpu().argsort() if h * w == len(model.order) else torch.arange(h * w)
    turns = turns.view(h, w).repeat_interleave(f, 0).repeat_interleave(f, 1)  # (H, W), when each pixel's code came
    frames = []
    for step in range(33):
        is_drawn = turns < h * w * step // 32
        frames.append(pictures.grid([torch.where(is_drawn, row[:16], torch.tensor(0.0)) for row in rows]))
    with runtime.written_whole(path) as file:
        more = {"append_images": frames[1:] + frames[-1:] * 12, "duration": 120, "loop": 0}  # a pause at the end
        frames[0].save(file, "GIF", save_all=True, **more)


if __name__ == "__main__":
    runtime.run(main)
