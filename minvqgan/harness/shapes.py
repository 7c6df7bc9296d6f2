"""`shapes`: procedural images to train on, without files or downloads.

Each image shows a horizon between a sky and a ground, one large object of six kinds and eight colours, and sometimes a
sun. The object is lit from the sun's side and its shadow falls to the other side, so no single patch tells whether an
image is right: that is what stage two has to learn. Each image comes with its class (the object's kind), a label map
and a depth map, can be drawn at any size, and depends on (seed, index) alone.

Coordinates: x to the right, y downwards, both in [-1, 1] over the image.
"""

import numpy as np

KINDS = ("disc", "square", "triangle", "star", "ring", "cross")
LABELS = ("sky", "ground", "sun", *KINDS)


def _colours(text: str) -> np.ndarray:
    return np.array([list(bytes.fromhex(colour)) for colour in text.split()]) / 255  # (n, 3)


SKIES = _colours("abd4ed f4d6be cec4e8 bee2d6")
GROUNDS = _colours("769260 b0946a 6e768c d6cab2")
COLOURS = _colours("d03a34 ec8c2c f2cc44 409654 3a6cc4 7c4cac e270a0 3c3e4c")
SUN = _colours("fff4c8")[0]


def _regular(n: int, inner: float = 1.0) -> np.ndarray:
    """A regular polygon with a corner on top, or a star whose inner corners lie at radius `inner`: (n or 2n, 2)."""
    corners = n if inner == 1.0 else 2 * n
    angle = 2 * np.pi * np.arange(corners) / corners - np.pi / 2
    radius = np.where(np.arange(corners) % 2, inner, 1.0)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


A = 0.36  # half of the width of a cross's arms
QUARTER = np.array([(-A, -1), (A, -1), (A, -A)])  # of its outline; the rest by turning it
POLYGONS = {
    "square": _regular(4) @ (np.array([(1, -1), (1, 1)]) / np.sqrt(2)),
    "triangle": _regular(3),
    "star": _regular(5, inner=0.45),
    "cross": np.concatenate([QUARTER @ np.linalg.matrix_power([(0, 1), (-1, 0)], k) for k in range(4)]),
}


def _polygon_distance(p: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Signed distance of points p (P, 2) to a polygon (E, 2), negative inside -> (P,)."""
    a, b = corners[:, None], np.roll(corners, -1, 0)[:, None]  # both (E, 1, 2)
    edge, to_p = b - a, p - a  # (E, 1, 2), (E, P, 2)
    t = np.clip((to_p * edge).sum(-1) / (edge**2).sum(-1), 0, 1)[..., None]  # nearest point on each edge
    distance = np.sqrt(((to_p - t * edge) ** 2).sum(-1)).min(0)  # (P,)
    # Even-odd rule: a point lies inside when a ray to the right crosses the outline an odd number of times.
    crosses = (a[..., 1] > p[:, 1]) != (b[..., 1] > p[:, 1])  # (E, P)
    side = edge[..., 0] * to_p[..., 1] - edge[..., 1] * to_p[..., 0]
    inside = (crosses & ((side > 0) != (edge[..., 1] > 0))).sum(0) % 2 == 1
    return np.where(inside, -distance, distance)


def _object_distance(kind: str, p: np.ndarray) -> np.ndarray:
    """Signed distance of points p (P, 2) to an object of radius 1 at the origin -> (P,)."""
    radius = np.hypot(p[:, 0], p[:, 1])
    if kind == "disc":
        return radius - 0.95
    if kind == "ring":
        return np.abs(radius - 0.72) - 0.26
    return _polygon_distance(p, POLYGONS[kind])


def draw(seed: int, index: int, height: int, width: int) -> dict:
    """Image number `index` of `seed` -> {image (3, H, W) float32 in [-1, 1], labels (H, W) int64 into LABELS,
    depth (1, H, W) float32 in [-1, 1] (far to near), class: int into KINDS}. The same scene at every size."""
    rng = np.random.default_rng((seed, index))
    kind = int(rng.integers(len(KINDS)))
    colour = COLOURS[rng.integers(len(COLOURS))]
    sky, ground = SKIES[rng.integers(len(SKIES))], GROUNDS[rng.integers(len(GROUNDS))]
    horizon = rng.uniform(0.2, 0.5)
    cx, cy, r = rng.uniform(-0.2, 0.2), rng.uniform(-0.18, 0.02), rng.uniform(0.6, 0.74)
    tilt = rng.uniform(-0.15, 0.15)
    sun = int(rng.integers(-1, 2))  # -1 left, 0 none, 1 right

    # Pixel centres; the soft edge is about one pixel wide whatever the size.
    y, x = np.mgrid[(0.5 / height) : 1 : 1 / height, (0.5 / width) : 1 : 1 / width][:, :height, :width] * 2 - 1
    x, y = x.ravel(), y.ravel()  # (P,), P = H * W
    pixel = 2 / min(height, width)

    def cover(distance: np.ndarray, softness: float = 1.2) -> np.ndarray:
        return np.clip(0.5 - distance / (softness * pixel), 0, 1)

    def paint(below: np.ndarray, colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        return below + (colour - below) * alpha[:, None]

    below = cover(horizon - y, 2.0)
    image = paint(sky + 0.06 * (y[:, None] + 0.2), ground + 0.05 * (y[:, None] - 1), below)  # (P, 3)
    labels = (below > 0.5).astype(np.int64)
    depth = np.where(below > 0.5, -0.6 + 1.1 * (y - horizon) / (1 - horizon), -1.0)

    if sun:
        alpha = cover(np.hypot(x - 0.78 * sun, y + 0.78) - 0.17)
        image, labels, depth = paint(image, SUN, alpha), np.where(alpha > 0.5, 2, labels), depth

    # The shadow lies on the ground at the object's foot, away from the sun.
    shadow = np.hypot((x - cx + 0.22 * sun) / (0.85 * r), (y - min(cy + r, 0.9)) / (0.24 * r))
    image *= 1 - 0.35 * (np.clip(1.5 - shadow, 0, 1) * (labels == 1))[:, None]

    turn = np.array([(np.cos(tilt), -np.sin(tilt)), (np.sin(tilt), np.cos(tilt))])
    p = np.stack([x - cx, y - cy], 1) / r  # the object's own coordinates
    alpha = cover(r * _object_distance(KINDS[kind], p @ turn))
    light = 1.0 + 0.16 * (sun * p[:, 0] - p[:, 1])  # brighter above, and on the side of the sun
    image = paint(image, np.clip(colour * light[:, None], 0, 1), alpha)
    labels = np.where(alpha > 0.5, 3 + kind, labels)
    depth = np.where(alpha > 0.5, 0.75, depth)
    return {
        "image": (image.T.reshape(3, height, width) * 2 - 1).clip(-1, 1).astype(np.float32),
        "labels": labels.reshape(height, width),
        "depth": depth.reshape(1, height, width).astype(np.float32),
        "class": kind,
    }
