"""The page of `python notebooks/playground.py` in headless Chromium, against the same model in Python.

pytest tests/site/test_playground.py -m slow        needs selenium, chromium and chromedriver; about a minute
"""

import importlib.util
import shlex
import time

import numpy as np
import pytest
import torch
from helpers import ROOT, assert_one_line_error, make_photos, run_inside
from pages import errors, fetched, load
from PIL import Image

from minvqgan import Sampling, sampler
from minvqgan.harness import pictures

pytestmark = pytest.mark.slow

spec = importlib.util.spec_from_file_location("playground", ROOT / "notebooks" / "playground.py")
playground = importlib.util.module_from_spec(spec)
spec.loader.exec_module(playground)
CHECKPOINT = playground.CIFAR


@pytest.fixture(scope="module")
def model():
    return playground.open_model(CHECKPOINT)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "playground.html"
    playground.write(CHECKPOINT, path)
    return path


def open_page(browser, file, width=1200, dark=False):
    """Until it has nothing left to do."""
    load(browser, file, width, dark)
    until(browser, "document.querySelectorAll('#palette button').length > 0")
    browser.execute_script("palette++")  # ends the drawing of patches, which would slow everything down


@pytest.fixture
def page(browser, file):
    open_page(browser, file)
    yield browser
    assert errors(browser) == []


def until(browser, condition: str, seconds: float = 60) -> None:
    end = time.time() + seconds
    while not browser.execute_script(f"return {condition}"):
        assert time.time() < end, condition
        time.sleep(0.05)


def settle(browser) -> None:
    """Wait for the decoder."""
    time.sleep(0.05)
    until(browser, "drawing === null && run === null")


def codes(browser) -> list[int]:
    """The numbers that the map shows."""
    return [int(cell) for cell in browser.execute_script("return [...$('map').children].map((e) => e.textContent)")]


def pixels(browser, name: str = "image") -> np.ndarray:
    return read(browser, f"$('{name}')")


def read(browser, canvas: str) -> np.ndarray:
    """(H, W, 3), what a canvas shows."""
    copy = (
        f"const from = {canvas}, to = new OffscreenCanvas(from.width, from.height);"
        "const context = to.getContext('2d', {willReadFrequently: true}); context.drawImage(from, 0, 0);"
        "return [from.width, ...context.getImageData(0, 0, from.width, from.height).data]"
    )
    width, *flat = browser.execute_script(copy)
    return np.array(flat).reshape(-1, width, 4)[:, :, :3]


def decoded(model, indices: list[int]) -> np.ndarray:
    """The same by Python."""
    x = model.vqgan.decode_indices(torch.tensor(indices).view(1, model.config.n, -1))
    return pictures.to_pixels(x)[0].permute(1, 2, 0).numpy().astype(int)


def fill_in(browser, **values) -> None:
    for name, value in values.items():
        script = "const e = $(arguments[0]); e.value = arguments[1]; e.oninput()"
        browser.execute_script(script, name.replace("_", "-"), str(value))


def press(browser, name: str) -> None:
    browser.execute_script("$(arguments[0]).click()", name)


def drag(browser, *cells: int) -> None:
    """From one cell of the map over others, with the mouse."""
    from selenium.webdriver.common.action_chains import ActionChains

    elements = browser.find_elements("css selector", "#map button")
    actions = ActionChains(browser, duration=20).move_to_element(elements[cells[0]]).click_and_hold()
    for cell in cells[1:]:
        actions.move_to_element(elements[cell])
    actions.release().perform()
    settle(browser)


def test_an_image_has_the_codes_and_the_reconstruction_of_python(page, model, tmp_path):
    side = model.vqgan.config.image_size
    for number, path in enumerate(make_photos(tmp_path, 3, (side, side))):
        known = page.execute_script("return starts.length")
        page.find_element("id", "file").send_keys(str(path))
        until(page, f"starts.length > {known}")
        settle(page)
        image = np.asarray(Image.open(path))
        x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        expected = model.vqgan.encode_indices(x).flatten().tolist()
        assert codes(page) == expected, number
        assert (pixels(page, "original") == image).all()
        assert np.abs(pixels(page) - decoded(model, expected)).max() <= 2


def test_a_seed_gives_the_image_of_sample_py(page, model, tmp_path):
    drawn = page.execute_script("return [...uniforms(123456789, 3, 1500)]")
    assert drawn == sampler.uniforms(123456789, [3], 1500)[0].tolist()
    fill_in(page, temperature=0.9, top_k=100, top_p=0.95, guidance=1.5, seed=5)
    page.execute_script("$('class').selectedIndex = 1; showCommand()")
    words = shlex.split(page.execute_script("return $('command').textContent"))
    assert words.pop(0) == "python"
    words[words.index("--gpt") + 1] = CHECKPOINT
    done = run_inside(*words, "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    press(page, "go")
    until(page, "run === null && drawn === T")
    (made,) = (tmp_path / "out").iterdir()
    assert np.abs(np.asarray(Image.open(made)).astype(int) - pixels(page)).max() <= 2
    drawn = codes(page)

    # Stop, change a code, go on: what follows is drawn given the change, from the same uniform numbers.
    n, c, sampling = model.config.n, torch.tensor([1]), Sampling(0.9, 100, 0.95, 1.5)
    page.execute_script("show(codes, 2 * n)")
    settle(page)
    assert page.execute_script("return $('map').querySelectorAll('.empty').length") == n * n - 2 * n
    other = (drawn[3] + 1) % model.vqgan.config.codebook_size
    drag(page, 3)
    page.execute_script("pick(arguments[0])", other)
    settle(page)
    assert page.execute_script("return $('stop').textContent") == "Go on"
    given = drawn[:3] + [other] + drawn[4:]
    for button, seed, keep in (("stop", 5, 2 * n), ("half", 6, round(n / 2) * n)):
        press(page, button)
        until(page, "run === null && drawn === T")
        given = torch.tensor(given).view(1, n, n)
        expected = model.sample_indices(c, seed, sampling=sampling, given=given, keep=keep).flatten().tolist()
        assert codes(page) == expected
        given = expected


def test_the_next_codes_are_shown_with_their_probabilities(page, model):
    page.execute_script("$('draw').open = true")
    fill_in(page, temperature=1, top_k=5, guidance=1)
    press(page, "step")
    settle(page)
    with torch.no_grad():
        likeliest = model.gpt(model.condition_tokens(torch.tensor([0])))[0, -1].topk(5)
    shown = [item.get_attribute("innerText").split() for item in page.find_elements("css selector", "#bars li")]
    assert [int(words[0]) for words in shown] == likeliest.indices.tolist()
    for words, p in zip(shown, likeliest.values.softmax(0).tolist(), strict=True):
        assert float(words[1]) == pytest.approx(100 * p, abs=0.51)
    assert codes(page)[0] in likeliest.indices and page.execute_script("return drawn") == 1


def test_a_change_shows_the_pixels_that_it_moves_and_patches_what_they_would_be(page, model):
    n, f = model.config.n, model.vqgan.config.f
    start = codes(page)
    cell = n + 2
    drag(page, cell)
    until(page, "$('palette-title').textContent.includes(place(selected))")
    with_code = lambda k: [k if i == cell else code for i, code in enumerate(start)]  # noqa: E731
    buttons = page.find_elements("css selector", "#palette button")
    names = [int(button.get_attribute("innerText")) for button in buttons]
    for j, k in enumerate(names[:3]):
        truth = decoded(model, with_code(k))[f : 2 * f, 2 * f : 3 * f]
        for _ in range(100):  # the patches arrive one by one
            patch = read(page, f"$('palette').children[{j}].firstChild")
            if np.abs(patch - truth).max() <= 2:
                break
            time.sleep(0.05)
        assert np.abs(patch - truth).max() <= 2
    page.execute_script("arguments[0].click()", buttons[-1])
    settle(page)
    expected = with_code(names[-1])
    assert codes(page) == expected
    moved = np.abs(decoded(model, expected) - decoded(model, start)).max(2)
    is_lit = pixels(page, "change").max(2) > 30
    assert is_lit[moved > 6].all() and not is_lit[moved < 3].any() and is_lit.any() and not is_lit.all()


def test_tools_with_mouse_and_keyboard(page, model):
    from selenium.webdriver.common.keys import Keys

    n = model.config.n
    grid = (np.arange(n * n) % 50).reshape(n, n)

    def begin(tool: str) -> None:
        page.execute_script("edit(arguments[0])", grid.flatten().tolist())
        settle(page)
        page.execute_script("document.querySelector(`[value=${arguments[0]}]`).click()", tool)

    def assert_changed(*changes) -> None:
        settle(page)
        expected = grid.copy()
        for place, value in changes:
            expected[place] = value
        assert codes(page) == expected.flatten().tolist()

    begin("paint")
    page.execute_script("pick(60)")
    drag(page, 0, 1, 2)
    assert_changed((np.s_[0, :3], 60))
    press(page, "undo")
    assert_changed()
    press(page, "redo")
    assert_changed((np.s_[0, :3], 60))
    begin("fill")
    drag(page, 2 * n + 3, n + 2, 1)
    assert_changed((np.s_[:3, 1:4], 60))
    begin("fill")
    page.execute_script("selected = n; showMap(); $('map').children[n].focus()")
    for key in "ENTER ARROW_RIGHT ARROW_DOWN ARROW_LEFT ARROW_LEFT ENTER".split():  # the last step meets the border
        page.switch_to.active_element.send_keys(getattr(Keys, key))
    assert_changed((np.s_[1:3, 0], 60))


def test_bad_input_is_answered_in_a_sentence_and_changes_nothing(page, tmp_path):
    start = codes(page)
    (tmp_path / "notes.png").write_text("no image")
    page.find_element("id", "file").send_keys(str(tmp_path / "notes.png"))
    until(page, "$('message').textContent.includes('notes.png is no image')")
    page.execute_script("navigator.mediaDevices.getUserMedia = () => Promise.reject(new Error()); useCamera()")
    until(page, "$('message').textContent.includes('no camera')")
    for name, value, word in (
        ("temperature", -1, "temperature"),
        ("top_k", 1.5, "Top-k"),
        ("top_p", 1.5, "Top-p"),
        ("guidance", "", "Guidance"),
        ("seed", "1e3", "seed"),
    ):
        fill_in(page, temperature=1, top_k="", top_p="", guidance=1, seed=0)
        fill_in(page, **{name: value})
        press(page, "go")
        assert word in page.execute_script("return $('message').textContent"), (name, value)
    assert codes(page) == start and page.execute_script("return drawn === T && undo.length === 0")


@pytest.mark.parametrize("dark", (False, True))
@pytest.mark.parametrize("width", (390, 900, 1600))
def test_nothing_is_clipped_nameless_or_fetched(browser, file, width, dark):
    open_page(browser, file, width, dark)
    for part in ("edit", "own", "draw"):
        browser.execute_script("$(arguments[0]).open = true", part)
        assert browser.execute_script("return document.scrollingElement.scrollWidth") <= width
    nameless = browser.execute_script(
        "return [...document.querySelectorAll('button, input, select, canvas[role]')].filter(e => "
        "!(e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length)).map(e => e.outerHTML)"
    )
    assert nameless == []
    assert errors(browser) == fetched(browser) == []


def test_the_file_is_small_and_other_models_are_refused(file, house, tmp_path):
    assert file.stat().st_size < 9e6
    script = ROOT / "notebooks" / "playground.py"
    for name, word in (("rgb", "VQGAN alone"), ("coords", "condition is coords")):
        done = run_inside(script, "--gpt", house / name / "last.pt", "--out", tmp_path / "page.html", cwd=tmp_path)
        assert_one_line_error(done, word)
    assert list(tmp_path.iterdir()) == []
