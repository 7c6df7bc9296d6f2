"""How good is it? A VQGAN's reconstructions, or a transformer's images, against held-out images (Sec. 4.1, 4.4 of
arXiv:2012.09841). Or: your own images as codes, and back.

    python evaluate.py --vqgan runs/vqgan/last.pt
    python evaluate.py --gpt runs/gpt/best.pt -n 2000
    python evaluate.py --gpt runs/gpt/best.pt --features runs/classifier.pt      without InceptionV3's weights
    python evaluate.py --vqgan V.pt --reconstruct photos --out seen              original | reconstruction | codes
    python evaluate.py --vqgan V.pt --decode seen/photo.npy --out seen           the image of these codes

FID and Inception Score need InceptionV3's weights, which are downloaded once. If they cannot be, a classifier of
`python -m minvqgan.harness.judges` can take its place; the distances then bear its name.
"""

import json
import math
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from minvqgan.harness import checkpoint, data, flags, imagefiles, judges, metrics, official, pictures, runtime, tokens
from minvqgan.harness.runtime import UserError
from minvqgan.quantizer import codebook_stats
from minvqgan.two_stage import TwoStage
from minvqgan.vqgan import VQGAN


def parse_flags(argv: list[str] | None):
    p = flags.Parser(description=__doc__)
    g = p.add_argument_group("what")
    which = g.add_mutually_exclusive_group(required=True)
    which.add_argument("--vqgan", metavar="FILE", help="a first-stage model: how well does it reconstruct?")
    which.add_argument("--gpt", metavar="FILE", help="both stages: how likely are held-out images, how good new ones?")
    own = g.add_mutually_exclusive_group()
    own.add_argument("--reconstruct", metavar="PATH", help="an image or a folder: write reconstructions and codes")
    own.add_argument("--decode", metavar="NPY", help="codes (h, w) as --reconstruct writes them: write their image")
    g.add_argument("--data", help="as in train_vqgan.py (what the model was trained on)")
    g.add_argument("--image-size", type=flags.size, help="side of the images (the model's)")
    g.add_argument("--resize", type=flags.size, help="scale the shorter side to this, then crop (the model's)")
    limit = "held-out images used, and training images searched for copies, at most"
    g.add_argument("--images", type=flags.positive, default=10_000, help=limit)
    g.add_argument("-n", type=flags.positive, default=1000, help="new images that --gpt makes")
    g.add_argument("--out", default="runs/evaluation", help="folder of metrics.json and the images")
    g = p.add_argument_group("judges")
    g.add_argument("--features", default="inception", help="network of the distances: inception, none, or a classifier")
    g.add_argument("--perceptual", default="vgg16", help="network of LPIPS: vgg16, none, or a classifier")
    g.add_argument("--splits", type=flags.positive, default=5, help="parts of the images for the spread")
    g.add_argument("--neighbours", type=flags.positive, default=10, help="new images shown with their nearest")
    flags.add_sampling_flags(p, batch_size=50)
    return p.parse_args(argv)


def open_sets(args, model: VQGAN | TwoStage, vqgan: VQGAN):
    """(training set, held-out set) that the model was trained with, unless flags say otherwise."""
    path = args.vqgan or args.gpt
    trained_with = {} if args.official_config else checkpoint.trained_with(path)
    args.data = args.data or trained_with.get("data")
    if not args.data:
        raise UserError(f"{path} does not say what it was trained on; give --data")
    args.image_size = args.image_size or trained_with.get("image_size") or vqgan.config.image_size
    args.resize = args.resize or trained_with.get("resize")
    flags.check_image_size(args.image_size, vqgan.config.f)
    condition = None
    if isinstance(model, TwoStage):
        condition, side = model.condition, model.config.n * vqgan.config.f
        if args.image_size != side:
            raise UserError(f"--image-size {args.image_size}: this transformer reads images of {side} x {side}")
    sources, num_labels = tokens.sources_of(vqgan, condition)
    seed, flip = trained_with.get("seed", 0), trained_with.get("flip", True)
    sets = data.open_data(args.data, args.image_size, args.resize, sources, num_labels, seed, flip)
    if condition is not None and condition.kind == "class":
        data.check_classes(args.data, sets[0].classes, model.config.classes, condition.num_tokens)
    return sets


def optional(load, name: str, device: torch.device):
    """A judge, or None if its weights cannot be downloaded: then one line says which numbers are missing."""
    try:
        judge = load(name)
        return judge and judge.to(device)
    except UserError as error:
        if name not in ("vgg16", "inception"):
            raise
        print(f"without {name}: {error}")
        return None


class Table:
    """Named numbers with their spread, for metrics.json; each is printed as it comes."""

    def __init__(self):
        self.rows: dict[str, dict] = {}

    def add(self, name: str, value: float, spread: float | None = None, **more) -> None:
        self.rows[name] = {"value": value, "spread": spread, **more}
        print(f"{name:<40}  {value:10.4f}{'' if spread is None else f' ± {spread:.4g}'}")

    def mean(self, name: str, values: torch.Tensor) -> None:
        """A mean over images, values (N,), with its standard error."""
        self.add(name, *metrics.spread(values))

    def over_splits(self, name: str, measure, parts, whole) -> None:
        """A number of a whole set, with its standard deviation over parts of the set."""
        values = torch.tensor([measure(part) for part in parts])
        self.add(name, measure(whole), values.std().item() if len(values) > 1 else None, splits=values.tolist())


def split(images: torch.Tensor, n: int) -> list[torch.Tensor]:
    """n parts, each of every n-th image: folders are sorted by class. Parts of a single image are left out."""
    return [part for part in (images[i::n] for i in range(n)) if len(part) > 1]


def compare_sets(table: Table, args, name: str, real: torch.Tensor, fake: torch.Tensor, score: torch.Tensor | None):
    """Distances between the features of real and fake images. score: class probabilities of the fake ones, or None for
    reconstructions, each part of which is compared with the images that it was made from."""
    inception = name == "inception"
    fake_parts = split(fake, args.splits)
    real_parts = split(real, args.splits) if score is None else [real] * len(fake_parts)
    parts = list(zip(fake_parts, real_parts, strict=False))
    label = "fid" if inception else f"frechet_distance({name})"
    table.over_splits(label, lambda pair: metrics.frechet_distance(*pair), parts, (fake, real))
    if score is not None:
        label = "inception_score" if inception else f"class_score({name})"
        table.over_splits(label, metrics.inception_score, split(score, args.splits), score)
        precision, recall = metrics.precision_recall(real, fake)
        table.add(f"precision({name})", precision)
        table.add(f"recall({name})", recall)


@torch.no_grad()
def evaluate_reconstructions(args, model: VQGAN, val_set, features, device: torch.device, table: Table) -> None:
    kind = model.config.input_kind
    load = partial(judges.load_perceptual, image_size=args.image_size)
    perceptual = None if kind == "labels" else optional(load, args.perceptual, device)

    def more(x: torch.Tensor, x_hat: torch.Tensor) -> dict[str, torch.Tensor]:
        found = {} if kind == "labels" else {"ssim": metrics.ssim(x, x_hat)}
        if features is not None:
            found["real"], found["fake"] = (features(pictures.to_rgb(images, kind))[0] for images in (x, x_hat))
        return found

    batches = data.held_out_batches(val_set, args.batch_size, args.images)
    batches = runtime.progress_bar(0, batches, desc="reconstructions", unit="batch", leave=False)
    values, counts = metrics.measure_vqgan(model, batches, device, perceptual, more)
    real, fake = values.pop("real", None), values.pop("fake", None)
    for name, value in values.items():
        table.mean(f"perceptual({Path(args.perceptual).stem})" if name == "perceptual" else name, value)
    usage, perplexity = codebook_stats(counts)
    table.add("codebook_usage", usage)
    table.add("codebook_perplexity", perplexity)
    if features is not None:
        compare_sets(table, args, features.name, real, fake, None)
    print(f"{len(value)} held-out images of {args.data} and their reconstructions")


@torch.no_grad()
def new_codes(args, model: TwoStage, val_set, to_c, sampling, device: torch.device):
    """Codes (b, h, w) of -n images in batches, and their classes (b,), on the device. Conditions are those of as many
    held-out images, evenly spread (folders are sorted by class), or of all of them in turn if there are fewer."""
    bar, count = runtime.progress_bar(0, total=args.n, desc="new images", leave=False), min(args.images, len(val_set))
    done = 0
    while done < args.n:
        for batch in data.held_out_batches(val_set, args.batch_size, min(count, args.n - done)):
            batch = {k: v.to(device) for k, v in batch.items()}
            numbers = range(done, done + len(batch["class"]))
            yield model.sample_indices(to_c(batch), args.seed, numbers, sampling=sampling), batch["class"]
            done = numbers.stop
            bar.update(len(numbers))
    bar.close()


@torch.no_grad()
def evaluate_gpt(args, model: TwoStage, train_set, val_set, features, device: torch.device, table: Table) -> None:
    kind, to_c = model.vqgan.config.input_kind, tokens.condition_input(model)
    judge = args.classifier or (args.features if args.features not in ("inception", "none") else None)
    classifier = judges.load_classifier(judge).to(device) if judge and model.condition.kind == "class" else None
    if classifier is not None:
        number_of = torch.tensor(judges.match_classes(classifier.classes, model.config.classes), device=device)
    amp = runtime.pick_amp(args.amp, device, model.gpt.config.n_embd)
    with torch.autocast(device.type, torch.bfloat16, enabled=amp and device.type == "cuda"):
        held_out = tokens.held_out(model, val_set, to_c, args.images, device)
    parts = zip(*(t.split(args.batch_size) for t in held_out), strict=True)
    nats = torch.cat([model(s, r).mean(1).cpu() for s, r in parts])  # (N,)
    table.mean("nats_per_token", nats)
    table.mean("bits_per_pixel", nats * len(model.order) / math.log(2) / args.image_size**2)
    table.add("ln_K", math.log(model.vqgan.config.codebook_size))
    if features is None and classifier is None:
        print(f"{len(nats)} held-out images of {args.data}")
        return
    if amp:
        print("new images in bfloat16")
        model.gpt.bfloat16()
    seen: dict[str, list] = {"codes": [], "features": [], "score": [], "right": []}
    for indices, classes in new_codes(args, model, val_set, to_c, flags.sampling(args), device):
        images = pictures.to_rgb(model.vqgan.decode_indices(indices), kind)
        seen["codes"].append(indices.int().cpu())  # the images again, in a hundredth of the memory
        if classifier is not None:
            seen["right"].append((classifier(images).argmax(1) == number_of[classes]).double().cpu())
        if features is not None:
            for name, value in zip(("features", "score"), features(images), strict=True):
                seen[name].append(value.cpu())
    made = {name: torch.cat(parts) for name, parts in seen.items() if parts}
    if classifier is not None:
        table.mean("class_accuracy", made["right"])
    if features is not None:
        compare_new_images(args, features, model.vqgan, made, train_set, val_set, device, table)
    print(f"{len(nats)} held-out images of {args.data}, {args.n} new images for their conditions")


def compare_new_images(args, features, vqgan: VQGAN, made: dict, train_set, val_set, device, table: Table) -> None:
    """Distances to the held-out images, and the search for copies of training images, mirrored ones too if the training
    mirrored images: samples nearer to them than held-out images are would be copies."""
    kind, channels = vqgan.config.input_kind, vqgan.config.in_channels

    def shown(batches, mirror: bool = False):
        for batch in batches:
            images = pictures.to_rgb(data.to_input(batch, kind, channels), kind)
            yield images.flip(3) if mirror else images

    def features_of(dataset, mirror: bool = False) -> torch.Tensor:
        batches = data.held_out_batches(dataset, args.batch_size, args.images)
        return judges.features_of(features, shown(batches, mirror), device)[0]

    real, known = features_of(val_set), features_of(train_set)
    count = len(known)
    if train_set.flip:
        known = torch.cat([known, features_of(train_set, mirror=True)])
    compare_sets(table, args, features.name, real, made["features"], made["score"])
    distance, index = metrics.nearest(made["features"], known)
    table.mean(f"nearest_training({features.name})", distance)
    table.mean(f"nearest_training_of_held_out({features.name})", metrics.nearest(real, known)[0])
    closest = distance.argsort()[: args.neighbours]
    copies = []
    for i in index[closest].tolist():
        key = i % count * len(train_set) // count, None  # as `held_out_batches` spreads them
        copies += shown(data.loader(train_set, 1, [key]), mirror=i >= count)
    samples = vqgan.decode_indices(made["codes"][closest].to(device))
    path = Path(args.out) / "neighbours.png"
    pictures.save_grid(path, [pictures.to_rgb(samples, kind).cpu(), torch.cat(copies)])
    searched = f"{count} of {len(train_set)} training images{', also mirrored' if train_set.flip else ''}"
    print(f"{path}: the samples most like a training image, above it, of {searched}")


@torch.no_grad()
def reconstruct(args, model: VQGAN, device: torch.device) -> None:
    """For each image a PNG of original | reconstruction | code map, its codes (h, w), and a line of numbers. Sides are
    padded to multiples of f by repeating the border, and cut back."""
    source, out, c = Path(args.reconstruct), Path(args.out), model.config
    root, paths = source.parent, [source]
    if source.is_dir():
        root, paths = source, sorted(p for p in source.rglob("*") if p.suffix.lower() in imagefiles.EXTENSIONS)
        if not paths:
            raise UserError(f"no images in {source}")
        if out.resolve().is_relative_to(source.resolve()):
            raise UserError(f"--out {out} is in the folder of the images; choose another one")
    for path in paths:
        try:
            x = data.open_image(path, c.input_kind, c.in_channels)  # (1, C, H, W)
        except UserError as error:
            if len(paths) == 1:
                raise
            print(f"skipped: {error}")
            continue
        H, W = x.shape[2:]
        indices = model.encode_indices(F.pad(x, (0, -W % c.f, 0, -H % c.f), mode="replicate").to(device))  # (1, h, w)
        x_hat = model.decode_indices(indices)[:, :, :H, :W].cpu()
        code_map = pictures.code_map(model, indices, c.f)[:, :, :H, :W]
        shown = torch.cat([pictures.to_rgb(x, c.input_kind), pictures.to_rgb(x_hat, c.input_kind), code_map], 3)
        name = "_".join(path.relative_to(root).parts)  # with its suffix: a.jpg and a.png are two images
        out.mkdir(parents=True, exist_ok=True)
        pictures.save(pictures.to_image(shown[0]), out / f"{name}.png")
        np.save(out / f"{name}.npy", indices[0].cpu().numpy().astype("u2" if c.codebook_size <= 2**16 else "i8"))
        labels = c.input_kind == "labels"
        numbers = metrics.label_metrics(x, x_hat) if labels else {"psnr": metrics.psnr(x, x_hat)}
        quality = ", ".join(f"{key} {value.item():.2f}" for key, value in numbers.items())
        bits = indices.numel() * math.ceil(math.log2(c.codebook_size))
        pixel_bits = 8 * H * W * (1 if labels else c.in_channels)
        line = f"{path}: {H} x {W}, {quality}, {bits:,} bits of codes for {pixel_bits:,} of pixels"
        print(runtime.printable(line))  # the names of files in a folder may hold control characters


@torch.no_grad()
def decode(args, model: VQGAN, device: torch.device) -> None:
    """The image of codes that `reconstruct` wrote."""
    out = Path(args.out) / f"{Path(args.decode).stem}.decoded.png"
    with checkpoint.door(f"--decode {args.decode}"):
        codes = torch.from_numpy(np.load(args.decode, allow_pickle=False).astype(np.int64, casting="safe"))
        image = model.decode_indices(codes[None].to(device)).cpu()
    out.parent.mkdir(parents=True, exist_ok=True)
    pictures.save(pictures.to_image(pictures.to_rgb(image, model.config.input_kind)[0]), out)
    print(f"{image.shape[2]} x {image.shape[3]}: {out}")


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("evaluate.py runs in one process: start it by python, not by torchrun")
    device = runtime.pick_device(args.device)
    model = official.load(args.vqgan or args.gpt, args.official_config)
    if args.gpt and not isinstance(model, TwoStage):
        raise UserError(f"{args.gpt} holds a VQGAN; evaluate it by --vqgan")
    vqgan = getattr(model, "vqgan", model).to(device)
    if args.reconstruct or args.decode:
        (reconstruct if args.reconstruct else decode)(args, vqgan, device)
        return 0
    train_set, val_set = open_sets(args, model if args.gpt else vqgan, vqgan)
    # Judges before the sampling: a missing one must not be found out after it.
    labels = args.vqgan and vqgan.config.input_kind == "labels"
    features = None if labels else optional(judges.load_features, args.features, device)
    fewest = min(args.images, len(val_set), *([args.n] if args.gpt else []))
    if features is not None and fewest < 4:
        raise UserError(f"distances between sets need 4 images, not {fewest}: more -n or --images, or --features none")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    table = Table()
    if args.gpt:
        evaluate_gpt(args, model.to(device), train_set, val_set, features, device, table)
    else:
        evaluate_reconstructions(args, vqgan, val_set, features, device, table)
    out = Path(args.out) / "metrics.json"
    with runtime.written_whole(out, "x") as file:
        json.dump({"flags": vars(args), "metrics": table.rows}, file, indent=2)
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    runtime.run(main)
