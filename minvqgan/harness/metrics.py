"""Numbers: how close a reconstruction is to its image, and how close a set of images is to another.

No number can say whether one image is realistic, but a set of images can be compared with another: both pass through a
judge (judges.py), and its features, (N, d) and (M, d), are compared as two clouds of points.

    frechet_distance    between the Gaussians fitted to both clouds. On InceptionV3's features this is the FID (Heusel
                        et al. 2017, arXiv:1706.08500); on those of any other network it must not be called so.
    inception_score     does each image clearly belong to one class, and do all together cover many? (Salimans et al.
                        2016, arXiv:1606.03498)
    precision_recall    which fraction of the fake images lies among the real ones, and vice versa (Kynkäänniemi et al.
                        2019, arXiv:1904.06991)
    nearest             the training image nearest to each sample: does the model memorise?
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..perceptual import LPIPS
from ..quantizer import codebook_stats
from ..vqgan import VQGAN
from .data import to_input

BLOCK = 2**24  # distances computed at a time: 128 MB, however many images there are


def psnr(x: Tensor, x_hat: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (B, C, H, W) in [-1, 1] -> (B,): 10 log10(2^2 / mean squared error)."""
    mse = (x - x_hat.clamp(-1, 1)).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / mse.clamp_min(1e-10))


def ssim(x: Tensor, x_hat: Tensor) -> Tensor:
    """Structural similarity of images (B, C, H, W) in [-1, 1]: (B,), 1 for equal images."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    return structural_similarity_index_measure(x_hat.clamp(-1, 1), x, data_range=2.0, reduction="none")


def image_metrics(x: Tensor, x_hat: Tensor, perceptual: LPIPS | None) -> dict[str, Tensor]:
    """l1, psnr and the perceptual distance of images (B, C, H, W) in [-1, 1], each (B,). The distance is called lpips
    only if the network has the learned weights."""
    values = {"l1": (x - x_hat).abs().mean((1, 2, 3)), "psnr": psnr(x, x_hat)}
    if perceptual is None:
        return values
    return values | {"perceptual" if perceptual.n_layers is None else "lpips": perceptual(x, x_hat)}


def label_metrics(x: Tensor, logits: Tensor) -> dict[str, Tensor]:
    """cross_entropy (nats per pixel) and pixel_accuracy of one-hot label maps and their logits (B, C, H, W): each
    (B,)."""
    labels = x.argmax(1)  # (B, H, W)
    cross_entropy = F.cross_entropy(logits, labels, reduction="none").mean((1, 2))
    return {"cross_entropy": cross_entropy, "pixel_accuracy": (logits.argmax(1) == labels).float().mean((1, 2))}


@torch.no_grad()
def measure_vqgan(
    model: VQGAN, batches: Iterable[dict], device: torch.device, perceptual: LPIPS | None = None, more=None
) -> tuple[dict[str, Tensor], Tensor]:
    """(`image_metrics` or `label_metrics` of each image, (N,) by name; how often each code was chosen, (K,)), on the
    CPU. more: a function of x and x_hat that gives further numbers or features of each image. Leaves the model in the
    mode it was in."""
    training, kind, rows = model.training, model.config.input_kind, []
    counts = torch.zeros(model.config.codebook_size, dtype=torch.long)
    model.eval()
    for batch in batches:
        x = to_input({k: v.to(device) for k, v in batch.items()}, kind, model.config.in_channels)
        x = x.contiguous(memory_format=torch.channels_last)
        x_hat, quantized = model(x)
        row = label_metrics(x, x_hat) if kind == "labels" else image_metrics(x, x_hat, perceptual)
        row |= more(x, x_hat) if more else {}
        rows.append({name: value.cpu() for name, value in row.items()})
        counts += torch.bincount(quantized.indices.flatten().cpu(), minlength=len(counts))
    model.train(training)
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}, counts


def evaluate_vqgan(
    model: VQGAN, batches: Iterable[dict], device: torch.device, perceptual: LPIPS | None = None
) -> dict[str, float]:
    """Held-out metrics of a first-stage model as means over the images, usage (fraction of the codes used at all) and
    perplexity of the codebook."""
    values, counts = measure_vqgan(model, batches, device, perceptual)
    usage, perplexity = codebook_stats(counts)
    return {name: value.mean().item() for name, value in values.items()} | {"usage": usage, "perplexity": perplexity}


def spread(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error over images, values (N,)."""
    return values.mean().item(), (values.double().std() / len(values) ** 0.5).item() if len(values) > 1 else 0.0


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of features (N, d), in float64 without a copy of all of them."""
    mean = features.mean(0, dtype=torch.float64)
    parts = (part.double() - mean for part in features.split(4096))
    return mean, sum(part.T @ part for part in parts) / (len(features) - 1)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), A and B the covariances of a (N, d) and b (M, d).

    It falls as the number of images grows: compare only values of equal N. At least two rows each.
    """
    (mean_a, A), (mean_b, B) = _gaussian(a), _gaussian(b)
    # (A B)^(1/2) has the trace of (A^(1/2) B A^(1/2))^(1/2). That one is symmetric, so its eigenvalues are real.
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp_min(0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + A.trace() + B.trace() - 2 * cross).item()


def inception_score(probabilities: Tensor) -> float:
    """exp of the mean KL(p(class | image) || p(class)); probabilities (N, classes) -> 1 to the number of classes."""
    p = probabilities.double()
    log_ratio = p.clamp_min(1e-30).log() - p.mean(0).clamp_min(1e-30).log()
    return (p * log_ratio).sum(1).mean().exp().item()


def _distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """|a_i - b_j| in float64, a few rows at a time: N x M distances need not fit into memory."""
    b = b.double()
    for part in a.split(max(1, BLOCK // len(b))):
        yield torch.cdist(part.double(), b)


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Features real (N, d), fake (M, d) -> (precision, recall).

    A set covers the balls around its points, each reaching to the point's k-th neighbour. Precision: the fraction of
    the fake points that the real set covers; recall: of the real points that the fake set covers. At least k + 1 rows
    each.
    """

    def fraction_covered(points: Tensor, centres: Tensor) -> float:
        # k + 1, because the nearest neighbour of a point is the point itself.
        radii = torch.cat([d.topk(k + 1, largest=False).values[:, -1] for d in _distances(centres, centres)])
        return torch.cat([(d <= radii).any(1) for d in _distances(points, centres)]).double().mean().item()

    return fraction_covered(fake, real), fraction_covered(real, fake)


def nearest(queries: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, d), (M, d) -> distance (N,) to the nearest reference and its number (N,)."""
    distances, numbers = zip(*(d.min(1) for d in _distances(queries, references)), strict=True)
    return torch.cat(distances).float(), torch.cat(numbers)
