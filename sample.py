"""New images from a trained transformer: sampled, completed, conditioned, of any size (Sec. 3.2 and 3.3 of
arXiv:2012.09841).

python sample.py                                         16 images of each class
python sample.py --classes star,ring -n 4 --guidance 3
python sample.py --complete photo.jpg --keep 0.5         the upper half is kept
python sample.py --gpt G.pt --cond-image labels.png      a label map turned into a picture, at the map's own size
python sample.py --gpt G.pt --size 256x512               larger than the model has ever seen
"""

import math
import time
from argparse import ArgumentTypeError
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from minvqgan import sampler
from minvqgan.conditioning import coordinates
from minvqgan.harness import checkpoint, data, flags, metrics, pictures, runtime
from minvqgan.harness.runtime import UserError
from minvqgan.sampler import Sampling
from minvqgan.two_stage import TwoStage


def size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ArgumentTypeError(f"{text!r} is not a size like 256x512 (height x width)")
    return int(parts[0]), int(parts[1])


def parse_flags():
    p = flags.Parser(description=__doc__.split("\n")[0])
    g = p.add_argument_group("what")
    g.add_argument("--gpt", default="runs/gpt/best.pt", help="checkpoint of train_gpt.py")
    g.add_argument("-n", type=flags.positive, default=16, help="images, of each class or for each given image")
    g.add_argument("--classes", help="names or numbers, separated by commas (all)")
    g.add_argument("--complete", metavar="IMAGE", help="an image whose first rows are kept and the rest imagined")
    g.add_argument("--keep", type=flags.share, default=0.5, help="share of the rows that --complete keeps")
    g.add_argument("--cond-image", metavar="IMAGE", help="what a spatially conditioned model starts from")
    g.add_argument("--size", type=size, metavar="HxW", help="in pixels; beyond the training size a window slides")

    g = p.add_argument_group("how")
    g.add_argument("--temperature", type=float, default=1.0, help="below 1 sharpens; 0 takes the likeliest code")
    g.add_argument("--top-k", type=flags.positive, help="only the k likeliest codes")
    g.add_argument("--top-p", type=float, help="only the likeliest codes that together have this probability")
    g.add_argument("--guidance", type=float, default=1.0, help="above 1 exaggerates the condition")
    g.add_argument("--reject", type=float, metavar="RATE", help="keep the best share by the classifier's judgement")
    g.add_argument(
        "--classifier", metavar="FILE", help="for --reject: of minvqgan.harness.metrics, or a torchvision name"
    )
    g.add_argument("--seed", type=int, default=0, help="image i takes seed + i; the same whatever the batch size")
    g.add_argument("--batch-size", type=flags.positive, default=64, help="images at a time")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")

    g = p.add_argument_group("where")
    g.add_argument("--out", default="samples.png", help="a PNG for one grid, or a folder for single files")
    g.add_argument("--steps-gif", metavar="FILE", help="an animation of the images as their codes arrive")
    return p.parse_args()


def chosen_classes(text: str | None, names: tuple[str, ...]) -> list[int]:
    """Numbers of the classes named in `text`. Raises UserError for one that there is not."""
    if text is None:
        return list(range(len(names)))
    numbers = []
    for word in text.split(","):
        word = word.strip()
        if word in names:
            numbers.append(names.index(word))
        elif word.isdigit() and int(word) < len(names):
            numbers.append(int(word))
        else:
            raise UserError(
                f"--classes: there is no {word!r}; there are {', '.join(names[:20])} (0 to {len(names) - 1})"
            )
    return numbers


def pixel_size(wanted: tuple[int, int] | None, default: tuple[int, int], model: TwoStage) -> tuple[int, int]:
    """(H, W) of the images to make: divisible by f, not below the training size. Raises UserError."""
    f, smallest = model.vqgan.config.f, model.config.n * model.vqgan.config.f
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
    """A picture file as a VQGAN of this kind takes it, but of its own size: (1, C, H, W). Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"no picture at {path}")
    source = data.SOURCE_OF[kind]
    try:
        picture = data.to_tensor(data.READERS[source](Path(path)), source)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read as a picture ({error})") from None
    if source == "labels" and (picture.min() < 0 or picture.max() >= num_labels):
        raise UserError(f"{path}: holds label {picture.max()}, the model knows 0 to {num_labels - 1}")
    return data.to_input({source: picture[None]}, kind, num_labels)


def cover(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """x (1, C, h, w) scaled until it covers height x width if it is smaller, then cut in the middle."""
    h, w = x.shape[2:]
    if h < height or w < width:
        scale = max(height / h, width / w)
        x = F.interpolate(x, size=(max(height, round(h * scale)), max(width, round(w * scale))), mode="nearest")
    top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
    return x[:, :, top : top + height, left : left + width]


def main() -> int:
    args = parse_flags()
    device = runtime.pick_device(args.device)
    model = checkpoint.load(args.gpt)
    if not isinstance(model, TwoStage):
        raise UserError(
            f"{args.gpt} holds a VQGAN, not a transformer; train one on it with train_gpt.py --vqgan {args.gpt}"
        )
    model.to(device)
    condition, f, side = model.condition, model.vqgan.config.f, model.config.n * model.vqgan.config.f
    try:
        sampling = Sampling(args.temperature, args.top_k, args.top_p, args.guidance)
    except ValueError as error:
        raise UserError(str(error)) from None
    if args.guidance != 1 and model.null is None:
        raise UserError("--guidance needs a model trained with dropped conditions (train_gpt.py --drop-cond)")

    # What the images start from: c (one row an image), given codes, and the rows of the grid.
    names, given, keep = model.config.classes, None, 0
    c_picture = None
    if args.cond_image:
        if condition.kind != "spatial":
            raise UserError(f"--cond-image: this model is conditioned on {condition.kind}, not on an image")
        config = condition.vqgan.config
        c_picture = open_picture(args.cond_image, config.input_kind, config.in_channels)
        height, width = pixel_size(args.size, tuple(c_picture.shape[2:]), model)
        c_picture = cover(c_picture, height, width).to(device)
    elif condition.kind == "spatial":
        raise UserError("this model turns one image into another: give it one by --cond-image")
    else:
        height, width = pixel_size(args.size, (side, side), model)
    classes = chosen_classes(args.classes, names) if condition.kind == "class" else [None]
    if args.classes and condition.kind != "class":
        raise UserError(f"--classes: this model is conditioned on {condition.kind}")
    if args.complete:
        if model.config.order != "row":
            raise UserError(f"--complete keeps rows, but this model reads in {model.config.order} order")
        x = open_picture(args.complete, model.vqgan.config.input_kind, model.vqgan.config.in_channels)
        scale = max(height / x.shape[2], width / x.shape[3])
        x = F.interpolate(x, scale_factor=scale, mode="bilinear", antialias=True) if scale < 1 else x
        x = cover(x, height, width).to(device)
        given = model.vqgan.encode_indices(x)  # (1, h, w)
        keep = round(args.keep * given.shape[1]) * given.shape[2]

    classifier, per_row = None, args.n
    if args.reject is not None:
        if condition.kind != "class" or not args.classifier:
            raise UserError("--reject needs a class-conditional model and --classifier")
        if not 0 < args.reject <= 1:
            raise UserError(f"--reject {args.reject} is not a rate in (0, 1]")
        classifier = metrics.load_classifier(args.classifier).to(device)
        number_of = metrics.match_classes(classifier.classes, names)
        per_row = math.ceil(args.n / args.reject)

    h, w = height // f, width // f
    began, rows = time.time(), []
    bar = tqdm(total=len(classes) * per_row * (h * w - keep), unit="tok", unit_scale=True, dynamic_ncols=True)
    for row, number in enumerate(classes):
        images = []
        for first in range(0, per_row, args.batch_size):
            count = min(args.batch_size, per_row - first)
            if number is not None:
                c = torch.full((count,), number, device=device)
            elif c_picture is not None:
                c = c_picture.expand(count, -1, -1, -1)
            elif condition.kind == "coords":
                c = coordinates(height, width).to(device).expand(count, -1, -1, -1)
            else:
                c = torch.zeros(count, 1, device=device)
            seeds = range(args.seed + row * per_row + first, args.seed + row * per_row + first + count)
            start = None if given is None else given.expand(count, -1, -1)
            indices = model.sample_indices(c, seeds, (h, w), sampling, start, keep, on_token=bar.update)
            images += [model.vqgan.decode_indices(part).clamp(-1, 1) for part in indices.split(16)]
        images = torch.cat(images)
        if classifier is not None:
            with torch.no_grad():
                scores = torch.cat([classifier(part).softmax(1)[:, number_of[number]] for part in images.split(64)])
            images = images[sampler.reject(scores, args.reject)[: args.n]]
        rows.append(images)
    bar.close()
    write(args, model, rows, classes, c_picture, x if args.complete else None)
    tokens = len(classes) * per_row * (h * w - keep)
    seconds = time.time() - began
    count = sum(map(len, rows))
    print(f"{count} images of {height} x {width} in {seconds:.1f} s ({tokens / seconds:.0f} codes/s): {args.out}")
    return 0


def write(args, model: TwoStage, rows, classes, c_picture, x) -> None:
    """The grid or the single files, and the animation."""
    kind, names = model.vqgan.config.input_kind, model.config.classes
    shown = [pictures.to_rgb(images, kind).cpu() for images in rows]
    out = Path(args.out)
    if out.suffix.lower() != ".png":
        out.mkdir(parents=True, exist_ok=True)
        for number, images in zip(classes, shown, strict=True):
            for i, image in enumerate(images):
                name = f"{names[number]}_{i:04d}.png" if number is not None else f"{i:04d}.png"
                pictures.grid([image[None]], min_side=1).save(out / name)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        if len(shown) == 1:  # without classes as square as can be
            per_line = math.ceil(len(shown[0]) ** 0.5)
            lines = list(shown[0].split(per_line))
        else:
            lines = shown
        if c_picture is not None:
            lines.insert(0, pictures.to_rgb(c_picture, model.condition.vqgan.config.input_kind).cpu())
        if x is not None:
            lines.insert(0, pictures.to_rgb(x, kind).cpu())
        pictures.save_grid(out, lines)
    if args.steps_gif:
        save_steps(Path(args.steps_gif), model, shown)


def save_steps(path: Path, model: TwoStage, rows, frames: int = 32) -> None:
    """The finished images uncovered code by code, in the order in which they were sampled."""
    f = model.vqgan.config.f
    h, w = rows[0].shape[2] // f, rows[0].shape[3] // f
    rank = torch.arange(h * w).view(h, w)
    if (h, w) == (model.config.n, model.config.n):
        rank = model.order.cpu().argsort().view(h, w)  # when each position's turn comes
    when = rank.repeat_interleave(f, 0).repeat_interleave(f, 1)  # (H, W)
    steps = [h * w * t // frames for t in range(frames + 1)]
    images = [pictures.grid([torch.where(when < t, row[:16], torch.tensor(0.0)) for row in rows]) for t in steps]
    images[0].save(path, save_all=True, append_images=images[1:] + [images[-1]] * 12, duration=120, loop=0)


if __name__ == "__main__":
    runtime.run(main)
