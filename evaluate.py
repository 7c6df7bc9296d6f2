"""How good is it? A VQGAN's reconstructions, or a transformer's images, beside held-out images (Sec. 4.1, 4.4 of
arXiv:2012.09841).

    python evaluate.py --vqgan runs/vqgan/last.pt
    python evaluate.py --gpt runs/gpt/best.pt -n 2000
    python evaluate.py --gpt runs/gpt/best.pt --features runs/classifier.pt      without InceptionV3's weights

FID and Inception Score need InceptionV3's weights, which are downloaded once. Where that cannot be, a classifier of
`python -m minvqgan.harness.judges` takes its place, and the distances then bear its name.
"""

import json
import math
import os
from pathlib import Path

import torch
from tqdm import tqdm

from minvqgan.harness import checkpoint, data, flags, judges, metrics, official, pictures, runtime, tokens
from minvqgan.harness.judges import load_classifier, match_classes
from minvqgan.harness.runtime import UserError
from minvqgan.quantizer import codebook_stats
from minvqgan.two_stage import TwoStage
from minvqgan.vqgan import VQGAN


def parse_flags():
    p = flags.Parser(description=__doc__)
    g = p.add_argument_group("what")
    which = g.add_mutually_exclusive_group(required=True)
    which.add_argument("--vqgan", metavar="FILE", help="a first stage: how well does it reconstruct?")
    which.add_argument("--gpt", metavar="FILE", help="both stages: how likely are held-out images, how good new ones?")
    g.add_argument("--official-config", metavar="YAML", help="the file is of the paper's authors; its yaml")
    g.add_argument("--data", help="as in train_vqgan.py (what the model was trained on)")
    g.add_argument("--image-size", type=flags.size, help="side of the images (the model's)")
    g.add_argument("--resize", type=flags.size, help="scale the shorter side to this, then crop (the model's)")
    g.add_argument(
        "--images",
        type=flags.positive,
        default=10_000,
        help="held-out images used, and training images searched for copies, at most",
    )
    g.add_argument("-n", type=flags.positive, default=1000, help="new images that --gpt makes")
    flags.add_sampling_flags(p)

    g = p.add_argument_group("judges")
    g.add_argument("--features", default="inception", help="network of the distances: inception, none, or a classifier")
    g.add_argument("--classifier", metavar="FILE", help="for class accuracy; a torchvision name too (--features' file)")
    g.add_argument("--perceptual", default="vgg16", help="network of LPIPS: vgg16, none, or a classifier")

    g = p.add_argument_group("how")
    g.add_argument("--splits", type=flags.positive, default=5, help="parts of the images for the spread")
    g.add_argument("--neighbours", type=flags.positive, default=10, help="new images shown beside their nearest")
    g.add_argument("--batch-size", type=flags.positive, default=50, help="images at a time")
    g.add_argument("--seed", type=flags.seed, default=0, help="of the new images")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    g.add_argument("--out", default="runs/evaluation", help="folder of metrics.json and the images")
    return p.parse_args()


def open_sets(args, model: VQGAN | TwoStage, vqgan: VQGAN):
    """(training set, held-out set): the data and the split that the model was trained with, unless flags say other."""
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
    split = trained_with.get("seed", 0)
    sets = data.open_data(args.data, args.image_size, args.resize, sources, num_labels, split)
    if condition is not None and condition.kind == "class":
        data.check_classes(args.data, sets[0].classes, model.config.classes, condition.num_tokens)
    return sets


def prepare_out(folder: Path) -> None:
    """Make the folder to write to. Raises UserError where files of something else would be written over."""
    there = [name for name in ("metrics.json", "neighbours.png") if (folder / name).exists()]
    if there:
        try:
            path = folder / "metrics.json"
            own = path.is_file() and json.loads(path.read_text()).keys() == {"flags", "metrics"}
        except (OSError, ValueError, AttributeError, RecursionError):
            own = False
        if not own:
            raise UserError(
                f"--out {folder} holds {' and '.join(there)} of something else, which would be written over"
            )
    folder.mkdir(parents=True, exist_ok=True)


def optional(load, name: str, device: torch.device):
    """A judge, or None where downloaded weights cannot be had: then one line says which numbers are missing."""
    try:
        judge = load(name)
    except UserError as error:
        if name not in ("vgg16", "inception"):
            raise
        print(f"without {name}: {error}")
        return None
    return judge.to(device) if judge is not None else None


def check_numbers(*numbers: int) -> None:
    """Distances between sets need a few images in each. Raises UserError."""
    fewest = min(numbers)
    if fewest < 4:
        raise UserError(f"distances between sets need 4 images, not {fewest}: more -n or --images, or --features none")


class Table:
    """Named numbers with their spread: printed as lines, kept as JSON."""

    def __init__(self):
        self.rows: dict[str, dict] = {}

    def mean(self, name: str, values: torch.Tensor) -> None:
        """A mean over images, values (N,), with its standard error."""
        value, error = metrics.spread(values)
        self.rows[name] = {"value": value, "spread": error}

    def over_splits(self, name: str, measure, parts, whole) -> None:
        """A number of a whole set, with its standard deviation over parts of the set."""
        values = torch.tensor([measure(part) for part in parts])
        spread = values.std().item() if len(values) > 1 else None
        self.rows[name] = {"value": measure(whole), "spread": spread, "splits": values.tolist()}

    def plain(self, name: str, value: float) -> None:
        self.rows[name] = {"value": value, "spread": None}

    def lines(self) -> list[str]:
        width = max(map(len, self.rows))
        text = {name: "" if row["spread"] is None else f" ± {row['spread']:.4g}" for name, row in self.rows.items()}
        return [f"{name:<{width}}  {row['value']:10.4f}{text[name]}" for name, row in self.rows.items()]


def split(images: torch.Tensor, n: int) -> list[torch.Tensor]:
    """n parts with all classes in each: folders are sorted by class, so every n-th image goes into one part. A part of
    a single image has no spread and is left out."""
    return [part for part in (images[i::n] for i in range(n)) if len(part) > 1]


def compare_sets(table: Table, args, name: str, real: torch.Tensor, fake: torch.Tensor, score: torch.Tensor | None):
    """Distances between the features of real and fake images; score: class probabilities of the fake ones, or None
    for reconstructions, of which each part is compared with the very images it was made from."""
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
        table.plain(f"precision({name})", precision)
        table.plain(f"recall({name})", recall)


@torch.no_grad()
def evaluate_reconstructions(args, model: VQGAN, val_set, device: torch.device, table: Table) -> None:
    kind, K = model.config.input_kind, model.config.codebook_size
    labels = kind == "labels"
    perceptual = features = None
    if not labels:
        perceptual = optional(lambda name: judges.load_perceptual(name, args.image_size), args.perceptual, device)
        features = optional(judges.load_features, args.features, device)
    values: dict[str, list] = {}
    seen: dict[str, list] = {"real": [], "fake": []}
    counts = torch.zeros(K, dtype=torch.long)
    number = min(args.images, len(val_set))
    if features is not None:
        check_numbers(number)
    batches = data.held_out_batches(val_set, args.batch_size, number)
    bar = tqdm(batches, total=math.ceil(number / args.batch_size), desc="reconstructions", leave=False)
    for x, x_hat, indices, row in metrics.reconstructions(model, bar, device, perceptual):
        counts += torch.bincount(indices.flatten().cpu(), minlength=K)
        if not labels:
            row["ssim"] = metrics.ssim(x, x_hat)
        for name, value in row.items():
            if name == "perceptual":
                name = f"perceptual({Path(args.perceptual).stem})"
            values.setdefault(name, []).append(value.cpu())
        if features is not None:
            for name, images in (("real", x), ("fake", x_hat)):
                seen[name].append(features(pictures.to_rgb(images, kind))[0].cpu())
    for name, value in values.items():
        table.mean(name, torch.cat(value))
    usage, perplexity = codebook_stats(counts)
    table.plain("codebook_usage", usage)
    table.plain("codebook_perplexity", perplexity)
    if features is not None:
        compare_sets(table, args, features.name, torch.cat(seen["real"]), torch.cat(seen["fake"]), None)
    print(f"{number} held-out images of {args.data}, each beside its reconstruction")


@torch.no_grad()
def new_images(args, model: TwoStage, val_set, to_c, sampling, device: torch.device):
    """-n images for the conditions of as many held-out images, evenly spread (folders are sorted by class), or of all
    of them in turn where they are fewer: (images (n, C, H, W), classes (n,))."""
    images, classes, count = [], [], min(args.images, len(val_set))
    bar = tqdm(total=args.n, desc="new images", leave=False)
    while bar.n < args.n:
        for batch in data.held_out_batches(val_set, args.batch_size, min(count, args.n - bar.n)):
            c = to_c({k: v.to(device) for k, v in batch.items()})
            indices = model.sample_indices(c, args.seed, range(bar.n, bar.n + len(c)), sampling=sampling)
            images.append(model.vqgan.decode_indices(indices).cpu())
            classes.append(batch["class"])
            bar.update(len(c))
    bar.close()
    return torch.cat(images), torch.cat(classes)


def seen_by(network, images, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(features (N, d), class probabilities) of batches of images in [-1, 1]."""
    seen = [tuple(t.cpu() for t in network(batch.to(device))) for batch in images]
    return tuple(torch.cat(parts) for parts in zip(*seen, strict=True))


@torch.no_grad()
def evaluate_gpt(args, model: TwoStage, train_set, val_set, device: torch.device, table: Table) -> None:
    kind, sampling = model.vqgan.config.input_kind, flags.sampling(args)
    to_c = tokens.condition_input(model)
    T, pixels = len(model.order), (model.config.n * model.vqgan.config.f) ** 2
    held_out = tokens.held_out(model, val_set, to_c, args.images, device)
    parts = zip(*(t.split(args.batch_size) for t in held_out), strict=True)
    nats = torch.cat([model(s, r).mean(1).cpu() for s, r in parts])  # (N,)
    table.mean("nats_per_token", nats)
    table.mean("bits_per_pixel", nats * T / math.log(2) / pixels)
    table.plain("ln_K", math.log(model.vqgan.config.codebook_size))

    features = optional(judges.load_features, args.features, device)
    judge = args.classifier or (args.features if args.features not in ("inception", "none") else None)
    if features is None and not (judge and model.condition.kind == "class"):
        print(f"{len(nats)} held-out images of {args.data}")
        return
    if features is not None:
        check_numbers(args.n, len(nats))
    if runtime.pick_amp(args.amp, device, model.gpt.config.n_embd):
        print("new images in bfloat16")
        model.gpt.bfloat16()
    images, classes = new_images(args, model, val_set, to_c, sampling, device)
    fake = pictures.to_rgb(images, kind)
    if judge and model.condition.kind == "class":
        classifier = load_classifier(judge).to(device)
        number_of = torch.tensor(match_classes(classifier.classes, model.config.classes))
        guesses = torch.cat([classifier(part.to(device)).argmax(1).cpu() for part in fake.split(args.batch_size)])
        table.mean("class_accuracy", (guesses == number_of[classes]).double())
    if features is not None:
        compare_new_images(args, features, fake, train_set, val_set, model.vqgan.config, device, table)
    print(f"{len(nats)} held-out images of {args.data}, {args.n} new images for their conditions")


def compare_new_images(args, features, fake, train_set, val_set, config, device, table) -> None:
    """Distances to the held-out images, and the check for memorised images: nearest training images."""

    def shown(dataset):
        for batch in data.held_out_batches(dataset, args.batch_size, args.images):
            yield pictures.to_rgb(data.to_input(batch, config.input_kind, config.in_channels), config.input_kind)

    real, _ = seen_by(features, shown(val_set), device)
    known, _ = seen_by(features, shown(train_set), device)
    made, score = seen_by(features, fake.split(args.batch_size), device)
    compare_sets(table, args, features.name, real, made, score)
    # Samples nearer to the training images than held-out images are would be copies.
    distance, index = metrics.nearest(made, known)
    table.mean(f"nearest_training({features.name})", distance)
    table.mean(f"nearest_training_of_held_out({features.name})", metrics.nearest(real, known)[0])
    closest = distance.argsort()[: args.neighbours]
    wanted, found = set(index[closest].tolist()), {}
    for number, image in enumerate(image for batch in shown(train_set) for image in batch):
        if number in wanted:
            found[number] = image
    rows = [fake[closest], torch.stack([found[i] for i in index[closest].tolist()])]
    pictures.save_grid(Path(args.out) / "neighbours.png", rows)
    searched = f"{len(known)} of {len(train_set)} training images"
    print(f"{Path(args.out) / 'neighbours.png'}: the most copied-looking samples over their nearest of {searched}")


def main() -> int:
    args = parse_flags()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("evaluate.py runs in one process: start it by python, not by torchrun")
    device = runtime.pick_device(args.device)
    model = official.open_model(args.vqgan or args.gpt, args.official_config)
    if args.gpt and not isinstance(model, TwoStage):
        raise UserError(f"{args.gpt} holds a VQGAN; evaluate it by --vqgan")
    vqgan = model.vqgan if isinstance(model, TwoStage) else model
    train_set, val_set = open_sets(args, model if args.gpt else vqgan, vqgan)
    side, channels = args.image_size, vqgan.config.in_channels
    number = args.n if args.gpt else 0
    what = f"{number:,} images of {side} x {side}"
    runtime.check_memory(2 * number * channels * side**2, what, "a smaller -n")
    prepare_out(Path(args.out))
    table = Table()
    if args.gpt:
        evaluate_gpt(args, model.to(device), train_set, val_set, device, table)
    else:
        evaluate_reconstructions(args, vqgan.to(device), val_set, device, table)
    out = Path(args.out) / "metrics.json"
    with runtime.written_whole(out, "x") as file:
        json.dump({"flags": vars(args), "metrics": table.rows}, file, indent=2)
    print("\n".join(table.lines()))
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    runtime.run(main)
