"""`python notebooks/site.py` as a reader sees it: every page in headless Chromium, at a laptop's and a phone's width.

    pytest tests/site            needs the extra `site`, selenium, chromium and chromedriver; about half a minute

The browser can resolve no host, and every request that it tries is in its log.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

for module in ("myst_nb", "furo", "sphinx-mathjax-offline", "nbformat"):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f'{module} is not installed: pip install -e ".[dev]"', allow_module_level=True)

import nbformat  # noqa: E402
from pages import errors, fetched, load  # noqa: E402

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
MODULES = sorted(path for path in (ROOT / "minvqgan").glob("*.py") if path.stem != "__init__")
PAGES = ["index", "reading_order", *(path.stem for path in NOTEBOOKS), *(f"code_{path.stem}" for path in MODULES)]
WIDTHS = (1280, 390)

# Sticks out of the window, and no box around it scrolls: what a reader cannot reach.
CLIPPED = """
const inside = box => box.left >= -1 && box.right <= innerWidth + 1;
return [...document.querySelectorAll("article *")].filter(e => {
    const box = e.getBoundingClientRect();
    if (!box.width || inside(box) || e.closest("mjx-assistive-mml")) return false;
    for (let a = e; a.tagName != "ARTICLE"; a = a.parentElement) {
        const scrolls = ["auto", "scroll"].includes(getComputedStyle(a).overflowX);
        if (scrolls && inside(a.getBoundingClientRect())) return false;
    }
    return true;
}).map(e => e.outerHTML.slice(0, 200));
"""
FORMULAS = """
return [...document.querySelectorAll("article .math")].map(e => {
    const svg = e.querySelector("mjx-container svg"), box = svg && svg.getBoundingClientRect();
    return {tex: e.textContent, shown: !!svg && box.width > 3 && box.height > 3,
            error: !!e.querySelector("[data-mml-node=merror], mjx-container [fill=red]")};  // red: an unknown command
});
"""
FIGURES = """
return [...document.querySelectorAll("article figure")].map(e => {
    const image = e.querySelector("img"), caption = e.querySelector(".caption-text");
    const i = image.getBoundingClientRect(), c = caption.getBoundingClientRect();
    return {alt: image.alt, caption: caption.innerText,
            fits: image.naturalWidth > 0 && 100 < i.width && i.width <= innerWidth, gap: c.top - i.bottom};
});
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site") / "out"
    done = subprocess.run([sys.executable, "notebooks/site.py", out], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(out.parent) == ["out"]  # nothing is left beside it
    return out


def open_page(browser, page: Path, width: int) -> None:
    """Until its figures are loaded and its formulas set."""
    load(browser, page, width)
    browser.execute_async_script("(window.MathJax ? MathJax.startup.promise : Promise.resolve()).then(arguments[0])")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_clipped_missing_or_fetched(site, browser, name, width):
    open_page(browser, site / f"{name}.html", width)
    browser.execute_script("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script("return document.scrollingElement.scrollWidth") <= width
    assert browser.execute_script(CLIPPED) == []
    assert errors(browser) == fetched(browser) == []


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_formulas_figures_and_answers(site, browser, path, width):
    notebook = nbformat.read(path, 4)
    text = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    open_page(browser, site / f"{path.stem}.html", width)
    folded = browser.find_elements("css selector", "article details")
    assert len(folded) == text.count("<details>") > 0
    closed = [element.size["height"] for element in folded]
    for element in folded:
        browser.execute_script("arguments[0].querySelector('summary').click()", element)
    assert all(element.size["height"] > height + 15 for element, height in zip(folded, closed, strict=True))

    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
    found = browser.execute_script(FORMULAS)
    assert len(found) == len(re.findall(r"\$\$.+?\$\$|\$[^$]+\$", text, re.S)) > 5
    assert [formula["tex"] for formula in found if formula["error"] or not formula["shown"]] == []

    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    alts = [output.metadata["image/png"]["alt"] for output in outputs if "image/png" in output.get("data", {})]
    figures = browser.execute_script(FIGURES)
    assert [figure["caption"] for figure in figures] == [figure["alt"] for figure in figures] == [a + "." for a in alts]
    assert all(figure["fits"] and 0 <= figure["gap"] < 40 for figure in figures), figures


def test_every_module_is_in_the_reading_order_and_shown_as_it_is(site, browser):
    open_page(browser, site / "reading_order.html", 1280)
    names = [e.text for e in browser.find_elements("css selector", "article ol li a")]
    assert {f"minvqgan/{path.name}" for path in MODULES} <= set(names) and len(names) == len(set(names))
    for path in MODULES:
        open_page(browser, site / f"code_{path.stem}.html", 1280)
        shown = browser.execute_script(
            "document.querySelectorAll('.linenos').forEach(e => e.remove());"
            "return document.querySelector('article pre').textContent"
        )
        assert shown.strip() == path.read_text().strip()
        assert browser.find_elements("css selector", "article pre .k"), "no colours"


def test_the_start_page_has_images_three_ways_in_and_every_notebook(site, browser):
    open_page(browser, site / "index.html", 1280)
    figures = browser.execute_script(FIGURES)
    assert len(figures) == 2 and all(figure["fits"] and figure["gap"] >= 0 for figure in figures)
    ways = browser.find_elements("css selector", "#three-ways-in li")
    assert [way.find_element("css selector", "strong").text for way in ways] == ["Read.", "Build.", "Teach."]
    pages = [(site / f"{path.stem}.html").as_uri() for path in NOTEBOOKS]
    first = [way.find_element("css selector", "a").get_attribute("href") for way in ways]
    assert first[:2] == [pages[0], pages[-1]] and first[2].endswith("#for-instructors")
    assert browser.find_elements("id", "for-instructors")
    assert [e.get_attribute("href") for e in browser.find_elements("css selector", "article table a")] == pages
    assert browser.find_elements("css selector", "article a[href='playground.html']")
    assert (site / "playground.html").stat().st_size > 1e6
