"""Held-out quality of a VQGAN, and the networks it is judged by: the perceptual distance, InceptionV3, classifiers."""

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from ..perceptual import LPIPS, VGG16Features
from ..quantizer import codebook_stats
from ..vqgan import VQGAN
from .classifier import DOWNLOAD_ERRORS, Classifier, load_classifier
from .data import to_input
from .pictures import to_pixels
from .runtime import UserError

# The perceptual network that comes with the package. weights/README.md says how it was made.
SMALL = Path(__file__).parent.parent / "weights" / "small.pt"


def psnr(x: Tensor, x_hat: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (B, C, H, W) in [-1, 1] -> (B,): 10 log10(2^2 / mean squared error)."""
    mse = (x - x_hat.clamp(-1, 1)).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / mse.clamp_min(1e-10))


@torch.no_grad()
def evaluate_vqgan(
    model: VQGAN, batches: Iterable[dict], device: torch.device, perceptual: LPIPS | None = None
) -> dict:
    """Held-out metrics, means over the images. Leaves the model in the mode it was in.

    images: l1 (on [-1, 1]), psnr (dB), lpips or perceptual (with `perceptual`); label maps: cross_entropy (nats a
    pixel), pixel_accuracy. Both: usage (fraction of the codes chosen at all) and perplexity of the codebook over all
    these images.
    """
    training, counts, sums, n = model.training, torch.zeros(model.config.codebook_size, dtype=torch.long), {}, 0
    for x, _, indices, values in reconstructions(model, batches, device, perceptual):
        counts += torch.bincount(indices.flatten().cpu(), minlength=len(counts))
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.sum().item()
        n += len(x)
    model.train(training)
    usage, perplexity = codebook_stats(counts)
    return {name: total / n for name, total in sums.items()} | {"usage": usage, "perplexity": perplexity}


@torch.no_grad()
def reconstructions(
    model: VQGAN, batches: Iterable[dict], device: torch.device, perceptual: LPIPS | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]]:
    """(x, x_hat, indices (B, h, w), values of each image (B,) by name) of each batch, the model in eval mode."""
    kind = model.config.input_kind
    model.eval()
    for batch in batches:
        x = to_input({k: v.to(device) for k, v in batch.items()}, kind, model.config.in_channels)
        x = x.contiguous(memory_format=torch.channels_last)
        x_hat, quantized = model(x)
        values = label_metrics(x, x_hat) if kind == "labels" else image_metrics(x, x_hat, perceptual)
        yield x, x_hat, quantized.indices, values


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
    return {"cross_entropy": cross_entropy, "pixel_accuracy": (logits.argmax(1) == labels).float().mean((1, 2))}


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
            f"download {weights.url} to {place}, or train with --perceptual small"
        ) from None
    return LPIPS(VGG16Features(vgg.features), lpips_weights())


class Judge(nn.Module):
    """A network whose features images are compared by: x (B, 3, H, W) in [-1, 1] -> (features (B, d), class
    probabilities (B, classes)). `name` stands in the names of the numbers it gives."""

    name = ""


class ClassifierJudge(Judge):
    """A classifier of ours: the mean of its last map, 128 numbers."""

    def __init__(self, classifier: Classifier, name: str):
        super().__init__()
        self.classifier, self.name = classifier, name

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.classifier.embed(x)
        return features, self.classifier.head(features).softmax(1)


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
                "--features CLASSIFIER.pt compares by a classifier of minvqgan.harness.classifier instead"
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
        raise UserError(f"--features {name}: only classifiers of minvqgan.harness.classifier, and inception")
    return ClassifierJudge(classifier, Path(name).stem).eval()


def load_perceptual(name: str, image_size: int) -> LPIPS | None:
    """The perceptual distance on `small`, the network that comes with the package, on `vgg16` as in the paper, on the
    file of a classifier, or None for `none`. Only on VGG16 the weights w_l are learned. Raises UserError."""
    if name == "none":
        return None
    if name == "vgg16":
        if image_size < 16:
            raise UserError(f"VGG16 halves images four times, and {image_size} pixels are too few; --perceptual small")
        return vgg16_lpips()
    classifier = load_classifier(SMALL if name == "small" else name)
    if not isinstance(classifier, Classifier):
        raise UserError(f"--perceptual {name}: small, vgg16, none, or the file of a classifier")
    if classifier.network == "small":
        classifier.features.fold_batch_norm()
    return LPIPS(classifier.features)
