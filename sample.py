"""New images from a trained transformer: sampled, completed, conditioned, of any size (Sec. 3.2 and 3.3 of
arXiv:2012.09841).

    python sample.py                                         16 images of each class
    python sample.py --classes star,ring -n 4 --guidance 3
    python sample.py --complete photo.jpg --keep 0.5         the upper half is kept
    python sample.py --gpt G.pt --cond-image labels.png      a label map turned into an image, at the map's own size
    python sample.py --gpt G.pt --size 256x512               larger than the model has ever seen
    torchrun --nproc_per_node=4 sample.py -n 1000 --out many the images that one process makes, sooner
"""

import math
import os
import re
import sys
import time
from argparse import ArgumentTypeError
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from minvqgan import sampler
from minvqgan.harness import data, flags, imagefiles, official, pictures, processes, runtime
from minvqgan.harness.judges import load_classifier, match_classes
from minvqgan.harness.runtime import UserError
from minvqgan.two_stage import TwoStage


def size(text: str) -> tuple[int, int]:
    if not re.fullmatch("[1-9][0-9]{0,6}[xX][1-9][0-9]{0,6}", text):
        raise ArgumentTypeError(f"{text[:40]!r} is not a size like 256x512 (height x width)")
    height, width = text.lower().split("x")
    return int(height), int(width)


def parse_flags():
    p = flags.Parser(description=__doc__)
    g = p.add_argument_group("what")
    g.add_argument("--gpt", default="runs/gpt/best.pt", help="checkpoint of train_gpt.py")
    g.add_argument("--official-config", metavar="YAML", help="--gpt is a checkpoint of the paper's authors; its yaml")
    g.add_argument("-n", type=flags.positive, default=16, help="images, of each class or for each given image")
    g.add_argument("--classes", help="names or numbers, separated by commas (all)")
    g.add_argument("--complete", metavar="IMAGE", help="an image whose first rows are kept and the rest imagined")
    g.add_argument("--keep", type=flags.fraction, default=0.5, help="fraction of the rows that --complete keeps")
    g.add_argument("--cond-image", metavar="IMAGE", help="what a spatially conditioned model starts from")
    g.add_argument("--size", type=size, metavar="HxW", help="in pixels; beyond the training size a window slides")
    g.add_argument("--stride", type=flags.positive, default=1, help="columns it moves by; 4: about 3 times as fast")

    flags.add_sampling_flags(p)
    g = p.add_argument_group("how")
    g.add_argument(
        "--reject",
        type=flags.Number(float, most=1, above=0),
        metavar="RATE",
        help="keep this fraction: the images that a classifier is surest of",
    )
    g.add_argument(
        "--classifier", metavar="FILE", help="for --reject: of minvqgan.harness.judges, or a torchvision name"
    )
    g.add_argument("--seed", type=flags.seed, default=0, help="image i of a seed is the same in any batch")
    g.add_argument("--batch-size", type=flags.positive, default=64, help="images at a time")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")

    g = p.add_argument_group("where")
    g.add_argument("--out", default="samples.png", help="a PNG for one grid, or a folder for single files")
    g.add_argument("--steps-gif", metavar="FILE", help="an animation of the images as their codes arrive")
    return p.parse_args()


def chosen_classes(text: str | None, names: tuple[str, ...]) -> list[int]:
    """Numbers of the classes named in `text`. Raises UserError for one that there is not."""
    if text is None:
        if len(names) > 100:
            raise UserError(f"this model knows {len(names)} classes; choose some, such as --classes 1,7,22")
        return list(range(len(names)))
    numbers = []
    for word in text.split(","):
        word = word.strip()
        if word in names:
            numbers.append(names.index(word))
        elif re.fullmatch("[0-9]{1,9}", word) and int(word) < len(names):
            numbers.append(int(word))
        else:
            raise UserError(
                f"--classes: there is no {word[:40]!r}; there are {', '.join(names[:20])} (0 to {len(names) - 1})"
            )
    if len(set(numbers)) < len(numbers):
        raise UserError(f"--classes {text[:80]} names a class twice")
    return numbers


def pixel_size(wanted: tuple[int, int] | None, default: tuple[int, int], model: TwoStage) -> tuple[int, int]:
    """(H, W) of the images to make: divisible by f, not below the training size. Raises UserError."""
    f, smallest = model.vqgan.config.f, model.config.n * model.vqgan.config.f
    if wanted is None and model.config.order != "row":
        return smallest, smallest
    if wanted is None:
        return tuple(max(smallest, side // f * f) for side in default)
    if any(side % f for side in wanted):
        fits = "x".join(str(max(smallest, round(side / f) * f)) for side in wanted)
        raise UserError(f"--size {wanted[0]}x{wanted[1]}: both sides must be divisible by f = {f}; {fits} works")
    if min(wanted) < smallest:
        raise UserError(f"--size {wanted[0]}x{wanted[1]} is below the {smallest}x{smallest} the model was trained on")
    if wanted != (smallest, smallest) and model.config.order != "row":
        raise UserError(f"--size: a model that reads in {model.config.order} order samples {smallest}x{smallest} only")
    return wanted


def open_picture(path: str, kind: str, num_labels: int) -> torch.Tensor:
    """An image file as a VQGAN of this kind takes it, but of its own size: (1, C, H, W). Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"no image at {path}")
    source = data.SOURCE_OF[kind]
    try:
        image = imagefiles.to_tensor(imagefiles.read(path, source))
    except UserError:
        raise
    except Exception as error:  # Pillow raises a dozen kinds for broken files, and one for bombs
        raise UserError(f"{path} cannot be read as an image ({error})") from None
    if source == "labels" and (image.min() < 0 or image.max() >= num_labels):
        raise UserError(f"{path}: holds label {image.max()}, the model knows 0 to {num_labels - 1}")
    return data.to_input({source: image[None]}, kind, num_labels)


def cover(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """x (1, C, h, w) scaled until it covers height x width if it is smaller, then cut in the middle."""
    h, w = x.shape[2:]
    if h < height or w < width:
        scale = max(height / h, width / w)
        # Of a long strip only what will be seen is enlarged: all of it could take gigabytes.
        h, w = min(h, math.ceil(height / scale) + 2), min(w, math.ceil(width / scale) + 2)
        top, left = (x.shape[2] - h) // 2, (x.shape[3] - w) // 2
        x = x[:, :, top : top + h, left : left + w]
        x = F.interpolate(x, size=(max(height, round(h * scale)), max(width, round(w * scale))), mode="nearest")
    top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
    return x[:, :, top : top + height, left : left + width]


@dataclass
class Start:
    """What the images start from."""

    height: int
    width: int
    classes: list[int | None]  # one row of the grid each; [None] for a model without classes
    c: torch.Tensor | None = None  # (1, C, H, W), the condition where it is an image
    x: torch.Tensor | None = None  # (1, C, H, W), the image to complete
    keep: int = 0  # codes of x that stay, in reading order


def class_names(model: TwoStage) -> tuple[str, ...]:
    """Names by number; numbers where a model has no names."""
    return model.config.classes or tuple(map(str, range(model.condition.num_tokens)))


def file_names(classes: tuple[str, ...]) -> list[str]:
    """Class names as names of files. They come with the checkpoint, from a stranger: one such as `../../x` must not say
    where images are written, nor one of many characters or another case put one file over another."""
    known = sys.getfilesystemencoding()
    safe = [re.sub(r"[^\w -]", "_", name).encode(known, "replace").decode(known).replace("?", "_") for name in classes]
    count = Counter(name.casefold() for name in safe)

    def is_good(name: str, given: str) -> bool:
        return name == given and 0 < len(name) <= 40 and count[name.casefold()] == 1 and not re.match("[0-9]+_", name)

    pairs = zip(safe, classes, strict=True)
    return [name if is_good(name, given) else f"{i}_{name[:40]}" for i, (name, given) in enumerate(pairs)]


def check_request(model: TwoStage, start: Start, per_row: int, world: int) -> None:
    """Raises UserError for more than memory holds, or a day is enough for, before anything is sampled."""
    images, advice = len(start.classes) * per_row, "a smaller -n or --size, or a higher --reject"
    what = f"{images:,} images of {start.height} x {start.width}"
    C, ch, pixels = model.vqgan.config.in_channels, model.vqgan.config.ch, start.height * start.width
    runtime.check_memory(pixels * max(2 * images * C, 3 * ch * min(16, images)), what, advice)
    codes = images * pixels // model.vqgan.config.f**2 // world
    if codes < 10**6:
        return
    read = torch.zeros(64, 1, dtype=torch.long, device=model.order.device)
    with torch.inference_mode():
        for turn in range(4):
            if turn == 1:  # the first pass of a device loads its kernels
                began = time.time()
            model.gpt(read).argmax().item()  # `item` waits for the device
    days = codes / 64 * (time.time() - began) / 3 / 86400
    if days > 1:
        raise UserError(f"{what} take {days:,.0f} days at the least; {advice}")


def prepare(args, model: TwoStage) -> Start:
    """Everything a user can get wrong, before anything is sampled. Raises UserError."""
    outputs = [Path(path) for path in (args.out, args.steps_gif) if path]
    read = {name: getattr(args, name) for name in ("gpt", "official_config", "classifier", "complete", "cond_image")}
    runtime.check_outputs([*outputs, *(outputs[0].iterdir() if outputs[0].is_dir() else [])], **read)
    if Path(args.out).suffix.lower() in imagefiles.EXTENSIONS - {".png"}:
        raise UserError(f"--out {args.out}: name a .png for one grid, or a folder for single files")
    if args.steps_gif and Path(args.steps_gif).suffix.lower() != ".gif":
        raise UserError(f"--steps-gif {args.steps_gif}: the name must end in .gif")
    kind, side = model.condition.kind, model.config.n * model.vqgan.config.f
    if args.stride > model.config.n:
        raise UserError(f"--stride {args.stride} is more than the window's {model.config.n} columns")
    if args.guidance != 1 and model.null is None:
        raise UserError("--guidance needs a model trained with dropped conditions (train_gpt.py --drop-cond)")
    if args.classes and kind != "class":
        raise UserError(f"--classes: this model is conditioned on {kind}")
    if args.cond_image and kind != "spatial":
        raise UserError(f"--cond-image: this model is conditioned on {kind}, not on an image")
    if kind == "spatial" and not args.cond_image:
        raise UserError("this model turns one image into another: give it one by --cond-image")
    if args.complete and model.config.order != "row":
        raise UserError(f"--complete keeps rows, but this model reads in {model.config.order} order")
    classes = chosen_classes(args.classes, class_names(model)) if kind == "class" else [None]
    if kind == "spatial":
        config = model.condition.vqgan.config
        c = open_picture(args.cond_image, config.input_kind, config.in_channels)
        start = Start(*pixel_size(args.size, tuple(c.shape[2:]), model), classes)
        start.c = cover(c, start.height, start.width)
    else:
        start = Start(*pixel_size(args.size, (side, side), model), classes)
    if args.complete:
        x = open_picture(args.complete, model.vqgan.config.input_kind, model.vqgan.config.in_channels)
        scale = max(start.height / x.shape[2], start.width / x.shape[3])
        if scale < 1:
            size = max(start.height, round(x.shape[2] * scale)), max(start.width, round(x.shape[3] * scale))
            x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
        start.x = cover(x, start.height, start.width)
        f = model.vqgan.config.f
        start.keep = round(args.keep * start.height / f) * (start.width // f)
    return start


def conditions(model: TwoStage, start: Start, number: int | None, count: int, device: torch.device) -> torch.Tensor:
    """c for `count` images of a class, or of the image or size they start from."""
    if number is not None:
        return torch.full((count,), number, device=device)
    if start.c is not None:
        return start.c.to(device).expand(count, -1, -1, -1)
    f = model.vqgan.config.f
    return model.default_condition(count, (start.height // f, start.width // f))


def main() -> int:
    args = parse_flags()
    device = runtime.pick_device(args.device)
    rank, world = processes.start(device)
    model = official.open_model(args.gpt, args.official_config)
    if not isinstance(model, TwoStage):
        raise UserError(f"{args.gpt} holds a VQGAN, not a transformer; train one: train_gpt.py --vqgan {args.gpt}")
    sampling = flags.sampling(args)
    start = prepare(args, model.to(device))
    amp = runtime.pick_amp(args.amp, device, model.gpt.config.n_embd)
    if amp:
        model.gpt.bfloat16()
    if rank == 0:
        print(f"{args.gpt} on {device} in {'bfloat16' if amp else 'float32'}")
    kind = model.vqgan.config.input_kind
    classifier, number_of, per_row = None, [], args.n
    if args.reject is not None:
        if start.classes == [None] or not args.classifier:
            raise UserError("--reject needs a class-conditional model and --classifier")
        classifier = load_classifier(args.classifier).to(device)
        number_of = match_classes(classifier.classes, class_names(model))
        per_row = math.ceil(min(args.n / args.reject, flags.positive.most))
    check_request(model, start, per_row, world)
    if rank == 0:
        make_folders(args)

    h, w = start.height // model.vqgan.config.f, start.width // model.vqgan.config.f
    given = None if start.x is None else model.vqgan.encode_indices(start.x.to(device))  # (1, h, w)
    codes, began, rows = len(start.classes) * per_row * (h * w - start.keep), time.time(), []
    bar = tqdm(total=codes // world, unit="code", unit_scale=True, dynamic_ncols=True, disable=rank > 0)
    sampling = replace(sampling, stride=args.stride, on_token=bar.update)
    for row, number in enumerate(start.classes):
        images = [torch.empty(0, model.vqgan.config.in_channels, start.height, start.width)]  # those done, on the CPU
        mine = range(row * per_row + rank, (row + 1) * per_row, world)  # dealt out over the processes
        for numbers in (mine[i : i + args.batch_size] for i in range(0, len(mine), args.batch_size)):
            c = conditions(model, start, number, len(numbers), device)
            copies = None if given is None else given.expand(len(numbers), -1, -1)
            indices = model.sample_indices(c, args.seed, numbers, (h, w), sampling, copies, start.keep)
            images += [model.vqgan.decode_indices(part).cpu() for part in indices.split(16)]
        images = torch.cat(images)
        if classifier is not None:
            with torch.no_grad():
                scores = [
                    classifier(pictures.to_rgb(part, kind).to(device)).softmax(1)[:, number_of[number]]
                    for part in images.split(64)
                ]
            scores = processes.gathered(torch.cat(scores), rank, world)
        images = processes.gathered(images, rank, world)  # (per_row, C, H, W)
        if rank > 0:
            continue
        if classifier is not None:
            images = images[sampler.reject(scores, args.reject)[: args.n]]
        rows.append(images)
    bar.close()
    if rank > 0:
        return 0
    write(args, model, rows, start)
    seconds, count = time.time() - began, sum(map(len, rows))
    pace = f"{seconds:.1f} s, {codes / seconds:.0f} codes/s"
    print(f"{count} images of {start.height} x {start.width} in {pace}: {args.out}")
    return 0


def is_folder(out: Path) -> bool:
    return out.suffix.lower() != ".png"


def make_folders(args) -> None:
    """Where the images will be written, before anything is sampled: a wrong name would waste it."""
    out = Path(args.out)
    folders = [out if is_folder(out) else out.parent, *(Path(gif).parent for gif in [args.steps_gif] if gif)]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise UserError(f"cannot write to the folder {folder}")


def write(args, model: TwoStage, rows: list[torch.Tensor], start: Start) -> None:
    """The grid or the single files, and the animation."""
    kind = model.vqgan.config.input_kind
    names = file_names(class_names(model)) if start.classes != [None] else []
    shown = [pictures.to_rgb(images, kind).cpu() for images in rows]
    out = Path(args.out)
    if is_folder(out):
        for number, images in zip(start.classes, shown, strict=True):
            for i, image in enumerate(images):
                name = f"{names[number]}_{i:04d}.png" if number is not None else f"{i:04d}.png"
                pictures.save(pictures.to_image(image), out / name)
    else:
        if len(shown) == 1:  # without classes as square as can be
            per_line = math.ceil(len(shown[0]) ** 0.5)
            lines = list(shown[0].split(per_line))
        else:
            lines = shown
        if start.c is not None:
            lines.insert(0, pictures.to_rgb(start.c, model.condition.vqgan.config.input_kind))
        if start.x is not None:
            lines.insert(0, pictures.to_rgb(start.x, kind))
        pictures.save_grid(out, lines)
    if args.steps_gif:
        save_steps(Path(args.steps_gif), model, shown)


def save_steps(path: Path, model: TwoStage, rows: list[torch.Tensor], frames: int = 32) -> None:
    """The finished images uncovered code by code, in the order in which they were sampled."""
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
