"""Held-out quality of a VQGAN, and the networks that judge pictures: LPIPS on VGG16, and a small classifier."""

import pickle
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from tqdm import tqdm

from ..perceptual import LPIPS, VGG16Features
from ..quantizer import codebook_stats
from ..vqgan import VQGAN
from . import checkpoint, data, flags, runtime
from .data import to_input
from .pictures import to_pixels
from .runtime import UserError

# No network, or a file that is broken or of another network.
DOWNLOAD_ERRORS = (OSError, RuntimeError, EOFError, pickle.UnpicklingError)


def psnr(x: Tensor, x_hat: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (B, C, H, W) in [-1, 1] -> (B,): 10 log10(2^2 / mean squared error)."""
    mse = (x - x_hat.clamp(-1, 1)).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / mse.clamp_min(1e-10))


@torch.no_grad()
def evaluate_vqgan(
    model: VQGAN, batches: Iterable[dict], device: torch.device, perceptual: LPIPS | None = None
) -> dict:
    """Held-out metrics, means over the pictures. Leaves the model in the mode it was in.

    images: l1 (on [-1, 1]), psnr (dB), lpips or perceptual (with `perceptual`); label maps: cross_entropy (nats a
    pixel), pixel_accuracy. Both: usage (share of the codes chosen at all) and perplexity of the codebook over all these
    pictures.
    """
    kind, K, training = model.config.input_kind, model.config.codebook_size, model.training
    model.eval()
    counts, sums, n = torch.zeros(K, dtype=torch.long), {}, 0
    for batch in batches:
        x = to_input({k: v.to(device) for k, v in batch.items()}, kind, model.config.in_channels)
        x = x.contiguous(memory_format=torch.channels_last)
        x_hat, quantized = model(x)
        counts += torch.bincount(quantized.indices.flatten().cpu(), minlength=K)
        values = label_metrics(x, x_hat) if kind == "labels" else image_metrics(x, x_hat, perceptual)
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.double().sum().item()
        n += len(x)
    model.train(training)
    usage, perplexity = codebook_stats(counts)
    return {name: total / n for name, total in sums.items()} | {"usage": usage, "perplexity": perplexity}


def image_metrics(x: Tensor, x_hat: Tensor, perceptual: LPIPS | None) -> dict[str, Tensor]:
    """l1, psnr and, with `perceptual`, its distance of images (B, C, H, W) in [-1, 1]: each (B,). Only with the learned
    weights it bears the name lpips."""
    values = {"l1": (x - x_hat).abs().mean((1, 2, 3)), "psnr": psnr(x, x_hat)}
    if perceptual is None:
        return values
    return values | {"perceptual" if perceptual.n_layers is None else "lpips": perceptual(x, x_hat)}


def label_metrics(x: Tensor, logits: Tensor) -> dict[str, Tensor]:
    """cross_entropy and pixel_accuracy of one-hot label maps and their logits (B, C, H, W): each (B,)."""
    labels = x.argmax(1)  # (B, H, W)
    cross_entropy = F.cross_entropy(logits, labels, reduction="none").mean((1, 2))
    return {"cross_entropy": cross_entropy, "pixel_accuracy": (logits.argmax(1) == labels).double().mean((1, 2))}


def ssim(x: Tensor, x_hat: Tensor) -> Tensor:
    """Structural similarity of images (B, C, H, W) in [-1, 1], through torchmetrics: (B,), 1 for equal ones. Raises
    UserError where torchmetrics is not installed."""
    need_torchmetrics()
    from torchmetrics.functional.image import structural_similarity_index_measure

    return structural_similarity_index_measure(x_hat.clamp(-1, 1), x, data_range=2.0, reduction="none")


def need_torchmetrics() -> None:
    if find_spec("torchmetrics") is None or find_spec("torch_fidelity") is None:
        raise UserError('evaluation needs torchmetrics: pip install -e ".[eval]"')


def lpips_weights() -> list[Tensor]:
    """The five learned w_l of LPIPS on VGG16 (version 0.1), from the file inside the installed `lpips` package.

    Read by their own names, strictly: a widely used tutorial asked for others with strict=False and trained with noise.
    """
    spec = find_spec("lpips")  # finds the folder without importing the package, which would load scipy and more
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the package lpips is not installed; its weights are needed for --perceptual vgg16")
    path = Path(spec.submodule_search_locations[0]) / "weights" / "v0.1" / "vgg.pth"
    state = torch.load(path, map_location="cpu", weights_only=True)
    names = [f"lin{i}.model.1.weight" for i in range(5)]
    if state.keys() != set(names):
        raise UserError(f"{path} does not hold the five weights of LPIPS")
    return [state[name].flatten() for name in names]


def vgg16_lpips() -> LPIPS:
    """LPIPS as in the paper. Raises UserError, saying where the file belongs, when VGG16 cannot be downloaded."""
    weights = torchvision.models.VGG16_Weights.IMAGENET1K_V1
    try:
        vgg = torchvision.models.vgg16(weights=weights)
    except DOWNLOAD_ERRORS as error:
        place = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        raise UserError(
            f"the VGG16 weights could not be loaded ({' '.join(str(error).split())[:80]}): "
            f"download {weights.url} to {place}, or train with --perceptual none or --perceptual CLASSIFIER.pt"
        ) from None
    return LPIPS(VGG16Features(vgg.features), lpips_weights())


class Classifier(nn.Module):
    """torchvision's ResNet-18 for small pictures: a 3x3 stem of stride 1 and no pooling keep 32 pixels from vanishing.

    forward: x (B, 3, H, W) in [-1, 1] -> logits (B, number of classes).
    """

    def __init__(self, classes: tuple[str, ...]):
        super().__init__()
        self.classes = tuple(classes)
        self.net = torchvision.models.resnet18(weights=None, num_classes=len(classes))
        self.net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.net.maxpool = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def feature_maps(self, x: Tensor) -> list[Tensor]:
        """The stem's map and those after each of the four stages: 64, 64, 128, 256 and 512 channels."""
        net = self.net
        maps = [net.relu(net.bn1(net.conv1(x)))]
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            maps.append(stage(maps[-1]))
        return maps


class Judge(nn.Module):
    """A network whose features pictures are compared by: x (B, 3, H, W) in [-1, 1] -> (features (B, d), class
    probabilities (B, classes)). `name` stands in the names of the numbers it gives."""

    name = ""


class ClassifierJudge(Judge):
    """A classifier of ours: the mean of its last map, 512 numbers."""

    def __init__(self, classifier: Classifier, name: str):
        super().__init__()
        self.classifier, self.name = classifier, name

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.classifier.feature_maps(x)[-1].mean((2, 3))
        return features, self.classifier.net.fc(features).softmax(1)


class InceptionJudge(Judge):
    """The InceptionV3 on which FID and Inception Score are defined, with torch-fidelity's weights, which are what
    torchmetrics uses too: 2048 features, 1008 classes."""

    name = "inception"

    def __init__(self):
        super().__init__()
        need_torchmetrics()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            self.net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
        except DOWNLOAD_ERRORS as error:
            raise UserError(
                f"the weights of InceptionV3 could not be downloaded ({' '.join(str(error).split())[:80]}): no FID; "
                "--features CLASSIFIER.pt compares by a classifier of minvqgan.harness.metrics instead"
            ) from None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.net(to_pixels(x))
        return features, logits.softmax(1)


def load_features(name: str) -> Judge | None:
    """`inception`, `none`, or the file of a classifier. Raises UserError."""
    if name == "none":
        return None
    if name == "inception":
        return InceptionJudge().eval()
    classifier = load_classifier(name)
    if not isinstance(classifier, Classifier):
        raise UserError(f"--features {name}: only classifiers of minvqgan.harness.metrics, and inception")
    return ClassifierJudge(classifier, Path(name).stem).eval()


class ClassifierFeatures(nn.Module):
    """A classifier as the feature network of `LPIPS`."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.classifier.feature_maps(x)


class TorchvisionClassifier(nn.Module):
    """A torchvision classifier with ImageNet weights, for pictures in [-1, 1]: scaled and normalised as in training."""

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
    """The classifier that `python -m minvqgan.harness.metrics` wrote, or torchvision's of this name, in eval mode. It
    has `classes`, names by number. Raises UserError."""
    if str(name) in torchvision.models.list_models(module=torchvision.models):
        return TorchvisionClassifier(str(name)).eval()
    content = checkpoint.read(name, "classifier", needs={"classes": list, "model": dict})
    model = Classifier(tuple(content["classes"]))
    checkpoint.fill(model, content["model"], name)
    return model.eval()


def match_classes(known: tuple[str, ...], asked: tuple[str, ...]) -> list[int]:
    """For each class of a model its number in a classifier: by name, or by place where both have equally many. Raises
    UserError for a class that the classifier does not know."""
    if set(asked) <= set(known):
        return [known.index(name) for name in asked]
    if len(known) == len(asked):
        return list(range(len(asked)))
    missing = next(name for name in asked if name not in known)
    raise UserError(f"the classifier does not know the class {missing!r} ({', '.join(known[:10])})")


def blurred(x: Tensor, share: float = 0.5) -> Tensor:
    """x (B, 3, H, W) with a share of the pictures blurred a little and made a little noisy: what a decoder gives back
    is never quite as crisp as a photo, and a classifier that knows crisp edges only would blame the model for it."""
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    strength = torch.rand(len(x), 1, 1, 1, device=x.device) * (torch.rand(len(x), 1, 1, 1, device=x.device) < share)
    return x + strength * (soft - x) + 0.05 * strength * torch.randn_like(x)


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[dict], device: torch.device) -> float:
    """Share of pictures whose class the classifier names."""
    right = [(model(b["image"].to(device)).argmax(1) == b["class"].to(device)).float() for b in batches]
    return torch.cat(right).mean().item()


def train_classifier() -> int:
    """python -m minvqgan.harness.metrics --data shapes --out runs/classifier.pt"""
    p = flags.Parser(prog="python -m minvqgan.harness.metrics", description="Train the classifier that judges samples.")
    p.add_argument("--data", default="shapes", help="as in train_vqgan.py; it must have classes")
    p.add_argument("--out", default="runs/classifier.pt", help="file to write")
    p.add_argument("--image-size", type=flags.positive, default=32, help="side of the pictures")
    p.add_argument("--steps", type=flags.positive, default=600, help="optimizer steps")
    p.add_argument("--batch-size", type=flags.positive, default=32, help="pictures a step")
    p.add_argument("--lr", type=flags.rate, default=1e-3, help="highest learning rate of AdamW, one cycle")
    p.add_argument("--seed", type=flags.natural, default=0, help="of the weights and the data order")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    args = p.parse_args()
    device = runtime.pick_device(args.device)
    train_set, val_set = data.open_data(args.data, args.image_size, seed=args.seed)
    if len(train_set.classes) < 2:
        raise UserError(f"{args.data} has no classes (subfolders)")
    torch.manual_seed(args.seed)
    model = Classifier(train_set.classes).to(device, memory_format=torch.channels_last)
    opt = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, args.lr, total_steps=args.steps)
    batches = data.train_loader(train_set, args.batch_size, args.seed, 0, workers=0)
    bar = tqdm(range(args.steps), dynamic_ncols=True)
    for _ in bar:
        batch = next(batches)
        loss = F.cross_entropy(model(blurred(batch["image"].to(device))), batch["class"].to(device))
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    share = accuracy(model.eval(), data.held_out_batches(val_set, 100, 2000), device)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(args.out, "classifier", classes=list(train_set.classes), model=model.state_dict(), accuracy=share)
    print(f"{share:.1%} of the held-out pictures recognised: {args.out}")
    return 0


def load_perceptual(name: str, image_size: int) -> LPIPS | None:
    """`vgg16` as in the paper, `none`, or the file of a classifier, whose layers then count alike. Raises UserError."""
    if name == "none":
        return None
    if name == "vgg16" and image_size < 16:
        raise UserError(f"VGG16 halves pictures four times, and {image_size} pixels are too few; --perceptual none")
    return vgg16_lpips() if name == "vgg16" else LPIPS(ClassifierFeatures(load_classifier(name)))


if __name__ == "__main__":
    runtime.run(train_classifier)
