"""The notebooks and the package's source as a static site, to read in a browser without a network.

    pip install -e ".[site]"
    python notebooks/site.py              into notebooks/_site; open its index.html

Sphinx with MyST-NB makes the pages. Nothing is executed: what is shown is what is saved in the notebooks. The start
page is notebooks/index.md followed by notebooks/README.md. Which modules are shown, and in which order, is read from
the docstring of minvqgan/__init__.py, and the line beside each from its own.
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

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

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
    notebooks = sorted(HERE.glob("[0-9]*.ipynb"))
    for path in notebooks:
        shutil.copy(path, folder)
    sidebar = contents(["Overview <self>", *(path.stem for path in notebooks)], "Notebooks")
    sidebar += contents(["reading_order"], "Code")
    for name in ("way", "samples_scenes"):
        shutil.copy(ROOT / "figures" / f"{name}.png", folder)
    front, readme = ((HERE / f"{name}.md").read_text() for name in ("index", "README"))
    front = front.replace("](../figures/", "](")
    (folder / "index.md").write_text(f"{front}\n#{readme}{sidebar}")  # the README's heading one level lower
    shutil.copy(HERE / "site.css", folder)

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
    parser.add_argument("out", nargs="?", type=Path, default=HERE / "_site", help="the site's folder")
    build(parser.parse_args().out)
