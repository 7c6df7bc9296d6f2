"""How good are reconstructions, or new images, beside held-out ones (Sec. 4.1, 4.4 of arXiv:2012.09841)?

    python evaluate.py --vqgan runs/vqgan/last.pt
    python evaluate.py --gpt runs/gpt/best.pt -n 2000
    python evaluate.py --gpt runs/gpt/best.pt --features runs/classifier.pt      without InceptionV3's weights
    python evaluate.py --vqgan V.pt --reconstruct photos --out seen              original | reconstruction | codes
    python evaluate.py --vqgan V.pt --decode seen/photo.jpg.npy --out seen       the image of these codes

FID and Inception Score need InceptionV3's weights, which are downloaded once. If they cannot be, a classifier of
`python -m minvqgan.harness.judges` can take its place; the distances then bear its name.
"""

import itertools
import json
import math
import os
import tempfile
from functools import partial
from pathlib import Path

import torch

from minvqgan.harness import checkpoint, data, flags, judges, metrics, official, pictures, runtime, tokens
from minvqgan.harness.reconstruct import decode, reconstruct
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
    own.add_argument("--reconstruct", metavar="PATH", help="an image or a folder: only write reconstructions and codes")
    own.add_argument("--decode", metavar="NPY", help="codes (h, w), as --reconstruct writes them: only write an image")
    g.add_argument("--data", help="as in train_vqgan.py (what the model was trained on)")
    g.add_argument("--image-size", type=flags.size, help="side of the images (the model's)")
    g.add_argument("--resize", type=flags.size, help="scale the shorter side to this, then crop (the model's)")
    limit = "held-out images used, and training images searched for copies, at most"
    g.add_argument("--images", type=flags.positive, default=10_000, help=limit)
    g.add_argument("-n", type=flags.positive, default=1000, help="new images that --gpt makes")
    out = "folder of metrics.json and the images (a new one, runs/evaluation_N)"
    g.add_argument("--out", type=flags.filled, metavar="FOLDER", help=out)
    g = p.add_argument_group("judges")
    g.add_argument("--features", default="inception", help="network of the distances: inception, none, or a classifier")
    g.add_argument("--perceptual", default="vgg16", help="network of LPIPS: vgg16, none, or a classifier")
    flags.add_sampling_flags(p, batch_size=50)
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_flags(argv)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("evaluate.py runs in one process: start it by python, not by torchrun")
    device, out = runtime.pick_device(args.device), new_folder(args.out)
    model = official.load(args.vqgan or args.gpt, args.official_config).to(device)
    if args.gpt and not isinstance(model, TwoStage):
        raise UserError(f"{args.gpt} holds a VQGAN; evaluate it by --vqgan")
    vqgan = getattr(model, "vqgan", model)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(runtime.fastest_threads())
    if args.reconstruct:
        reconstruct(vqgan, Path(args.reconstruct), out)
        return 0
    if args.decode:
        decode(vqgan, Path(args.decode), out)
        return 0
    train_set, val_set = open_sets(args, model if args.gpt else vqgan)
    # Before the sampling: a missing judge, or a folder that cannot be written, must not be found out after it.
    features = None if vqgan.config.input_kind == "labels" else optional(judges.load_features, args.features, device)
    fewest = min(args.images, len(val_set), args.n if args.gpt else math.inf)
    if features is not None and fewest < 4:
        raise UserError(f"distances between sets need 4 images, not {fewest}: more -n or --images, or --features none")
    args.out = str(out)
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()
    table: dict[str, dict] = {}
    if args.gpt:
        evaluate_gpt(args, model, train_set, val_set, features, device, table)
    else:
        evaluate_reconstructions(args, vqgan, val_set, features, device, table)
    with runtime.written_whole(out / "metrics.json", "x") as file:
        json.dump({"flags": vars(args), "metrics": table}, file, indent=2)
    print(f"written: {out / 'metrics.json'}")
    return 0


def new_folder(out: str | None) -> Path:
    """--out, or the next of runs/evaluation_1, _2, ... Raises UserError for one that holds an evaluation."""
    if out is None:
        numbered = (Path(f"runs/evaluation_{i}") for i in itertools.count(1))
        return next(path for path in numbered if not path.exists())
    if (Path(out) / "metrics.json").exists():
        raise UserError(f"--out {out} already holds an evaluation (metrics.json); choose another folder")
    return Path(out)


def open_sets(args, model: VQGAN | TwoStage):
    """(training set, held-out set) that the model was trained with, unless flags say otherwise."""
    path, vqgan, condition = args.vqgan or args.gpt, getattr(model, "vqgan", model), getattr(model, "condition", None)
    trained_with = {} if args.official_config else checkpoint.trained_with(path)
    args.data = args.data or trained_with.get("data")
    if not args.data:
        raise UserError(f"{path} does not say what it was trained on; give --data")
    args.image_size = args.image_size or trained_with.get("image_size") or vqgan.config.image_size
    args.resize = args.resize or trained_with.get("resize")
    flags.check_image_size(args.image_size, vqgan.config.f)
    if condition is not None and args.image_size != model.config.n * vqgan.config.f:
        side = model.config.n * vqgan.config.f
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


def add(table: dict, name: str, value: float, spread: float | None = None) -> None:
    """A number for metrics.json; spread: the standard error of a mean over images. Printed as it comes."""
    table[name] = {"value": value, "spread": spread}
    print(f"{name:<40}  {value:10.4f}{'' if spread is None else f' ± {spread:.4g}'}")


def over_parts(table: dict, name: str, measure, *sets: torch.Tensor) -> None:
    """A number of whole sets of images; its spread is the standard deviation over five parts of them."""
    parts = [measure(*(images[i::5] for images in sets)) for i in range(5)] if len(sets[0]) >= 10 else []
    add(table, name, measure(*sets), torch.tensor(parts).std().item() if parts else None)


def distance_name(judge: str) -> str:
    """Only on InceptionV3's features may the Fréchet distance be called FID."""
    return "fid" if judge == "inception" else f"frechet_distance({judge})"


@torch.no_grad()
def evaluate_reconstructions(args, model: VQGAN, val_set, features, device: torch.device, table: dict) -> None:
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
        name = f"perceptual({Path(args.perceptual).stem})" if name == "perceptual" else name
        add(table, name, *metrics.spread(value))
    usage, perplexity = codebook_stats(counts)
    add(table, "codebook_usage", usage)
    add(table, "codebook_perplexity", perplexity)
    if features is not None:
        over_parts(table, distance_name(features.name), metrics.frechet_distance, real, fake)
    print(f"{len(value)} held-out images of {args.data} and their reconstructions")


@torch.no_grad()
def evaluate_gpt(args, model: TwoStage, train_set, val_set, features, device: torch.device, table: dict) -> None:
    to_c, classifier = tokens.condition_input(model), None
    file = args.classifier or (args.features if args.features not in ("inception", "none") else None)
    if file and model.condition.kind == "class":
        classifier = judges.load_classifier(file).to(device)
        number_of = torch.tensor(judges.match_classes(classifier.classes, val_set.classes), device=device)

    held_out = tokens.held_out(model, val_set, to_c, args.images, device)
    parts = zip(*(t.split(args.batch_size) for t in held_out), strict=True)
    nats = torch.cat([model(s, r).mean(1).cpu() for s, r in parts])  # (N,)
    add(table, "nats_per_token", *metrics.spread(nats))
    add(table, "bits_per_pixel", *metrics.spread(nats * len(model.order) / math.log(2) / args.image_size**2))
    add(table, "ln_K", math.log(model.vqgan.config.codebook_size))
    print(f"{len(nats)} held-out images of {args.data}")

    if features is None and classifier is None:
        return
    if runtime.pick_amp(args.amp, device, model.gpt.config.n_embd):
        print("new images in bfloat16")
        model.gpt.bfloat16()
    found: dict[str, list] = {"codes": [], "features": [], "probabilities": [], "right": []}
    for indices, classes in new_codes(args, model, val_set, to_c, flags.sampling(args), device):
        images = pictures.to_rgb(model.vqgan.decode_indices(indices), model.vqgan.config.input_kind)
        found["codes"].append(indices.int().cpu())  # the images again, in a hundredth of the memory
        if classifier is not None:
            found["right"].append((classifier(images).argmax(1) == number_of[classes]).double().cpu())
        if features is not None:
            for name, value in zip(("features", "probabilities"), features(images), strict=True):
                found[name].append(value.cpu())
    made = {name: torch.cat(parts) for name, parts in found.items() if parts}
    if classifier is not None:
        add(table, "class_accuracy", *metrics.spread(made["right"]))
    if features is not None:
        compare_new_images(args, features, model.vqgan, made, train_set, val_set, device, table)
    print(f"{args.n} new images for the conditions of held-out images")


def new_codes(args, model: TwoStage, val_set, to_c, sampling, device: torch.device):
    """Codes (b, h, w) of -n images in batches, and their classes (b,), on the device. Conditions are those of the
    held-out images that the new ones are compared with, evenly spread: folders are sorted by class."""
    count = min(args.images, len(val_set), args.n)
    keys = [(i * count // args.n * len(val_set) // count, None) for i in range(args.n)]
    batches = data.loader(val_set, args.batch_size, keys)
    for i, batch in enumerate(runtime.progress_bar(0, batches, desc="new images", unit="batch", leave=False)):
        batch = {k: v.to(device) for k, v in batch.items()}
        first = i * args.batch_size
        numbers = range(first, first + len(batch["class"]))
        yield model.sample_indices(to_c(batch), args.seed, numbers, sampling=sampling), batch["class"]


def compare_new_images(args, features, vqgan: VQGAN, made: dict, train_set, val_set, device, table: dict) -> None:
    """Distances to the held-out images, and the search for copies of training images, mirrored ones too if the training
    mirrored images: samples that are nearer to them than held-out images are."""
    kind, channels, name = vqgan.config.input_kind, vqgan.config.in_channels, features.name

    def images_of(batches, mirror: bool = False):
        for batch in batches:
            images = pictures.to_rgb(data.to_input(batch, kind, channels), kind)
            yield images.flip(3) if mirror else images

    def features_of(dataset, mirror: bool = False) -> torch.Tensor:
        batches = data.held_out_batches(dataset, args.batch_size, args.images)
        return judges.features_of(features, images_of(batches, mirror), device)[0]

    real, known, new = features_of(val_set), features_of(train_set), made["features"]
    over_parts(table, distance_name(name), lambda part: metrics.frechet_distance(real, part), new)
    label = "inception_score" if name == "inception" else f"class_score({name})"
    over_parts(table, label, metrics.inception_score, made["probabilities"])
    precision, recall = metrics.precision_recall(real, new)
    add(table, f"precision({name})", precision)
    add(table, f"recall({name})", recall)

    count = len(known)
    if train_set.flip:
        known = torch.cat([known, features_of(train_set, mirror=True)])
    distance, index = metrics.nearest(new, known)
    add(table, f"nearest_training({name})", *metrics.spread(distance))
    add(table, f"nearest_training_of_held_out({name})", *metrics.spread(metrics.nearest(real, known)[0]))
    closest = distance.argsort()[:10]
    samples = vqgan.decode_indices(made["codes"][closest].to(device))
    originals: list[torch.Tensor] = []
    for i in index[closest].tolist():
        key = i % count * len(train_set) // count, None  # as held_out_batches spreads them
        originals += images_of(data.loader(train_set, 1, [key]), mirror=i >= count)
    path = Path(args.out) / "neighbours.png"
    pictures.save_grid(path, [pictures.to_rgb(samples, kind).cpu(), torch.cat(originals)])
    views = ", also mirrored," if train_set.flip else ""
    searched = f"{count} of {len(train_set)} training images{views} were searched"
    print(f"{path}: the samples most like a training image, above it ({searched})")


if __name__ == "__main__":
    runtime.run(main)
