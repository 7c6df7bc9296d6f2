"""New images from a trained transformer: sampled, completed, conditioned, of any size (Sec. 3.2 of arXiv:2012.09841).

python sample.py                                         16 images of each class
python sample.py --classes star,ring -n 4 --guidance 3
python sample.py --complete photo.jpg --keep 0.5         the upper half is kept
python sample.py --gpt G.pt --cond-image labels.png      a label map turned into an image, at the map's own size
python sample.py --gpt G.pt --size 256x512               larger than the images it was trained on
torchrun --nproc_per_node=4 sample.py -n 1000 --out many the same images, made by four processes
"""

import math
import re
import time
from argparse import ArgumentTypeError
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from minvqgan import sampler
from minvqgan.harness import data, flags, imagefiles, judges, official, pictures, processes, runtime
from minvqgan.harness.runtime import UserError
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
    g.add_argument("--out", default="samples.png", help="a PNG for one grid, or a folder for single files")
    g.add_argument("--steps-gif", metavar="FILE", help="an animation of the images as their codes arrive")
    flags.add_sampling_flags(p, batch_size=64)
    return p.parse_args(argv)


def chosen_classes(text: str | None, names: tuple[str, ...]) -> list[int]:
    """Numbers of the classes named in `text`. Raises UserError for an unknown one."""
    if text is None:
        if len(names) > 100:
            raise UserError(f"this model has {len(names)} classes; choose some, such as --classes 1,7,22")
        return list(range(len(names)))
    number_of = {str(number): number for number in range(len(names))} | {name: i for i, name in enumerate(names)}
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in number_of:
            known = f"{', '.join(names[:20])} (0 to {len(names) - 1})"
            raise UserError(f"--classes: there is no {word[:40]!r}; there are {known}")
    if len({number_of[word] for word in words}) < len(words):
        raise UserError(f"--classes {text[:80]} names a class twice")
    return [number_of[word] for word in words]


def pixel_size(wanted: tuple[int, int] | None, default: tuple[int, int], model: TwoStage) -> tuple[int, int]:
    """(H, W) of the images: divisible by f, and not below the training size. Raises UserError."""
    f = model.vqgan.config.f
    smallest = model.config.n * f
    if wanted is None:
        slides = model.config.order == "row"
        return tuple(max(smallest, side // f * f) if slides else smallest for side in default)
    name = f"--size {wanted[0]}x{wanted[1]}"
    if any(side % f for side in wanted):
        fits = "x".join(str(max(smallest, round(side / f) * f)) for side in wanted)
        raise UserError(f"{name}: both sides must be divisible by f = {f}; {fits} works")
    if min(wanted) < smallest:
        raise UserError(f"{name} is below the {smallest}x{smallest} the model was trained on")
    if wanted[0] > smallest and not model.condition.is_map:
        print(f"{name}: this model does not know where in an image it is; expect its upper part repeated downwards")
    return wanted


def cover(x: torch.Tensor, height: int, width: int, shrink: bool) -> torch.Tensor:
    """x (1, C, h, w) scaled until it just covers height x width if it is smaller, or also if it is larger (`shrink`),
    then centre-cropped."""
    scale = max(height / x.shape[2], width / x.shape[3])
    if scale > 1 or (scale < 1 and shrink):
        new = max(height, round(x.shape[2] * scale)), max(width, round(x.shape[3] * scale))
        smooth = {"mode": "bilinear", "antialias": True} if scale < 1 else {"mode": "nearest"}
        x = F.interpolate(x, size=new, **smooth)
    top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
    return x[:, :, top : top + height, left : left + width]


@dataclass
class Start:
    """What the images start from."""

    height: int
    width: int
    classes: list[int | None]  # one row of the grid each; [None] for a model without classes
    c: torch.Tensor | None = None  # (1, ...), the condition of a model without classes
    x: torch.Tensor | None = None  # (1, C, H, W), the image to complete
    keep: int = 0  # codes of x that stay, in reading order


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


def prepare(args, model: TwoStage) -> Start:
    """All that can be wrong with the flags, found before anything is sampled. Raises UserError."""
    outputs = [Path(path) for path in (args.out, args.steps_gif) if path]
    given = {name: getattr(args, name) for name in ("gpt", "official_config", "classifier", "complete", "cond_image")}
    runtime.check_outputs([*outputs, *(outputs[0].iterdir() if outputs[0].is_dir() else [])], **given)
    suffix = Path(args.out).suffix.lower()
    if suffix in imagefiles.EXTENSIONS - {".png"}:
        raise UserError(f"--out {args.out}: name a .png for one grid, or a folder for single files")
    if args.steps_gif and Path(args.steps_gif).suffix.lower() != ".gif":
        raise UserError(f"--steps-gif {args.steps_gif}: the name must end in .gif")
    kind, side = model.condition.kind, model.config.n * model.vqgan.config.f
    if args.classes and kind != "class":
        raise UserError(f"--classes: this model is conditioned on {kind}")
    if args.cond_image and kind != "spatial":
        raise UserError(f"--cond-image: this model is conditioned on {kind}, not on an image")
    if kind == "spatial" and not args.cond_image:
        raise UserError("this model turns one image into another: give it one by --cond-image")
    if args.reject is not None and not (kind == "class" and args.classifier):
        raise UserError("--reject needs a class-conditional model and --classifier")
    if args.complete and model.config.order != "row":
        raise UserError(f"--complete keeps rows, but this model reads in {model.config.order} order")
    classes = chosen_classes(args.classes, class_names(model)) if kind == "class" else [None]
    config, default = model.vqgan.config, (side, side)
    if kind == "spatial":
        c_config = model.condition.vqgan.config
        c = data.open_image(args.cond_image, c_config.input_kind, c_config.in_channels)
        default = tuple(c.shape[2:])
    start = Start(*pixel_size(args.size, default, model), classes)
    if kind == "spatial":
        start.c = cover(c, start.height, start.width, shrink=False)
    elif kind != "class":
        start.c = model.default_condition(1, (start.height // config.f, start.width // config.f))
    if args.complete:
        x = data.open_image(args.complete, config.input_kind, config.in_channels)
        start.x = cover(x, start.height, start.width, shrink=True)
        start.keep = round(args.keep * start.height / config.f) * (start.width // config.f)
    folder = Path(args.out).parent if suffix == ".png" else Path(args.out)
    for path in (folder, Path(args.steps_gif or "x").parent):  # what cannot be made is found out before the sampling
        path.mkdir(parents=True, exist_ok=True)
    return start


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    device = runtime.pick_device(args.device)
    rank, world = processes.start(device)
    model = official.load(args.gpt, args.official_config)
    if not isinstance(model, TwoStage):
        raise UserError(f"{args.gpt} holds a VQGAN, not a transformer; train one: train_gpt.py --vqgan {args.gpt}")
    start = prepare(args, model.to(device))
    amp = runtime.pick_amp(args.amp, device, model.gpt.config.n_embd)
    if amp:
        model.gpt.bfloat16()
    classifier, number_of, per_row = None, [], args.n
    if args.reject is not None:
        classifier = judges.load_classifier(args.classifier).to(device)
        number_of = judges.match_classes(classifier.classes, class_names(model))
        per_row = math.ceil(args.n / args.reject)
    if rank == 0:
        print(f"{args.gpt} on {device} in {'bfloat16' if amp else 'float32'}")

    h, w = start.height // model.vqgan.config.f, start.width // model.vqgan.config.f
    with torch.autocast(device.type, torch.bfloat16, enabled=amp and device.type == "cuda"):
        given = None if start.x is None else model.vqgan.encode_indices(start.x.to(device))  # (1, h, w)
    codes, began, rows = len(start.classes) * per_row * (h * w - start.keep), time.time(), []
    bar = runtime.progress_bar(rank, total=codes // world, unit="code", unit_scale=True)
    sampling = replace(flags.sampling(args), stride=args.stride, on_token=bar.update)
    for row, number in enumerate(start.classes):
        images = []  # those done, on the CPU
        mine = range(row * per_row + rank, (row + 1) * per_row, world)  # dealt out over the processes
        for numbers in (mine[i : i + args.batch_size] for i in range(0, len(mine), args.batch_size)):
            if start.c is None:
                c = torch.full((len(numbers),), number, device=device)
            else:
                c = start.c.to(device).expand(len(numbers), *start.c.shape[1:])
            copies = None if given is None else given.expand(len(numbers), -1, -1)
            try:
                indices = model.sample_indices(c, args.seed, numbers, (h, w), sampling, copies, start.keep)
            except ValueError as error:  # a --stride, --size or --guidance that this model does not have
                raise UserError(str(error)) from None
            images += [model.vqgan.decode_indices(part).cpu() for part in indices.split(16)]
        images = torch.cat([torch.empty(0, model.vqgan.config.in_channels, start.height, start.width), *images])
        if classifier is not None:
            shown = pictures.to_rgb(images, model.vqgan.config.input_kind)
            with torch.no_grad():
                scores = [classifier(x.to(device)).softmax(1)[:, number_of[number]].cpu() for x in shown.split(64)]
            scores = processes.gathered(torch.cat(scores))
        images = processes.gathered(images)  # (per_row, C, H, W)
        if rank == 0:
            rows.append(images if classifier is None else images[sampler.reject(scores, args.reject)[: args.n]])
    bar.close()
    if rank > 0:
        return 0
    write(args, model, rows, start)
    seconds = time.time() - began
    size = f"{sum(map(len, rows))} images of {start.height} x {start.width}"
    print(f"{size} in {seconds:.1f} s, {codes / seconds:.0f} codes/s: {args.out}")
    return 0


def write(args, model: TwoStage, rows: list[torch.Tensor], start: Start) -> None:
    """The grid or the single files, and the animation."""
    kind = model.vqgan.config.input_kind
    shown = [pictures.to_rgb(images, kind) for images in rows]
    if args.steps_gif:
        save_steps(Path(args.steps_gif), model, shown)
    if Path(args.out).suffix.lower() != ".png":
        names = file_names(class_names(model))
        for number, images in zip(start.classes, shown, strict=True):
            for i, image in enumerate(images):
                name = f"{i:04d}.png" if number is None else f"{names[number]}_{i:04d}.png"
                pictures.save(pictures.to_image(image), Path(args.out) / name)
        return
    if len(shown) == 1:  # one class or none: as square as possible
        shown = list(shown[0].split(math.ceil(len(shown[0]) ** 0.5)))
    if model.condition.kind == "spatial":
        shown.insert(0, pictures.to_rgb(start.c, model.condition.vqgan.config.input_kind))
    if start.x is not None:
        shown.insert(0, pictures.to_rgb(start.x, kind))
    pictures.save_grid(Path(args.out), shown)


def save_steps(path: Path, model: TwoStage, rows: list[torch.Tensor], frames: int = 32) -> None:
    """The finished images uncovered code by code, in the order in which the codes were sampled."""
    f = model.vqgan.config.f
    h, w = rows[0].shape[2] // f, rows[0].shape[3] // f
    rank = torch.arange(h * w).view(h, w)
    if (h, w) == (model.config.n, model.config.n):
        rank = model.order.cpu().argsort().view(h, w)  # when each position's turn comes
    when = rank.repeat_interleave(f, 0).repeat_interleave(f, 1)  # (H, W)
    steps = [h * w * t // frames for t in range(frames + 1)]
    images = [pictures.grid([torch.where(when < t, row[:16], torch.tensor(0.0)) for row in rows]) for t in steps]
    how = {"save_all": True, "append_images": images[1:] + [images[-1]] * 12, "duration": 120, "loop": 0}
    with runtime.written_whole(path) as file:
        images[0].save(file, "GIF", **how)


if __name__ == "__main__":
    runtime.run(main)
