"""The notebooks and the package's source as a static site, to read in a browser without a network.

    pip install -e ".[site]"
    python notebooks/site.py              into notebooks/_site; open its index.html

Sphinx with MyST-NB makes the pages. Nothing is executed: what is shown is what is saved in the notebooks. The start
page is FRONT and notebooks/README.md. Which modules are shown, and in which order, is read from the docstring of
minvqgan/__init__.py, and the line beside each from its own.
"""

import argparse
import ast
import importlib.util
import re
import shutil
import sys
import tempfile
from pathlib import Path

import playground

try:
    from docutils import nodes
    from sphinx.application import Sphinx

    MATHJAX = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent / "static/mathjax/tex-svg.js"
except (ImportError, AttributeError):
    print('notebooks/site.py needs Sphinx, MyST-NB, Furo and MathJax: pip install -e ".[site]"', file=sys.stderr)
    sys.exit(2)

ROOT = Path(__file__).resolve().parents[1]

# Code has lines of up to 120 characters, prose is read best in shorter ones. What is wider still scrolls by itself.
CSS = """
body { --code-font-size: 0.75rem; }
.content { width: 60em; padding: 0 min(2em, 4vw); }
.sidebar-drawer { width: max(15em, 50% - 34em); }
article p, article li, article details { max-width: 46em; }
article p { overflow: auto hidden; }
div.math { padding-left: min(2em, 4vw); }
div.math mjx-container { text-align: left !important; }
article h1 { font-size: 2em; } article h2 { font-size: 1.5em; } article h3 { font-size: 1.2em; }
article figure { margin: 0.5em 0 1.5em; }
article figure img { display: block; margin-left: 0; }
article figcaption { font-style: italic; text-align: left; }
"""
CONFIG = {
    "extensions": ["myst_nb", "sphinx.ext.mathjax"],
    "nb_execution_mode": "off",
    "nb_merge_streams": True,
    "myst_enable_extensions": ["dollarmath"],
    "myst_heading_anchors": 2,  # for links to #for-instructors
    "mathjax_path": MATHJAX.name,
    "smartquotes": False,
    "html_theme": "furo",
    "html_title": "minvqgan",
    "html_static_path": [str(MATHJAX), "site.css"],
    "html_css_files": ["site.css"],
    "html_copy_source": False,
    "html_use_index": False,
    "html_show_search_summary": False,  # would fetch pages, which browsers refuse from a disk
    "html_show_copyright": False,
}

FRONT = """# minvqgan

**VQGAN, small enough to read in an afternoon and good enough to use.** An image becomes a small map of code numbers,
and from the numbers an image again:

![](way.png)

*A photograph, its 8 x 8 codes, the transformer's prediction in the middle of them, new codes, and their image.*

A transformer learns which number follows which. It then draws new maps, and the decoder makes images of them:

![](samples_scenes.png)

*New images, drawn code by code: buildings, forests, glaciers, mountains, sea, streets.*

<p><a href="playground.html">Here is a page to play with</a>: change an image's codes and see what they draw, encode an
image of your own, and watch the transformer draw new ones.</p>

## Three ways in

- **Read.** Begin with [one image's way through the whole system](00_tour.ipynb), then one idea a notebook:
  [E and G](01_autoencoder.ipynb), [the codebook](02_quantizer.ipynb), [the perceptual loss](03_perceptual.ipynb),
  [the adversary](04_adversarial.ipynb), [the transformer](05_transformer.ipynb), and on. Nothing has to be installed:
  all results are on the pages.
- **Build.** [Both stages from nothing](09_from_scratch.ipynb), in one notebook that imports PyTorch and nothing of
  this package, is trained in minutes, and in the end gives the same numbers as the package.
- **Teach.** Exercises with checks that name the mistake, student versions, and marking for a class:
  [for instructors](#for-instructors).

"""


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text()))


def reading_order() -> list[Path]:
    """The files that the package's docstring names, in its order: modules, and scripts with their .py."""
    words = re.findall(r"\w+(?:\.py)?", docstring(ROOT / "minvqgan" / "__init__.py").split("Reading order:")[1])
    paths = [ROOT / word if word.endswith(".py") else ROOT / "minvqgan" / f"{word}.py" for word in words]
    return [path for path in paths if path.is_file()]


def contents(pages: list[str], caption: str = "") -> str:
    """What the sidebar lists, under a caption or below the page that this stands in."""
    return "\n".join(["\n```{toctree}", ":hidden:", f":caption: {caption}" if caption else "", "", *pages, "```\n"])


def write_pages(folder: Path) -> None:
    """What Sphinx reads: the notebooks as they are, the start page, the reading order, a page for each file of it."""
    notebooks = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    for path in notebooks:
        shutil.copy(path, folder)
    sidebar = contents(["Overview <self>", *(path.stem for path in notebooks)], "Notebooks")
    sidebar += contents(["reading_order"], "Code")
    for name in ("way", "samples_scenes"):
        shutil.copy(ROOT / "figures" / f"{name}.png", folder)
    readme = (ROOT / "notebooks" / "README.md").read_text().replace("# The notebooks", "## The notebooks", 1)
    (folder / "index.md").write_text(FRONT + readme + sidebar)
    (folder / "site.css").write_text(CSS)

    text = "# Reading order of the modules\n\n"
    for path in reading_order():
        name, about = path.relative_to(ROOT).as_posix(), docstring(path).split("\n\n")[0]
        text += f"1. [`{name}`](code_{path.stem}.md): {about}\n"
        listing = f"`````{{code-block}} python\n:linenos:\n\n{path.read_text()}`````\n"
        (folder / f"code_{path.stem}.md").write_text(f"# {path.name}\n\n{listing}")
    readme = (ROOT / "minvqgan" / "README.md").read_text()
    table = readme[readme.index("| paper | what |") : readme.index("To follow")]
    text += "\n## From the paper to the code\n\n" + table.replace("](../notebooks/", "](")
    (folder / "reading_order.md").write_text(text + contents([f"code_{path.stem}" for path in reading_order()]))


def make_figures(app, doctree, name) -> None:
    """An image and the caption below it become one figure; the caption is also what those hear who cannot see it."""
    for number, image in enumerate(list(doctree.findall(nodes.image)), 1):
        holder = image.parent if isinstance(image.parent, nodes.paragraph) else image  # that of a Markdown image
        below = holder.next_node(nodes.paragraph, descend=False, siblings=True)
        if below is None:
            continue
        below.parent.remove(below)
        image["alt"] = below.astext()
        caption = nodes.caption("", below.astext())
        holder.replace_self(nodes.figure("", image.deepcopy(), caption, ids=[f"figure-{number}"]))


def build(out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:  # MyST-NB leaves files beside the pages
        source, html, doctrees = (Path(folder) / name for name in ("source", "html", "doctrees"))
        source.mkdir()
        write_pages(source)
        app = Sphinx(source, None, html, doctrees, "html", CONFIG, status=None, warningiserror=True)
        app.connect("doctree-resolved", make_figures)
        app.build()
        if app.statuscode:
            sys.exit(2)  # its warnings are printed
        shutil.copytree(html, out, dirs_exist_ok=True)
    playground.write(playground.CIFAR, out / "playground.html")
    print(f"open {out / 'index.html'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "notebooks" / "_site", help="the site's folder")
    build(parser.parse_args().out)
