"""What the notebooks share: one style, a diagram of the system, source code of the package, figures with captions."""

import csv
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

# QUICK=1 shortens every training, for tests and marking.
QUICK = os.environ.get("QUICK") == "1"

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers and dashes for gray prints.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))

PACKAGE = Path(minvqgan.__file__).parent
CHECKPOINTS = PACKAGE.parent / "notebooks" / "checkpoints"


def start(seed: int = 0) -> None:
    """The first line of every notebook: the seed, so that Restart and Run All gives the same figures, and the style."""
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


def code(*objects, start: str = "", end: str | None = None) -> None:
    """Show the source of functions or classes from the installed package.

    start, end: only from the first line that contains `start` to the next one that contains `end`.
    """
    text = []
    for thing in objects:
        lines = inspect.getsource(thing).splitlines()
        first = next(i for i, line in enumerate(lines) if start in line)
        last = next(i for i, line in enumerate(lines) if i >= first and end in line) if end else len(lines)
        text.append(inspect.cleandoc("\n" + "\n".join(lines[first : last + 1])))
    path = Path(inspect.getsourcefile(inspect.unwrap(objects[0]))).relative_to(PACKAGE.parent)
    display(Markdown(f"`{path.as_posix()}`\n```python\n" + "\n\n".join(text) + "\n```"))


def show(figure, caption: str) -> None:
    """Display a figure with its caption below, which is also its alternative text."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    _display(buffer.getvalue(), caption)


def show_file(name: str, caption: str) -> None:
    """A figure that a script in results/ has made from long trainings."""
    _display((PACKAGE.parent / "figures" / f"{name}.png").read_bytes(), caption)


def _display(png: bytes, caption: str) -> None:
    display(Image(png, alt=caption))
    display(Markdown(f"*{caption}.*"))


def results(name: str) -> list[dict]:
    """Rows of results/NAME.csv, with numbers as floats."""
    with (PACKAGE.parent / "results" / f"{name}.csv").open() as file:
        return [{k: _number(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


# Name -> (x, y, width, what stands in the box). One unit is the width of an arrow.
BOXES = {
    "E": (1.9, 2, 1.0, "E"),
    "q": (4.4, 2, 1.3, "q\ncodebook Z"),
    "G": (6.9, 2, 1.0, "G"),
    "D": (9.6, 2, 1.0, "D"),
    "P": (4.4, 3.3, 2.2, "perceptual network"),
    "c": (1.9, 0.5, 1.0, "c"),
    "GPT": (6.9, 0.5, 1.6, "transformer"),
}


def diagram(*parts: str) -> None:
    """The whole system, with the given parts (names of `BOXES`) highlighted."""
    figure, ax = plt.subplots(figsize=(9, 3.4))
    ax.set(xlim=(-0.4, 11.4), ylim=(-0.2, 3.8))
    ax.axis("off")
    for name, (x, y, width, text) in BOXES.items():
        at_hand = name in parts
        face, edge = (COLOURS[4], "black") if at_hand else ("#eeeeee", "gray")
        box = plt.Rectangle((x - width / 2, y - 0.35), width, 0.7, facecolor=face, edgecolor=edge, zorder=2)
        box.set_linewidth(2 if at_hand else 1)
        ax.add_patch(box)
        ax.text(x, y, text, ha="center", va="center", weight="bold" if at_hand else "normal", fontsize=9, zorder=3)

    def arrow(begin: tuple, end: tuple, text: str = "", above: float = 0.1) -> None:
        ax.annotate("", end, begin, arrowprops={"arrowstyle": "->", "color": "black", "shrinkA": 0, "shrinkB": 0})
        ax.text((begin[0] + end[0]) / 2, begin[1] + above, text, ha="center", va="bottom", fontsize=8)

    for x, text in ((0.2, "x\n3 × H × W"), (8.3, "x̂\n3 × H × W"), (11, "h' × w'\nlogits")):
        ax.text(x, 2, text, ha="center", va="center", fontsize=8)
    arrow((0.75, 2), (1.4, 2))
    arrow((2.4, 2), (3.75, 2), "ẑ\nD × h × w")
    arrow((5.05, 2), (6.4, 2), "z_q\nD × h × w")
    arrow((7.4, 2), (7.75, 2))
    arrow((8.85, 2), (9.1, 2))
    arrow((10.1, 2), (10.5, 2))
    for side, x, edge in ((1, 0.2, 3.3), (-1, 8.3, 5.5)):  # x and x_hat go up to the perceptual network
        ax.plot([x, x], [2.4, 3.3], color="black", linewidth=1, linestyle="-")
        arrow((x, 3.3), (edge, 3.3), "" if side > 0 else "L_rec compares")
    arrow((4.4, 1.65), (4.4, 0.85))
    ax.text(4.5, 1.25, "indices h × w", ha="left", va="center", fontsize=8)
    ax.text(9.6, 1.45, "judges x and x̂", ha="center", va="center", fontsize=8)
    ax.text(4.4, 0.5, "[c | s]\nR + T tokens, T = h·w", ha="center", va="center", fontsize=8)
    arrow((2.4, 0.5), (3.3, 0.5))
    arrow((5.5, 0.5), (6.1, 0.5))
    arrow((6.3, 0.85), (5.05, 1.7))  # drawn codes are looked up in the codebook, like those of an image
    ax.text(5.95, 1.25, "drawn s", ha="left", va="center", fontsize=8)
    arrow((7.7, 0.5), (8.3, 0.5))
    ax.text(8.4, 0.5, "p(s_i | s_<i, c): T × K", ha="left", va="center", fontsize=8)
    names = ", ".join(BOXES[part][3].replace("\n", " with the ") for part in parts)
    show(figure, "The system: stage one above, stage two below" + (f"; highlighted: {names}" if parts else ""))


def show_images(rows: Sequence[Tensor] | dict[str, Tensor], caption: str, side: float = 0.9) -> None:
    """Rows of images (n, 3, H, W) in [-1, 1], with a name before each row where a dict gives one. side: inches."""
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
    show(figure, caption)


def curve(ax, x, y, name: str, number: int = 0) -> None:
    """A line with a colour, dash and marker of its own."""
    look = {"color": COLOURS[number % 6], "linestyle": DASHES[number % 6], "marker": MARKERS[number % 6]}
    ax.plot(x, y, label=name, markevery=max(1, len(x) // 8) if len(x) > 15 else 1, markersize=5, **look)


def smooth(values: Sequence[float], width: int = 20) -> list[float]:
    """Running means over `width` values, for curves of a loss."""
    parts = [values[max(0, i + 1 - width) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]
