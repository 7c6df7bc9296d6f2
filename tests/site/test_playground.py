"""The page of `python notebooks/playground.py` in headless Chromium, against the same model in Python.

pytest tests/site/test_playground.py -m slow        needs selenium, chromium and chromedriver; about a minute
"""

import importlib.util
import shlex
import time

import numpy as np
import pytest
import torch
from helpers import ROOT, assert_one_line_error, run_inside
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
    script = "return [...document.querySelectorAll('#map button')].map((cell) => Number(cell.textContent))"
    return browser.execute_script(script)


def pixels(browser, canvas: str = "image") -> np.ndarray:
    """(H, W, 3), what a canvas shows."""
    return read(browser, f"$('{canvas}')")


def read(browser, canvas: str) -> np.ndarray:
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


def put(browser, indices: list[int]) -> None:
    browser.execute_script("edit(arguments[0])", indices)
    settle(browser)


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


def smooth_noise(side: int, seed: int) -> Image.Image:
    """Something with colours, edges and no author."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5 + seed, 4, 3), dtype=np.uint8))
    return coarse.resize((side, side), (Image.Resampling.BICUBIC, Image.Resampling.NEAREST)[seed % 2])


def test_an_image_has_the_codes_and_the_reconstruction_of_python(page, model, tmp_path):
    for seed in range(5):
        image = smooth_noise(model.vqgan.config.image_size, seed)
        image.save(tmp_path / f"{seed}.png")
        known = page.execute_script("return starts.length")
        page.find_element("id", "file").send_keys(str(tmp_path / f"{seed}.png"))
        until(page, f"starts.length > {known}")
        settle(page)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
        expected = model.vqgan.encode_indices(x).flatten().tolist()
        assert codes(page) == expected
        assert np.abs(pixels(page, "original") - np.asarray(image)).max() == 0
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
    (made,) = (tmp_path / "out").rglob("*.png")
    assert np.abs(np.asarray(Image.open(made)).astype(int) - pixels(page)).max() <= 2

    c, sampling = torch.tensor([1]), Sampling(0.9, 100, 0.95, 1.5)
    drawn = model.sample_indices(c, 5, sampling=sampling).flatten().tolist()
    assert codes(page) == drawn

    # Stop, change a code, go on: what follows is drawn given the change, from the same uniform numbers.
    n = model.config.n
    put(page, drawn)
    page.execute_script("show(codes, 2 * n)")
    settle(page)
    assert page.execute_script("return $('map').querySelectorAll('.empty').length") == n * n - 2 * n
    other = (drawn[3] + 1) % model.vqgan.config.codebook_size
    drag(page, 3)
    page.execute_script("pick(arguments[0])", other)
    settle(page)
    assert page.execute_script("return $('stop').textContent") == "Go on"
    press(page, "stop")
    until(page, "run === null && drawn === T")
    given = torch.tensor(drawn[:3] + [other] + drawn[4:]).view(1, n, n)
    expected = model.sample_indices(c, 5, sampling=sampling, given=given, keep=2 * n).flatten().tolist()
    assert codes(page) == expected

    press(page, "half")
    until(page, "run === null && drawn === T")
    given, keep = torch.tensor(expected).view(1, n, n), round(n / 2) * n
    assert codes(page) == model.sample_indices(c, 6, sampling=sampling, given=given, keep=keep).flatten().tolist()


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


def test_a_change_shows_the_pixels_that_it_moves_and_no_others(page, model):
    n, K = model.config.n, model.vqgan.config.codebook_size
    start = codes(page)
    cell = n * (n // 2) + 1
    drag(page, cell)
    until(page, "$('palette-title').textContent.includes(place(selected))")
    last = page.find_elements("css selector", "#palette button")[-1]
    chosen = int(last.get_attribute("innerText"))
    page.execute_script("arguments[0].click()", last)
    settle(page)
    expected = [chosen if i == cell else k for i, k in enumerate(start)]
    assert codes(page) == expected and 0 <= chosen < K
    moved = np.abs(decoded(model, expected) - decoded(model, start)).max(2)
    is_lit = pixels(page, "change").max(2) > 30
    assert is_lit[moved > 6].all() and not is_lit[moved < 3].any()
    assert is_lit.any() and not is_lit.all()


def test_every_patch_of_the_palette_is_what_the_code_would_draw(page, model):
    n, f = model.config.n, model.vqgan.config.f
    drag(page, n + 2)
    count = "$('palette').children.length"
    until(page, f"{count} > 0 && $('palette-title').textContent.includes(place(selected))")
    start = codes(page)
    for j in range(3):
        k = int(page.find_elements("css selector", "#palette button")[j].get_attribute("innerText"))
        truth = decoded(model, [k if i == n + 2 else code for i, code in enumerate(start)])[f : 2 * f, 2 * f : 3 * f]
        for _ in range(100):  # the patches arrive one by one
            patch = read(page, f"$('palette').children[{j}].firstChild")
            if np.abs(patch - truth).max() <= 2:
                break
            time.sleep(0.05)
        assert np.abs(patch - truth).max() <= 2


def test_tools_with_mouse_and_keyboard(page, model):
    from selenium.webdriver.common.keys import Keys

    n = model.config.n
    grid = (np.arange(n * n) % 50).reshape(n, n)

    def begin(tool: str) -> None:
        put(page, grid.flatten().tolist())
        page.execute_script("document.querySelector(`[value=${arguments[0]}]`).click()", tool)

    def assert_changed(*changes) -> None:
        settle(page)
        expected = grid.copy()
        for place, value in changes:
            expected[place] = value
        assert codes(page) == expected.flatten().tolist()

    page.execute_script("pick(60)")
    assert codes(page)[page.execute_script("return selected")] == 60
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
    begin("swap")
    page.execute_script("selected = 0; showMap(); $('map').children[0].focus()")
    for key in "ENTER ARROW_RIGHT ARROW_DOWN ARROW_LEFT ARROW_LEFT ENTER".split():
        page.switch_to.active_element.send_keys(getattr(Keys, key))
    assert_changed((np.s_[0, 0], grid[1, 0]), (np.s_[1, 0], grid[0, 0]))
    begin("mix")
    page.execute_script("$('second').value = 1")
    other = np.array(page.execute_script("return starts[1].codes")).reshape(n, n)
    drag(page, 2, n * (n - 1) + 2)  # straight down: what lies to the left of the line is the other image's
    assert_changed((np.s_[:, :2], other[:, :2]))


def test_mean_flat_and_random_maps(page, model):
    n = model.config.n
    starts = torch.tensor(page.execute_script("return starts.map((start) => start.codes)"))
    press(page, "mean")
    time.sleep(0.5)
    settle(page)
    codebook = model.vqgan.quantizer.codes().detach()
    mean = codebook[starts].mean(0)  # (n * n, D)
    distance = torch.cdist(mean, codebook)
    chosen = distance.gather(1, torch.tensor(codes(page))[:, None])[:, 0]
    assert torch.allclose(chosen, distance.min(1).values, atol=1e-5)
    page.execute_script("brush = 9")
    press(page, "flat")
    settle(page)
    assert codes(page) == [9] * (n * n)
    press(page, "random")
    settle(page)
    assert len(set(codes(page))) > n and np.abs(pixels(page) - decoded(model, codes(page))).max() <= 2


def test_bad_input_is_answered_in_a_sentence_and_changes_nothing(page, tmp_path):
    start = codes(page)
    (tmp_path / "notes.png").write_text("no image")
    page.find_element("id", "file").send_keys(str(tmp_path / "notes.png"))
    until(page, "$('message').textContent.includes('notes.png is no image')")
    page.execute_script("openFile({name: 'film.mov', size: 2e8})")
    until(page, "$('message').textContent.includes('larger than 100 MB')")
    page.execute_script("navigator.mediaDevices.getUserMedia = () => Promise.reject(new Error()); useCamera()")
    until(page, "$('message').textContent.includes('no camera')")
    for name, value, word in (
        ("temperature", -1, "temperature"),
        ("temperature", "", "temperature"),
        ("top_k", 0, "Top-k"),
        ("top_k", 1.5, "Top-k"),
        ("top_p", 1.5, "Top-p"),
        ("guidance", "", "Guidance"),
        ("seed", "x", "seed"),
        ("seed", "1e3", "seed"),
    ):
        fill_in(page, temperature=1, top_k="", top_p="", guidance=1, seed=0)
        fill_in(page, **{name: value})
        press(page, "go")
        assert word in page.execute_script("return $('message').textContent"), (name, value)
    assert codes(page) == start and page.execute_script("return drawn === T && undo.length === 0")


def test_without_workers_the_page_computes_itself(browser, file, model):
    source = {"source": "delete window.Worker"}
    script = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", source)["identifier"]
    try:
        open_page(browser, file)
        assert browser.execute_script("return worker") is None
        assert "No worker can start" in browser.execute_script("return $('facts').textContent")
        assert np.abs(pixels(browser) - decoded(model, codes(browser))).max() <= 2
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", {"identifier": script})
    assert errors(browser) == []


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
    assert file.stat().st_size < 8e6
    script = ROOT / "notebooks" / "playground.py"
    for name, word in (("rgb", "VQGAN alone"), ("coords", "on coords"), ("spatial", "on spatial")):
        done = run_inside(script, "--gpt", house / name / "last.pt", "--out", tmp_path / "page.html", cwd=tmp_path)
        assert_one_line_error(done, word)
    assert list(tmp_path.iterdir()) == []
