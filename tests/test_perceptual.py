"""LPIPS against the `lpips` package, with the same random VGG16 on both sides, and against the definition."""

import lpips
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import make_photos
from torch import nn

from minvqgan.harness import judges, metrics
from minvqgan.harness.judges import Classifier, load_classifier, save_classifier
from minvqgan.harness.runtime import UserError
from minvqgan.perceptual import LPIPS, SmallFeatures, VGG16Features, blur_pool

# The package calls torchvision by its old names.
pytestmark = pytest.mark.filterwarnings("ignore:.*pretrained", "ignore:Arguments other than")


@pytest.fixture(scope="module")
def both():
    torch.manual_seed(0)
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    vgg = torchvision.models.vgg16(weights=None)
    source = [m for m in theirs.net.modules() if isinstance(m, nn.Conv2d)]
    convs = [m for m in vgg.features if isinstance(m, nn.Conv2d)]
    for ours, other in zip(convs, source, strict=True):
        ours.load_state_dict(other.state_dict())
    return LPIPS(VGG16Features(vgg.features), judges.lpips_weights()), theirs


def test_value_and_gradient_equal_to_the_lpips_package(both):
    ours, theirs = both
    x, y = torch.rand(3, 3, 64, 48) * 2 - 1, (torch.rand(3, 3, 64, 48) * 2 - 1).requires_grad_()
    distance, truth = ours(x, y), theirs(x, y).flatten()
    assert ((distance - truth).abs() / truth).max() < 1e-6
    (grad,), (true_grad,) = (torch.autograd.grad(d.sum(), y) for d in (distance, truth))
    assert (grad - true_grad).abs().max() < 1e-5 * true_grad.abs().max()
    with pytest.raises(ValueError, match="shapes"):
        ours(x, y[:1])


@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-9, 1e-6])
def test_gradient_where_all_channels_are_almost_0(size):
    """As ReLUs leave them. The slope of f / |f| grows like 1 / |f|: without a guard one step ruins the decoder."""

    class Itself(nn.Module):
        def forward(self, x):
            return [x]

    x = torch.full((1, 3, 1, 1), size, requires_grad=True)
    LPIPS(Itself())(x, torch.ones(1, 3, 1, 1)).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() < 1e5


def test_one_channel_is_judged_as_a_gray_image_by_a_frozen_network(both):
    ours, theirs = both
    ours.train()
    assert not any(module.training for module in ours.modules())
    assert not any(p.requires_grad for p in ours.parameters())
    x, y = torch.rand(2, 1, 32, 32) * 2 - 1, torch.rand(2, 1, 32, 32) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(ours(x, y), theirs(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)).flatten(), rtol=1e-5)
        two = ours(torch.cat([x, y], 1), torch.cat([y, y], 1))
        assert torch.allclose(two, ours(x, y) / 2, rtol=1e-5)


def test_weights_of_other_names_are_refused(monkeypatch, tmp_path):
    """The bug of a much-used tutorial: unknown names, strict=False, training on noise."""
    (tmp_path / "weights" / "v0.1").mkdir(parents=True)
    torch.save({"lins.0.model.1.weight": torch.zeros(1, 64, 1, 1)}, tmp_path / "weights" / "v0.1" / "vgg.pth")
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(judges, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match="does not hold the five weights"):
        judges.lpips_weights()


def test_vgg_file_of_the_cache_is_read_strictly(monkeypatch, tmp_path):
    """The real loading code, on a file made here in the place where torchvision looks."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    torch.manual_seed(0)
    vgg = torchvision.models.vgg16(weights=None)
    name = torchvision.models.VGG16_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    (tmp_path / "checkpoints").mkdir()
    torch.save(vgg.state_dict(), tmp_path / "checkpoints" / name)
    x, y = torch.rand(2, 1, 3, 32, 32)
    with torch.no_grad():
        truth = LPIPS(VGG16Features(vgg.features), judges.lpips_weights())(x, y)
        assert torch.equal(judges.load_perceptual("vgg16", 32)(x, y), truth)
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "checkpoints" / name)
    with pytest.raises(UserError, match="could not be loaded"):
        judges.load_perceptual("vgg16", 32)


@pytest.mark.parametrize("network", ["residual", "small"])
def test_a_classifier_of_ours_serves_as_feature_network(tmp_path, network):
    torch.manual_seed(0)
    save_classifier(tmp_path / "c.pt", Classifier(("cat", "dog"), network))
    classifier = load_classifier(tmp_path / "c.pt")
    distance = judges.load_perceptual(str(tmp_path / "c.pt"), image_size=32)
    x, y = torch.rand(2, 2, 3, 32, 32)
    with torch.no_grad():
        maps = [classifier.features(image) for image in (x, y)]
        pairs = ([F.normalize(f, dim=1) for f in pair] for pair in zip(*maps, strict=True))
        truth = sum((a - b).square().sum(1).mean((1, 2)) for a, b in pairs)
        assert torch.allclose(distance(x, y), truth, rtol=1e-5)
        # Only with the learned weights is it LPIPS, and may be called so.
        assert torch.equal(metrics.image_metrics(x, y, distance)["perceptual"], distance(x, y))
        learned = LPIPS(distance.features, [torch.ones(c) for c in (32, 64, 128)])
        assert torch.allclose(metrics.image_metrics(x, y, learned)["lpips"], truth, rtol=1e-5)
        assert torch.allclose(classifier(x), classifier.head(maps[0][-1].mean((2, 3))), atol=1e-5)


def test_a_judge_is_trained_on_crops_and_replaces_no_other_file(tmp_path):
    make_photos(tmp_path / "photos", n=6, size=(30, 24))
    words = ["--data", str(tmp_path / "photos"), "--task", "rotations", "--steps", "2", "--batch-size", "4"]
    words += ["--image-size", "16", "--resize", "20", "--out"]
    assert judges.main([*words, str(tmp_path / "judge.pt")]) == 0
    assert load_classifier(tmp_path / "judge.pt").classes == ("0", "90", "180", "270")
    assert judges.load_features(str(tmp_path / "judge.pt"))(torch.zeros(1, 3, 16, 16))[1].sum().isclose(torch.ones(()))
    photo = next((tmp_path / "photos").iterdir())
    before = photo.read_bytes()
    with pytest.raises(UserError):
        judges.main([*words, str(photo)])
    with pytest.raises(UserError, match="fewer than two classes"):
        judges.main(["--data", str(tmp_path / "photos"), "--out", str(tmp_path / "new.pt")])
    assert photo.read_bytes() == before


def test_the_small_network_comes_with_the_package():
    """It serves sides of 32 and 64, and gray images."""
    assert judges.SMALL.stat().st_size < 2**20 and (judges.SMALL.parent / "README.md").exists()
    distance = judges.load_perceptual("small", 32)
    rng = torch.Generator().manual_seed(0)
    for shape in ((2, 3, 32, 32), (2, 1, 64, 64)):
        x = F.interpolate(torch.rand(*shape[:2], 8, 8, generator=rng) * 2 - 1, shape[2:], mode="bicubic")
        noisy = x + 0.1 * torch.randn(shape, generator=rng)
        with torch.no_grad():
            assert torch.equal(distance(x, x), torch.zeros(len(x)))
            assert (distance(x, noisy) > 0.01).all() and (distance(x, noisy) < distance(x, noisy.flip(2))).all()


def test_folding_batch_norm_changes_no_feature():
    torch.manual_seed(0)
    features = SmallFeatures()
    features(torch.randn(8, 3, 16, 16))  # running statistics other than 0 and 1
    for norm in (m for m in features.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 2), nn.init.uniform_(norm.bias, -1, 1)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        truth = features.eval()(x)
        for ours, map_ in zip(features.fold_batch_norm()(x), truth, strict=True):
            assert torch.allclose(ours, map_, atol=1e-5)


def test_blur_pooling_is_a_convolution_with_1_2_1():
    x = torch.randn(2, 3, 8, 8)
    line = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = torch.outer(line, line).expand(3, 1, 3, 3)
    truth = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, stride=2, groups=3)
    assert torch.allclose(blur_pool(x), truth, atol=1e-6)
