"""LPIPS against the `lpips` package, with the same random VGG16 on both sides, and against the definition."""

import lpips
import pytest
import torch
import torchvision
from torch import nn

from minvqgan.harness import checkpoint, metrics
from minvqgan.harness.runtime import UserError
from minvqgan.perceptual import LPIPS, VGG16Features

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
    return LPIPS(VGG16Features(vgg.features), metrics.lpips_weights()), theirs


def test_equal_to_the_lpips_package(both):
    ours, theirs = both
    x, y = torch.rand(3, 3, 64, 48) * 2 - 1, torch.rand(3, 3, 64, 48) * 2 - 1
    with torch.no_grad():
        truth = theirs(x, y).flatten()
        assert ((ours(x, y) - truth).abs() / truth).max() < 1e-6


def test_gradient_equal_to_the_lpips_package(both):
    x, y = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    grads = []
    for network in both:
        leaf = y.clone().requires_grad_()
        network(x, leaf).sum().backward()
        grads.append(leaf.grad)
    assert (grads[0] - grads[1]).abs().max() < 1e-5 * grads[1].abs().max()


def test_one_channel_is_judged_as_a_gray_picture(both):
    ours, theirs = both
    x, y = torch.rand(2, 1, 32, 32) * 2 - 1, torch.rand(2, 1, 32, 32) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(ours(x, y), theirs(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)).flatten(), rtol=1e-5)
        two = ours(torch.cat([x, y], 1), torch.cat([y, y], 1))
        assert torch.allclose(two, ours(x, y) / 2, rtol=1e-5)


def test_frozen_and_always_in_eval_mode(both):
    ours, _ = both
    ours.train()
    assert not any(module.training for module in ours.modules())
    assert not any(p.requires_grad for p in ours.parameters())
    x = torch.rand(1, 3, 32, 32)
    assert ours(x, x) == 0


def test_without_learned_weights_every_channel_counts_one():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3)

    class OneLayer(nn.Module):
        def forward(self, x):
            return [conv(x)]

    x, y = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    fx, fy = (f / f.norm(dim=1, keepdim=True) for f in (conv(x), conv(y)))
    assert torch.allclose(LPIPS(OneLayer())(x, y), (fx - fy).square().sum(1).mean((1, 2)))
    with pytest.raises(ValueError, match="shapes"):
        LPIPS(OneLayer())(x, y[:1])


def test_weights_of_other_names_are_refused(monkeypatch, tmp_path):
    """The bug of a much-used tutorial: unknown names, strict=False, training on noise."""
    (tmp_path / "weights" / "v0.1").mkdir(parents=True)
    torch.save({"lins.0.model.1.weight": torch.zeros(1, 64, 1, 1)}, tmp_path / "weights" / "v0.1" / "vgg.pth")
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(metrics, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match="does not hold the five weights"):
        metrics.lpips_weights()


def test_vgg_file_of_the_cache_is_read_strictly(monkeypatch, tmp_path):
    """The real loading code, on a file made here in the place where torchvision looks."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(UserError, match=r"download https://.*vgg16.*\.pth to .*or train with --perceptual none"):
        metrics.vgg16_lpips()
    torch.manual_seed(0)
    vgg = torchvision.models.vgg16(weights=None)
    name = torchvision.models.VGG16_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    torch.save(vgg.state_dict(), tmp_path / "checkpoints" / name)
    x, y = torch.rand(2, 1, 3, 32, 32)
    with torch.no_grad():
        truth = LPIPS(VGG16Features(vgg.features), metrics.lpips_weights())(x, y)
        assert torch.equal(metrics.vgg16_lpips()(x, y), truth)
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "checkpoints" / name)
    with pytest.raises(UserError, match="could not be loaded"):
        metrics.vgg16_lpips()
    (tmp_path / "checkpoints" / name).write_bytes(b"half a file")
    with pytest.raises(UserError, match="could not be loaded"):
        metrics.vgg16_lpips()


def test_a_classifier_of_ours_serves_as_feature_network(tmp_path):
    torch.manual_seed(0)
    classifier = metrics.Classifier(("cat", "dog")).eval()
    checkpoint.save(tmp_path / "c.pt", "classifier", classes=["cat", "dog"], model=classifier.state_dict())
    distance = metrics.load_perceptual(str(tmp_path / "c.pt"), image_size=32)
    x, y = torch.rand(2, 2, 3, 32, 32)
    truth = 0
    with torch.no_grad():
        maps = [classifier.feature_maps(picture) for picture in (x, y)]
        for a, b in zip(*maps, strict=True):
            a, b = (f / f.norm(dim=1, keepdim=True).clamp_min(1e-10) for f in (a, b))
            truth = truth + (a - b).square().sum(1).mean((1, 2))
        assert torch.allclose(distance(x, y), truth, rtol=1e-5)
        # Only with the learned weights is it LPIPS, and may be called so.
        assert torch.equal(metrics.image_metrics(x, y, distance)["perceptual"], distance(x, y))
        learned = LPIPS(distance.features, [torch.ones(c) for c in (64, 64, 128, 256, 512)])
        assert torch.allclose(metrics.image_metrics(x, y, learned)["lpips"], truth, rtol=1e-5)
        logits = classifier.net.fc(maps[0][-1].mean((2, 3)))
        assert torch.allclose(classifier(x), logits, atol=1e-5)
