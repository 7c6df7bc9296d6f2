"""evaluate.py: its distances against scipy, torchmetrics and definitions; the script as a user runs it."""

import json
import math
import runpy
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
import torch_fidelity.feature_extractor_inceptionv3 as inception
from helpers import ROOT, STAGE_ONE, STAGE_TWO, assert_one_line_error, fixture, make_photos, official_files, run_inside
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

from minvqgan.harness import checkpoint, data, judges, metrics
from minvqgan.harness.judges import Classifier, save_classifier


@pytest.fixture(scope="module")
def clouds():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(60, 8, generator=g) @ torch.randn(8, 8, generator=g)
    return a, torch.randn(50, 8, generator=g) + 0.5


def test_frechet_distance_is_scipys_and_by_hand(clouds):
    a, b = clouds
    A, B = np.cov(a.double().numpy().T), np.cov(b.double().numpy().T)
    root = scipy.linalg.sqrtm(A @ B).real
    truth = ((a.double().mean(0) - b.double().mean(0)) ** 2).sum().item() + np.trace(A + B - 2 * root)
    assert metrics.frechet_distance(a, b) == pytest.approx(truth, rel=1e-8)
    # One dimension: means 0 and 3, variances 1 and 4: 3^2 + (1 - 2)^2.
    a, b = torch.tensor([[-1.0], [0.0], [1.0]]), torch.tensor([[1.0], [3.0], [5.0]])
    assert metrics.frechet_distance(a, b) == pytest.approx(9 + 1)
    # Fewer images than features: the covariances are singular.
    c = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    assert metrics.frechet_distance(c, c) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet_distance(c, c + 2) == pytest.approx(20 * 4)


def test_inception_score_is_scipys_and_by_hand(clouds):
    assert metrics.inception_score(torch.eye(5).repeat(4, 1)) == pytest.approx(5)
    assert metrics.inception_score(torch.full((7, 5), 0.2)) == pytest.approx(1)
    p = clouds[0].double().softmax(1)
    divergence = scipy.stats.entropy(p, p.mean(0, keepdim=True), axis=1)
    assert metrics.inception_score(p) == pytest.approx(math.exp(divergence.mean()))


def test_distances_by_the_definition_and_in_blocks(monkeypatch):
    """They were collected in a list: 20 GB for two sets of 50,000 images."""

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.numbers = max(self.numbers, *tensors, 0)
            return out

    monkeypatch.setattr(metrics, "BLOCK", 2**14)
    a, b = torch.randn(700, 4), torch.randn(900, 4) + 0.3
    with Largest() as seen:
        ours = metrics.precision_recall(a, b), metrics.nearest(a, b)
    assert seen.numbers <= 2**14
    d = (a.double()[:, None] - b.double()).norm(dim=2)  # all N x M at once
    assert torch.equal(ours[1][1], d.argmin(1)) and torch.allclose(ours[1][0], d.amin(1).float())
    radii = [torch.cdist(t.double(), t.double()).sort(1).values[:, 3] for t in (a, b)]  # [0] is the point itself
    assert ours[0] == ((d <= radii[0][:, None]).any(0).double().mean(), (d <= radii[1]).any(1).double().mean())
    assert all(0 < fraction < 1 for fraction in ours[0])


def test_psnr_by_hand_and_ssim_of_each_image():
    """PSNR is 20 log10(peak / root mean squared error), the peak to peak range being 2."""
    x = torch.zeros(2, 3, 4, 4)
    y = x + torch.tensor([0.2, 0.02])[:, None, None, None]
    assert metrics.psnr(x, y).tolist() == pytest.approx([20, 40], rel=1e-4)
    g = torch.Generator().manual_seed(0)
    x = torch.rand(3, 3, 24, 24, generator=g) * 2 - 1
    y = (x + torch.randn(x.shape, generator=g) * torch.tensor([0, 0.1, 0.5])[:, None, None, None]).clamp(-1, 1)
    edge = x.sign()  # what lies beyond -1 and 1 is cut off, as in the file of an image
    assert (metrics.psnr(edge, 3 * edge) > 100).all()
    assert metrics.ssim(edge, 3 * edge).tolist() == pytest.approx([1] * 3)
    for i, ours in enumerate(metrics.ssim(x, y)):
        assert ours == pytest.approx(structural_similarity_index_measure(y[i : i + 1], x[i : i + 1], data_range=2.0))


def test_inception_features_and_what_happens_without(monkeypatch):
    """With the same weights, here random ones, the judge sees what torchmetrics' FID sees."""
    monkeypatch.setattr(inception, "load_state_dict_from_url", mock.Mock(side_effect=OSError("no network")))
    with pytest.raises(judges.UserError, match="InceptionV3 could not be loaded"):
        judges.load_features("inception")
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *a, **k: {})
    monkeypatch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *a, **k: None)
    torch.manual_seed(0)
    judge, theirs = judges.load_features("inception"), FrechetInceptionDistance(feature=2048).inception
    for mine, other in zip(judge.net.parameters(), theirs.parameters(), strict=True):
        other.data = mine.data
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    features, probabilities = judge(x)
    assert features.shape == (4, 2048) and probabilities.shape == (4, 1008)
    assert torch.allclose(probabilities.sum(1), torch.ones(4))
    assert torch.allclose(features, theirs(((x + 1) * 127.5).round().to(torch.uint8)), atol=1e-6)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny first stage, a transformer on it, a classifier and a label model, of shapes."""
    folder = tmp_path_factory.mktemp("evaluate")
    for words, flags in (
        (STAGE_ONE, "--out vqgan"),
        (STAGE_TWO, "--vqgan vqgan/last.pt --resize 20 --out gpt"),  # crops: else 12,000 images are encoded first
        (STAGE_ONE, "--input labels --num-labels 9 --out labels"),
    ):
        done = run_inside(*words, *flags.split(), cwd=folder)
        assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    save_classifier(folder / "judge.pt", Classifier(data.open_data("shapes", 16)[0].classes))
    return folder


def evaluate(*words, cwd):
    """Into the next free folder of runs/."""
    count = len(list(cwd.glob("runs/*")))
    done = run_inside("evaluate.py", *words, "--perceptual", "none", "--images", "30", cwd=cwd)
    assert done.returncode == 0, done.stderr
    content = json.loads((cwd / f"runs/evaluation_{count + 1}/metrics.json").read_text())
    return done, {name: row["value"] for name, row in content["metrics"].items()}, content


def test_a_first_stage(models):
    done, values, content = evaluate("--vqgan", "vqgan/last.pt", "--features", "judge.pt", cwd=models)
    model = checkpoint.load_vqgan(models / "vqgan/last.pt")
    val_set = data.open_data("shapes", 16)[1]
    truth = metrics.evaluate_vqgan(model, data.held_out_batches(val_set, 50, 30), torch.device("cpu"))
    for name, theirs in truth.items():
        ours = values[f"codebook_{name}" if name in ("usage", "perplexity") else name]
        assert ours == pytest.approx(theirs, rel=1e-5)
    x = next(data.held_out_batches(val_set, 30, 30))["image"]
    with torch.no_grad():
        x_hat, quantized = model(x)
    assert values["l1"] == pytest.approx((x - x_hat).abs().mean().item(), rel=1e-5)
    assert values["codebook_usage"] == len(quantized.indices.unique()) / 16
    assert 0 < values["ssim"] < 1 and values["frechet_distance(judge)"] > 0 and "fid" not in values
    with torch.no_grad():
        l1 = (x - model(x)[0]).abs().mean((1, 2, 3))
    assert content["metrics"]["l1"]["spread"] == pytest.approx(l1.std().item() / 30**0.5, rel=1e-4)
    assert "30 held-out images of shapes" in done.stdout
    _, values, _ = evaluate("--vqgan", "labels/last.pt", "--features", "none", cwd=models)
    assert 0 <= values["pixel_accuracy"] <= 1 and values["cross_entropy"] > 0 and "l1" not in values


def test_a_transformer(models):
    words = "--gpt gpt/last.pt --features judge.pt -n 20 --batch-size 8 --seed 3"
    done, values, content = evaluate(*words.split(), cwd=models)
    model, val_set = checkpoint.load(models / "gpt/last.pt"), data.open_data("shapes", 16, 20)[1]
    batch = next(data.held_out_batches(val_set, 30, 30))
    nats = model.nll(batch["image"], batch["class"]).mean().item()
    assert values["nats_per_token"] == pytest.approx(nats, rel=1e-5)
    assert values["bits_per_pixel"] == pytest.approx(nats * 64 / math.log(2) / 256, rel=1e-5)  # 64 codes, 256 pixels
    # The very samples again. Asked for are the classes of 20 images evenly spread over all, not of the first 20.
    judge, classes = judges.load_features(models / "judge.pt"), next(data.held_out_batches(val_set, 20, 20))["class"]
    with torch.no_grad():
        new, probabilities = judge(model.sample(classes, seed=3).clamp(-1, 1))
        real, _ = judge(batch["image"])
    assert values["class_accuracy"] == pytest.approx((probabilities.argmax(1) == classes).double().mean().item())
    assert values["frechet_distance(judge)"] == pytest.approx(metrics.frechet_distance(real, new), rel=1e-3)
    parts = [metrics.frechet_distance(real, new[i::5]) for i in range(5)]
    spread = content["metrics"]["frechet_distance(judge)"]["spread"]
    assert spread == pytest.approx(torch.tensor(parts).std().item(), rel=1e-3)
    assert values["class_score(judge)"] == pytest.approx(metrics.inception_score(probabilities), rel=1e-5)
    assert values["nearest_training(judge)"] > 0 and values["nearest_training_of_held_out(judge)"] > 0
    assert (values["precision(judge)"], values["recall(judge)"]) == metrics.precision_recall(real, new)
    assert Image.open(models / content["flags"]["out"] / "neighbours.png").size == (10 * 66 + 2, 2 * 66 + 2)
    assert "20 new images" in done.stdout


@pytest.mark.parametrize("n", [10, 50, 100, 120])
def test_new_images_are_of_all_classes_equally(monkeypatch, n):
    """n below, at and above the number of held-out images, which a folder lists class by class: ten of five."""
    keys: list[tuple] = []
    monkeypatch.setattr(data, "loader", lambda dataset, batch_size, wanted: keys.extend(wanted) or [])
    new_codes = runpy.run_path(str(ROOT / "evaluate.py"))["new_codes"]
    list(new_codes(SimpleNamespace(n=n, batch_size=7, images=1000), None, range(50), None, None, None))
    assert [sum(i // 5 == c for i, _ in keys) for c in range(10)] == [n // 10] * 10


@pytest.mark.parametrize("flip", [False, True])
def test_a_copy_of_a_training_image_is_found(tmp_path, flip):
    """The features are the pixels; the second and the fourth sample are training images, mirrored where training
    mirrors, and shown above them."""
    images = torch.rand(9, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1

    class Images(list):
        def __getitem__(self, key):
            return {"image": super().__getitem__(key[0]), "class": 0}

    copies = images.flip(3) if flip else images
    samples = torch.stack([images[4] * 0, copies[3], images[0] / 2, copies[1]])
    config = SimpleNamespace(input_kind="rgb", in_channels=3)
    vqgan = SimpleNamespace(config=config, decode_indices=lambda i: samples[i])
    judge = mock.Mock(side_effect=lambda x: (x.flatten(1), torch.full((len(x), 2), 0.5)))
    judge.name = "pixels"
    args, table = SimpleNamespace(batch_size=2, images=100, out=str(tmp_path)), {}
    made = {"codes": torch.arange(4), "features": samples.flatten(1), "probabilities": torch.full((4, 2), 0.5)}
    compare = runpy.run_path(str(ROOT / "evaluate.py"))["compare_new_images"]
    train_set = Images(images[:5])
    train_set.flip = flip
    compare(args, judge, vqgan, made, train_set, Images(images[5:]), torch.device("cpu"), table)
    views = torch.cat([images[:5], images[:5].flip(3)]) if flip else images[:5]
    truth = (samples[:, None] - views).flatten(2).norm(dim=2).amin(1)
    assert table["nearest_training(pixels)"]["value"] == pytest.approx(truth.mean().item(), rel=1e-5)
    grid = np.asarray(Image.open(tmp_path / "neighbours.png"))
    above, below = (grid[2 + top : 66 + top, 2 : 2 * 66] for top in (0, 66))
    assert (above == below).all()


@pytest.mark.parametrize("name, size", [("vqgan", (21, 35)), ("vqgan", (1, 1)), ("labels", (12, 9))])
def test_images_of_any_size_to_codes_and_back(models, tmp_path, name, size):
    """The codes are those of the padded image, the three panels have the image's own size, PSNR is torchmetrics'."""
    (H, W), sub = size, "sub\x1b[2J"
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 9 if name == "labels" else 256, (H, W, 3)[: 2 if name == "labels" else 3], dtype=np.uint8)
    (tmp_path / "in" / sub).mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "in" / sub / "a.png")
    (tmp_path / "in" / "broken.png").write_text("not an image")
    words = ["evaluate.py", "--vqgan", f"{name}/last.pt", "--out", tmp_path / "out"]
    done = run_inside(*words, "--reconstruct", tmp_path / "in", cwd=models)
    assert done.returncode == 0 and "skipped: " in done.stdout, done.stderr
    assert "\x1b" not in done.stdout
    model = checkpoint.load_vqgan(models / name / "last.pt")
    x = data.open_image(tmp_path / "in" / sub / "a.png", model.config.input_kind, model.config.in_channels)
    rows, columns = (torch.arange(-(-side // 2) * 2).clamp(max=side - 1) for side in size)  # the border once more
    indices = model.encode_indices(x[:, :, rows][:, :, :, columns])
    codes = np.load(tmp_path / "out" / f"{sub}_a.png.npy")
    assert codes.dtype == np.uint16 and (codes == indices[0].numpy()).all()
    shown = np.asarray(Image.open(tmp_path / "out" / f"{sub}_a.png.png"))
    assert shown.shape == (H, 3 * W, 3)
    assert f"{codes.size * 4:,} bits of codes for {pixels.size * 8:,} of pixels" in done.stdout
    if name == "vqgan":
        assert (shown[:, :W] == pixels).all()
        x_hat = model.decode_indices(indices)[:, :, :H, :W].clamp(-1, 1)
        psnr = peak_signal_noise_ratio(x_hat, x, data_range=2.0).item()
        assert f"psnr {psnr:.4g}" in done.stdout
        assert abs(shown[:, W : 2 * W] - ((x_hat[0] + 1) * 127.5).permute(1, 2, 0).numpy()).max() < 0.51
        done = run_inside(*words, "--decode", tmp_path / "out" / f"{sub}_a.png.npy", cwd=models)
        assert done.returncode == 0, done.stderr
        decoded = np.asarray(Image.open(tmp_path / "out" / f"{sub}_a.png.decoded.png"))
        assert (decoded[:H, :W] == shown[:, W : 2 * W]).all()


@pytest.mark.parametrize("flip", [True, False])
def test_training_images_are_mirrored_only_if_training_mirrored_them(models, tmp_path, flip):
    make_photos(tmp_path / "photos", n=4, size=(16, 16))
    content = checkpoint.read(models / "vqgan/last.pt")
    content["flags"] |= {"data": str(tmp_path / "photos"), "image_size": 16, "resize": None, "flip": flip}
    torch.save(content, tmp_path / "model.pt")
    given = ("gpt", "official_config", "data", "image_size", "resize")
    args = SimpleNamespace(vqgan=tmp_path / "model.pt", **dict.fromkeys(given))
    train_set, _ = runpy.run_path(str(ROOT / "evaluate.py"))["open_sets"](args, checkpoint.load(args.vqgan))
    assert train_set.flip == flip


def test_an_evaluation_is_never_written_over(models, tmp_path):
    """Repeated without --out, it goes to a new folder (`evaluate` above)."""
    words = "evaluate.py --features none --perceptual none --images 2 --vqgan vqgan/last.pt --out".split()
    assert run_inside(*words, tmp_path / "new", cwd=models).returncode == 0
    before = (tmp_path / "new" / "metrics.json").read_bytes()
    for out, answer in ((tmp_path / "new", "already holds an evaluation"), ("", "--out: is empty")):
        assert_one_line_error(run_inside(*words, out, cwd=models), answer)
    assert (tmp_path / "new" / "metrics.json").read_bytes() == before
    assert_one_line_error(run_inside(*words, "/proc", cwd=models), "cannot read or write /proc")


def test_an_official_model(models, tmp_path):
    path, config = official_files(fixture("net2net_none"), tmp_path)
    words = ("--gpt", path, "--official-config", config, "--data", "shapes", "--image-size", "32", "--features", "none")
    _, values, _ = evaluate(*words, cwd=models)
    assert values["nats_per_token"] > 0 and values["ln_K"] == pytest.approx(math.log(64))


def test_mistakes(models, tmp_path, monkeypatch):
    """Each is found before anything is sampled or written."""
    monkeypatch.setattr("minvqgan.two_stage.TwoStage.sample_indices", None)  # an error, if it were called
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    np.save(tmp_path / "codes.npy", np.full((4, 4), 16))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "empty").mkdir()
    before = set(tmp_path.rglob("*"))
    own, new = f"--vqgan vqgan/last.pt --out {tmp_path}", f"--vqgan vqgan/last.pt --out {tmp_path}/new"
    for words, answer in (
        ("--gpt vqgan/last.pt", "holds a VQGAN"),
        ("--vqgan judge.pt", "classifier"),
        ("--vqgan vqgan/last.pt --features vqgan/last.pt", "not a classifier"),
        ("--vqgan vqgan/last.pt --gpt gpt/last.pt", "not allowed"),
        ("", "--vqgan"),
        ("--gpt gpt/last.pt --temperature -1", "temperature"),
        ("--gpt gpt/last.pt -n 3 --features judge.pt", "need 4 images, not 3: more -n"),
        ("--vqgan vqgan/last.pt --images 1 --features judge.pt", "need 4 images, not 1"),
        ("--gpt gpt/last.pt --features judge.pt --classifier nowhere.pt", "no checkpoint at nowhere.pt"),
        (f"{own} --reconstruct {tmp_path}", "is in the folder of the images; choose another one"),
        (f"{new} --reconstruct {tmp_path}/empty", "no images in"),
        (f"{new} --reconstruct {tmp_path}/nowhere.png", "nowhere.png cannot be read"),
        (f"{own} --reconstruct a --decode b", "not allowed"),
        (f"{own} --decode {tmp_path}/codes.npy", "indices must lie in [0, 16), got 16 to 16"),
        (f"{own} --decode {tmp_path}/objects.npy", "--decode"),
    ):
        assert_one_line_error(run_inside("evaluate.py", *words.split(), cwd=models), answer)
    assert set(tmp_path.rglob("*")) == before
