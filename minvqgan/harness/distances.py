"""Distances between sets of images, on the features of a network.

One image cannot be called "realistic" by a number, a set can: generated and real images pass through a network that
was trained to tell things apart, and what comes out, (N, d), is compared as two clouds of points.

    frechet_distance    between the Gaussians fitted to both clouds. On InceptionV3's features it is the FID (Heusel et
                        al. 2017, arXiv:1706.08500); on any other network's it is not, and must not be called so.
    inception_score     does every image belong clearly to one class, and all together to many? (Salimans et al. 2016,
                        arXiv:1606.03498)
    precision_recall    which fraction of the generated lies among the real, and of the real among the generated
                        (Kynkäänniemi et al. 2019, arXiv:1904.06991)
    nearest             the training image nearest to each sample: does the model memorise?
"""

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), A and B the covariances of a (N, d) and b (M, d).

    It falls with the number of images: compare only values of equal N. Raises ValueError below two rows.
    """
    if len(a) < 2 or len(b) < 2:
        raise ValueError("a covariance needs at least two images")
    a, b = a.double(), b.double()
    A, B = torch.cov(a.T).view(a.shape[1], -1), torch.cov(b.T).view(b.shape[1], -1)  # (d, d)
    # (A B)^(1/2) has the trace of (A^(1/2) B A^(1/2))^(1/2), which is symmetric: its eigenvalues are real and safe.
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp_min(0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross).item()


def inception_score(probabilities: Tensor) -> float:
    """exp of the mean KL(p(class | image) || p(class)); probabilities (N, classes) -> 1 to the number of classes."""
    p = probabilities.double()
    log_ratio = p.clamp_min(1e-30).log() - p.mean(0).clamp_min(1e-30).log()
    return (p * log_ratio).sum(1).mean().exp().item()


def _distances(a: Tensor, b: Tensor, rows: int = 1000) -> list[Tensor]:
    """|a_i - b_j|, a few rows at a time: N x M numbers need not fit into memory at once."""
    return [torch.cdist(part, b) for part in a.split(rows)]


def _radii(a: Tensor, k: int) -> Tensor:
    """Distance of each point to its k-th nearest neighbour within a, itself not counted: (N,)."""
    return torch.cat([d.topk(k + 1, largest=False).values[:, -1] for d in _distances(a, a)])


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Features real (N, d), fake (M, d) -> (precision, recall).

    A set's manifold is the union of balls around its points, each reaching to its k-th neighbour. Precision: the
    fraction of the fake within the real one; recall: of the real within the fake one. Raises ValueError for up to k
    images.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"more than k = {k} images are needed")

    def fraction_within(points: Tensor, centres: Tensor) -> float:
        radii = _radii(centres, k)
        return torch.cat([(d <= radii).any(1) for d in _distances(points, centres)]).double().mean().item()

    real, fake = real.double(), fake.double()
    return fraction_within(fake, real), fraction_within(real, fake)


def nearest(queries: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, d), (M, d) -> distance (N,) to the nearest reference and its number (N,)."""
    found = [d.min(1) for d in _distances(queries, references)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def spread(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error over images, values (N,)."""
    return values.mean().item(), (values.double().std() / len(values) ** 0.5).item() if len(values) > 1 else 0.0
