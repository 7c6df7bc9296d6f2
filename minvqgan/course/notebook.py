"""How the notebooks look: one style, source code shown from the installed package, pictures with a text for those who
cannot see them."""

import inspect
import io
import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from IPython.display import Image, Markdown, display
from torch import Tensor

import minvqgan
from minvqgan.harness import pictures

# QUICK=1 shortens every training: for tests and marking, not for looking.
QUICK = os.environ.get("QUICK") == "1"

# Okabe and Ito's colours, told apart by the colour-blind, from dark to light; markers and dashes for gray print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))

CHECKPOINTS = Path(minvqgan.__file__).parents[1] / "notebooks" / "checkpoints"


def start(seed: int = 0) -> None:
    """The first line of every notebook: seeds, so that Restart and Run All gives the same pictures, and the style."""
    torch.manual_seed(seed)
    plt.rcParams.update(
        {
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": plt.cycler(color=COLOURS) + plt.cycler(linestyle=DASHES),
            "image.cmap": "cividis",
        }
    )


def steps(full: int) -> int:
    """How many steps to train: `full`, or a few under QUICK=1."""
    return min(full, 6) if QUICK else full


def checkpoint(name: str):
    """A model that `notebooks/make_checkpoints.py` has made."""
    path = CHECKPOINTS / f"{name}.pt"
    if not path.exists():
        raise FileNotFoundError(f"{path}: run `python notebooks/make_checkpoints.py` in a clone of the repository")
    return minvqgan.load(path)


def code(*objects, start: str | None = None, end: str | None = None) -> None:
    """Show the source of functions or classes as it is installed, so that text and code cannot drift apart.

    start, end: only from the first line that holds `start` to the next one that holds `end`. Raises ValueError when
    there is no such line.
    """
    text = []
    for thing in objects:
        lines = inspect.getsource(thing).splitlines()
        if start is not None or end is not None:
            first = next((i for i, line in enumerate(lines) if start is None or start in line), None)
            last = next((i for i, line in enumerate(lines) if i >= (first or 0) and end in line), None) if end else -1
            if first is None or last is None:
                raise ValueError(f"{thing.__name__} has no lines from {start!r} to {end!r}")
            lines = lines[first:] if last == -1 else lines[first : last + 1]
        text.append(inspect.cleandoc("\n" + "\n".join(lines)))
    name = Path(inspect.getsourcefile(objects[0])).name
    display(Markdown(f"`minvqgan/{name}`\n```python\n" + "\n\n".join(text) + "\n```"))


def show(figure, alt: str) -> None:
    """Display a figure with its text alternative: what it shows, in a sentence."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    display(Image(buffer.getvalue(), alt=alt))


def show_images(rows: Sequence[Tensor] | dict[str, Tensor], alt: str, side: float = 0.9) -> None:
    """Rows of pictures (n, 3, H, W) in [-1, 1], with a name before each row where a dict gives one. side: inches."""
    names = list(rows) if isinstance(rows, dict) else [""] * len(rows)
    rows = list(rows.values()) if isinstance(rows, dict) else list(rows)
    columns = max(map(len, rows))
    shape = {"nrows": len(rows), "ncols": columns, "figsize": (columns * side + 1.2 * any(names), len(rows) * side)}
    figure, axes = plt.subplots(**shape, squeeze=False)
    for name, row, line in zip(names, rows, axes, strict=True):
        for ax in line:
            ax.axis("off")
        for ax, image in zip(line, row, strict=False):
            ax.imshow(pictures.to_pixels(image.detach()).permute(1, 2, 0), interpolation="nearest")
        line[0].text(-0.15, 0.5, name, ha="right", va="center", transform=line[0].transAxes)
    show(figure, alt)


def curve(ax, x, y, name: str, number: int = 0) -> None:
    """A line that colour, dash and marker tell apart from the others."""
    many = len(x) > 15
    ax.plot(
        x,
        y,
        label=name,
        color=COLOURS[number % 6],
        linestyle=DASHES[number % 6],
        marker=MARKERS[number % 6],
        markevery=max(1, len(x) // 8) if many else 1,
        markersize=5,
    )


def smooth(values: Sequence[float], width: int = 20) -> list[float]:
    """Running means over `width` values, for curves of a loss."""
    v = torch.tensor(values)
    total = torch.cat([torch.zeros(1), v.cumsum(0)])
    return [((total[i + 1] - total[max(0, i + 1 - width)]) / min(width, i + 1)).item() for i in range(len(v))]
