"""Judges: networks that look at images, trained here in minutes or downloaded.

    python -m minvqgan.harness.judges --data cifar10 --out runs/judge.pt

A classifier is used in two ways: as a judge (its features compare sets of images, its classes reject samples) or as the
perceptual network of a training. One network must not be both, because a model trained to please a network also
pleases it as a judge. So there are two families: `residual` for judges, trained on sharp images only, because a judge
that has seen blurred images forgives blur; and `small`, the perceptual network that comes with the package. With
`--task rotations` a network learns by how much an image was turned (Gidaris et al. 2018, arXiv:1803.07728) and never
sees a class.
"""

import argparse
import contextlib
import pickle
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..perceptual import LPIPS, SmallFeatures, VGG16Features
from . import checkpoint, data, flags, runtime
from .pictures import to_pixels
from .runtime import UserError

# The perceptual network that comes with the package. weights/README.md says how it was made.
SMALL = Path(__file__).parent.parent / "weights" / "small.pt"
ROTATIONS = ("0", "90", "180", "270")


class ResidualBlock(nn.Module):
    """x + f(x), f: (BatchNorm, GELU, 3x3 convolution) twice."""

    def __init__(self, c: int):
        super().__init__()
        first, second = (nn.Conv2d(c, c, 3, padding=1, bias=False) for _ in range(2))
        self.layers = nn.Sequential(nn.BatchNorm2d(c), nn.GELU(), first, nn.BatchNorm2d(c), nn.GELU(), second)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class ResidualFeatures(nn.Module):
    """x (B, 3, H, W) in [-1, 1] -> three feature maps: 32, 64, 128 channels at 1, 1/2, 1/4 of the resolution."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList()
        for c_in, c, stride, blocks in ((3, 32, 1, 1), (32, 64, 2, 2), (64, 128, 2, 2)):
            layers = [nn.Conv2d(c_in, c, 3, stride, padding=1), *(ResidualBlock(c) for _ in range(blocks))]
            self.stages.append(nn.Sequential(*layers, nn.BatchNorm2d(c), nn.GELU()))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for stage in self.stages:
            x = stage(x)  # (B, C_l, H_l, W_l)
            features.append(x)
        return features


NETWORKS = {"residual": ResidualFeatures, "small": SmallFeatures}


class Classifier(nn.Module):
    """x (B, 3, H, W) in [-1, 1] -> logits (B, number of classes): the mean of the last feature map, then one layer."""

    def __init__(self, classes: tuple[str, ...], network: str = "residual"):
        super().__init__()
        self.classes, self.network = tuple(classes), network
        self.features = NETWORKS[network]()
        self.head = nn.Linear(128, len(classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.features_and_logits(x)[1]

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)[-1].mean((2, 3))  # (B, 128)
        return features, self.head(features)


class Judge(nn.Module):
    """What images are compared by: x (B, 3, H, W) in [-1, 1] -> features (B, d), class probabilities (B, classes).

    net: a classifier of ours (d = 128) or the InceptionV3 that FID and Inception Score are defined on (d = 2048, 1008
    classes). The metrics bear the judge's name.
    """

    def __init__(self, name: str, net: nn.Module):
        super().__init__()
        self.name, self.net = name, net

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ours = isinstance(self.net, Classifier)
        features, logits = self.net.features_and_logits(x) if ours else self.net(to_pixels(x))
        return features, logits.softmax(1)


@torch.no_grad()
def features_of(judge: nn.Module, batches: Iterable[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """(features (N, d), class probabilities (N, classes)) of batches of images (B, 3, H, W) in [-1, 1], on the CPU."""
    found = [tuple(t.cpu() for t in judge(x.to(device).clamp(-1, 1))) for x in batches]
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


@contextlib.contextmanager
def downloading(what: str, url: str, otherwise: str) -> Iterator[None]:
    """Turns what a download or a broken file raises into one line that says where the file belongs."""
    try:
        yield
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        place = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
        problem = f"the weights of {what} could not be loaded ({runtime.first_line(error)[:80]})"
        raise UserError(f"{problem}: download {url} to {place}, or {otherwise}") from None


def load_classifier(path: str | Path) -> Classifier:
    """The classifier of a file that `save_classifier` wrote, in eval mode. Raises UserError."""
    content = checkpoint.read(path, "classifier")
    with checkpoint.door(path):
        model = Classifier(tuple(content["classes"]), content["network"])
        model.load_state_dict(content["model"])
    return model.eval()


def save_classifier(path: str | Path, model: Classifier, **more) -> None:
    """Write a file for `load_classifier`, in 16 bits: rounding moves features by less than a thousandth."""
    state = {name: t.half() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    checkpoint.save(path, "classifier", classes=list(model.classes), network=model.network, model=state, **more)


def load_features(name: str) -> Judge | None:
    """`inception`, `none`, or the file of a classifier. Raises UserError."""
    if name == "none":
        return None
    if name != "inception":
        return Judge(Path(name).stem, load_classifier(name)).eval()
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    with downloading("InceptionV3", URL_INCEPTION_V3, "give a classifier: --features FILE"):
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    return Judge(name, net).eval()


def lpips_weights() -> list[Tensor]:
    """The five learned w_l of LPIPS on VGG16 (version 0.1), from the file inside the `lpips` package.

    The names are checked: a widely used tutorial loaded other names with strict=False and trained on noise.
    """
    folder = find_spec("lpips").submodule_search_locations[0]  # not an import, which would load scipy and more
    path = Path(folder) / "weights" / "v0.1" / "vgg.pth"
    state = torch.load(path, map_location="cpu", weights_only=True)
    names = [f"lin{i}.model.1.weight" for i in range(5)]
    if state.keys() != set(names):
        raise UserError(f"{path} does not hold the five weights of LPIPS")
    return [state[name].flatten() for name in names]


def load_perceptual(name: str, image_size: int) -> LPIPS | None:
    """The perceptual distance on `small`, the network that comes with the package, on `vgg16` as in the paper, on the
    file of a classifier, or None for `none`. Only VGG16 has learned weights w_l. Raises UserError."""
    if name == "none":
        return None
    if name == "vgg16":
        if image_size < 16:
            raise UserError(f"VGG16 needs sides of 16; {image_size} pixels are too few, use --perceptual small")
        from torchvision.models import VGG16_Weights, vgg16

        weights = VGG16_Weights.IMAGENET1K_V1
        with downloading("VGG16", weights.url, "train with --perceptual small"):
            return LPIPS(VGG16Features(vgg16(weights=weights).features), lpips_weights())
    classifier = load_classifier(SMALL if name == "small" else name)
    if classifier.network == "small":
        classifier.features.fold_batch_norm()
    return LPIPS(classifier.features)


def match_classes(known: tuple[str, ...], asked: tuple[str, ...]) -> list[int]:
    """The number that each class of a model has in a classifier. Raises UserError for one that it does not know."""
    for name in asked:
        if name not in known:
            raise UserError(f"the classifier does not know the class {name!r} ({', '.join(known[:10])})")
    return [known.index(name) for name in asked]


def task_of(batch: dict, rotations: bool) -> tuple[Tensor, Tensor]:
    """A batch of a dataset -> images (B, 3, S, S) and their labels (B,): classes, or by how many quarters each is
    turned here."""
    if not rotations:
        return batch["image"], batch["class"]
    quarters = torch.randint(0, 4, batch["class"].shape)
    pairs = zip(batch["image"], quarters.tolist(), strict=True)
    return torch.stack([torch.rot90(image, k, (1, 2)) for image, k in pairs]), quarters


def main(argv: list[str] | None = None) -> int:
    from torchvision.transforms.v2 import RandomCrop

    p = flags.Parser(prog="python -m minvqgan.harness.judges", description=__doc__)
    p.add_argument("--data", default="shapes", help="as in train_vqgan.py")
    p.add_argument("--out", default="runs/classifier.pt", help="file to write")
    p.add_argument("--task", choices=["classes", "rotations"], default="classes", help="what to predict")
    p.add_argument("--network", choices=NETWORKS, default="residual", help="residual: a judge, small: perceptual")
    p.add_argument("--image-size", type=flags.size, default=32, help="side of the images")
    p.add_argument("--resize", type=flags.size, help="scale the shorter side to this, then crop (--image-size)")
    p.add_argument("--steps", type=flags.positive, default=600, help="optimizer steps")
    p.add_argument("--batch-size", type=flags.positive, default=64, help="images per step")
    p.add_argument("--lr", type=flags.rate, default=2e-3, help="highest learning rate of AdamW, one cycle")
    p.add_argument("--seed", type=flags.seed, default=0, help="of the weights and the data order")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    p.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 (where it is faster)")
    args = p.parse_args(argv)
    device, rotations, out = runtime.pick_device(args.device), args.task == "rotations", Path(args.out)
    if out.exists():
        checkpoint.read(out, "classifier")  # raises: nothing but a classifier is overwritten
    train_set, val_set = data.open_data(args.data, args.image_size, args.resize, seed=args.seed)
    classes = ROTATIONS if rotations else train_set.classes
    if len(classes) < 2:
        raise UserError(f"{args.data} has fewer than two classes (subfolders with images); --task rotations needs none")
    out.parent.mkdir(parents=True, exist_ok=True)  # a wrong name must not cost a training
    amp = runtime.pick_amp(args.amp, device)
    torch.manual_seed(args.seed)
    model = Classifier(classes, args.network).to(device, memory_format=torch.channels_last)
    opt = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, args.lr, total_steps=args.steps)
    # Moves an image by up to an eighth of its side, continued by its mirror image.
    shift = RandomCrop(args.image_size, padding=args.image_size // 8, padding_mode="reflect")
    batches = data.train_loader(train_set, args.batch_size, args.seed, 0, workers=0)
    bar = runtime.progress_bar(0, range(args.steps))
    for _ in bar:
        x, label = task_of(next(batches), rotations)
        x = torch.stack([shift(image) for image in x]).to(device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), label.to(device))
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
    pairs = (task_of(batch, rotations) for batch in data.held_out_batches(val_set, 100, 5000))
    with torch.no_grad():
        right = torch.cat([model(x.to(device)).argmax(1).cpu() == label for x, label in pairs]).double().mean().item()
    save_classifier(out, model, accuracy=right, flags=vars(args))
    print(f"{right:.1%} of the held-out images recognised: {out}")
    return 0


if __name__ == "__main__":
    runtime.run(main)
