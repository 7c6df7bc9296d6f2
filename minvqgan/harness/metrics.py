"""Held-out quality of a VQGAN, and the networks that judge pictures: LPIPS on VGG16, and a small classifier."""

import pickle
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from ..perceptual import LPIPS, VGG16Features
from ..quantizer import codebook_stats
from ..vqgan import VQGAN
from . import checkpoint
from .data import to_input
from .runtime import UserError


def psnr(x: Tensor, x_hat: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (B, C, H, W) in [-1, 1] -> (B,): 10 log10(2^2 / mean squared error)."""
    mse = (x - x_hat.clamp(-1, 1)).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / mse.clamp_min(1e-10))


@torch.no_grad()
def evaluate_vqgan(
    model: VQGAN, batches: Iterable[dict], device: torch.device, perceptual: LPIPS | None = None
) -> dict:
    """Held-out metrics, means over the pictures. Leaves the model in the mode it was in.

    images: l1 (on [-1, 1]), psnr (dB), lpips (with `perceptual`); label maps: cross_entropy (nats a pixel),
    pixel_accuracy. Both: usage (share of the codes chosen at all) and perplexity of the codebook over all these
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
        values = _label_metrics(x, x_hat) if kind == "labels" else _image_metrics(x, x_hat, perceptual)
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.double().sum().item()
        n += len(x)
    model.train(training)
    usage, perplexity = codebook_stats(counts)
    return {name: total / n for name, total in sums.items()} | {"usage": usage, "perplexity": perplexity}


def _image_metrics(x: Tensor, x_hat: Tensor, perceptual: LPIPS | None) -> dict[str, Tensor]:
    values = {"l1": (x - x_hat).abs().mean((1, 2, 3)), "psnr": psnr(x, x_hat)}
    return values | ({"lpips": perceptual(x, x_hat)} if perceptual is not None else {})


def _label_metrics(x: Tensor, logits: Tensor) -> dict[str, Tensor]:
    labels = x.argmax(1)  # (B, H, W)
    cross_entropy = F.cross_entropy(logits, labels, reduction="none").mean((1, 2))
    return {"cross_entropy": cross_entropy, "pixel_accuracy": (logits.argmax(1) == labels).double().mean((1, 2))}


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
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:  # no network; a broken or other file
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


class ClassifierFeatures(nn.Module):
    """A classifier as the feature network of `LPIPS`."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.classifier.feature_maps(x)


def load_classifier(path: str | Path) -> Classifier:
    """The classifier that `python -m minvqgan.harness.metrics` wrote, in eval mode. Raises UserError."""
    content = checkpoint.read(path, "classifier")
    model = Classifier(tuple(content.get("classes", ())))
    checkpoint.fill(model, content.get("model", {}), path)
    return model.eval()


def load_perceptual(name: str) -> LPIPS | None:
    """`vgg16` as in the paper, `none`, or the file of a classifier, whose layers then count alike."""
    if name == "none":
        return None
    return vgg16_lpips() if name == "vgg16" else LPIPS(ClassifierFeatures(load_classifier(name)))
