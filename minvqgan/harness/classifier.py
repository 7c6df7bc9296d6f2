"""Classifiers: networks that tell images apart, trained here in minutes, and torchvision's.

    python -m minvqgan.harness.classifier --data cifar10 --out runs/judge.pt

A classifier serves as a judge (its features compare sets of images, its classes reject samples) or as the perceptual
network of a training. One network must not do both: a model trained to please a network pleases it as a judge too. So
there are two families. `residual` is for judges, trained on sharp images only: one that has seen blurred ones forgives
blur. `small` is the perceptual network that comes with the package. With `--task rotations` a network learns how far an
image was turned (Gidaris et al. 2018, arXiv:1803.07728) and never sees a class.
"""

import argparse
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from tqdm import tqdm

from ..perceptual import SmallFeatures
from . import checkpoint, data, flags, runtime
from .runtime import UserError

# No network, or a file that is broken or of another network.
DOWNLOAD_ERRORS = (OSError, RuntimeError, EOFError, pickle.UnpicklingError)

ROTATIONS = ("0", "90", "180", "270")


class ResidualBlock(nn.Module):
    """x + f(x), f: (BatchNorm, GELU, 3x3 convolution) twice."""

    def __init__(self, channels: int):
        super().__init__()
        layers = []
        for _ in range(2):
            conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            layers += [nn.BatchNorm2d(channels), nn.GELU(), conv]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class ResidualFeatures(nn.Module):
    """x (B, 3, H, W) in [-1, 1] -> three feature maps: 32, 64, 128 channels at 1, 1/2, 1/4 of the resolution."""

    def __init__(self, channels: tuple[int, ...] = (32, 64, 128), blocks: tuple[int, ...] = (1, 2, 2)):
        super().__init__()
        self.stages = nn.ModuleList()
        c_in = 3
        for i, (c, n) in enumerate(zip(channels, blocks, strict=True)):
            first = nn.Conv2d(c_in, c, 3, stride=1 if i == 0 else 2, padding=1)
            middle = (ResidualBlock(c) for _ in range(n))
            self.stages.append(nn.Sequential(first, *middle, nn.BatchNorm2d(c), nn.GELU()))
            c_in = c

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

    def embed(self, x: Tensor) -> Tensor:
        """(B, 128): what the network knows of the image, before it decides for a class."""
        return self.features(x)[-1].mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


class TorchvisionClassifier(nn.Module):
    """A torchvision classifier with ImageNet weights, for images in [-1, 1]: scaled and normalised as in training."""

    def __init__(self, name: str):
        super().__init__()
        weights = torchvision.models.get_model_weights(name).DEFAULT
        try:
            self.net = torchvision.models.get_model(name, weights=weights)
        except DOWNLOAD_ERRORS as error:
            raise UserError(f"the weights of {name} could not be downloaded ({error}): {weights.url}") from None
        self.classes, self.preprocess = tuple(weights.meta["categories"]), weights.transforms()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.preprocess((x.clamp(-1, 1) + 1) / 2))


def load_classifier(name: str | Path) -> Classifier | TorchvisionClassifier:
    """The classifier of a file that `save_classifier` wrote, or torchvision's of this name, in eval mode. Raises
    UserError."""
    if str(name) in torchvision.models.list_models(module=torchvision.models):
        return TorchvisionClassifier(str(name)).eval()
    content = checkpoint.read(name, "classifier")
    if content["network"] not in NETWORKS:
        raise UserError(f"{name} holds a network unknown here: {content['network'][:40]!r}")
    model = Classifier(tuple(content["classes"]), content["network"])
    checkpoint.fill(model, content["model"], name)
    return model.eval()


def save_classifier(path: str | Path, model: Classifier, **more) -> None:
    """Write a file for `load_classifier`, in 16 bits: what is left out moves features by less than a thousandth."""
    state = {name: t.half() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    checkpoint.save(path, "classifier", classes=list(model.classes), network=model.network, model=state, **more)


def match_classes(known: tuple[str, ...], asked: tuple[str, ...]) -> list[int]:
    """For each class of a model its number in a classifier: by name, or by place where both have equally many and no
    name in common, as with numbers for names. Raises UserError for a class that the classifier does not know."""
    if set(asked) <= set(known):
        return [known.index(name) for name in asked]
    if len(known) == len(asked) and not set(known) & set(asked):
        return list(range(len(asked)))
    missing = next(name for name in asked if name not in known)
    raise UserError(f"the classifier does not know the class {missing!r} ({', '.join(known[:10])})")


def shifted(x: Tensor) -> Tensor:
    """x (B, C, H, W), each image moved by up to an eighth of its side; what comes in at the border is its mirror."""
    H, W = x.shape[2:]
    most = min(H, W) // 8
    wide = F.pad(x, (most,) * 4, mode="reflect")
    places = torch.randint(0, 2 * most + 1, (len(x), 2)).tolist()
    return torch.stack([wide[i, :, top : top + H, left : left + W] for i, (top, left) in enumerate(places)])


def turned(x: Tensor, quarters: Tensor) -> Tensor:
    """x (B, C, S, S), each image turned by its number of quarters (B,)."""
    return torch.stack([torch.rot90(image, int(k), (1, 2)) for image, k in zip(x, quarters, strict=True)])


def task_of(batch: dict, rotations: bool) -> tuple[Tensor, Tensor]:
    """A batch of a dataset -> images (B, 3, S, S) and what to tell of them (B,): their classes or their rotations."""
    if not rotations:
        return batch["image"], batch["class"]
    quarters = torch.randint(0, 4, batch["class"].shape)
    return turned(batch["image"], quarters), quarters


@torch.no_grad()
def accuracy(model: nn.Module, pairs: Iterator[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """Fraction of the images of which the model says what is true."""
    right = [(model(x.to(device)).argmax(1).cpu() == true).float() for x, true in pairs]
    return torch.cat(right).mean().item()


def parse_flags():
    p = flags.Parser(prog="python -m minvqgan.harness.classifier", description=__doc__)
    p.add_argument("--data", default="shapes", help="as in train_vqgan.py")
    p.add_argument("--out", default="runs/classifier.pt", help="file to write")
    p.add_argument("--task", choices=["classes", "rotations"], default="classes", help="what is told apart")
    p.add_argument("--network", choices=NETWORKS, default="residual", help="residual: a judge, small: perceptual")
    p.add_argument("--image-size", type=flags.size, default=32, help="side of the images")
    p.add_argument("--steps", type=flags.positive, default=600, help="optimizer steps")
    p.add_argument("--batch-size", type=flags.positive, default=64, help="images a step")
    p.add_argument("--lr", type=flags.rate, default=2e-3, help="highest learning rate of AdamW, one cycle")
    p.add_argument("--seed", type=flags.seed, default=0, help="of the weights and the data order")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    p.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 (where it is faster)")
    return p.parse_args()


def main() -> int:
    args = parse_flags()
    device, rotations = runtime.pick_device(args.device), args.task == "rotations"
    if Path(args.out).exists():
        try:
            checkpoint.read(args.out, "classifier")
        except UserError as error:
            raise UserError(f"--out would write over a file that is no classifier: {error}") from None
    train_set, val_set = data.open_data(args.data, args.image_size, seed=args.seed)
    classes = ROTATIONS if rotations else train_set.classes
    if len(classes) < 2:
        raise UserError(f"{args.data} has no classes (subfolders); --task rotations needs none")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)  # before the training, which a wrong name would waste
    amp = runtime.pick_amp(args.amp, device)
    torch.manual_seed(args.seed)
    model = Classifier(classes, args.network).to(device, memory_format=torch.channels_last)
    opt = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, args.lr, total_steps=args.steps)
    batches = data.train_loader(train_set, args.batch_size, args.seed, 0, workers=0)
    bar = tqdm(range(args.steps), dynamic_ncols=True)
    for _ in bar:
        x, true = task_of(next(batches), rotations)
        x = shifted(x).to(device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), true.to(device))
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    held_out = (task_of(batch, rotations) for batch in data.held_out_batches(val_set, 100, 5000))
    right = accuracy(model.eval(), held_out, device)
    save_classifier(args.out, model, accuracy=right, flags=vars(args))
    print(f"{right:.1%} of the held-out images recognised: {args.out}")
    return 0


if __name__ == "__main__":
    runtime.run(main)
