"""The objective of stage one against autograd by the definition: the losses, lambda, the step; and D."""

import math

import pytest
import torch
from helpers import NoFloat64

from minvqgan import VQGAN, VQGANConfig
from minvqgan.discriminator import PatchDiscriminator
from minvqgan.harness import metrics
from minvqgan.objective import (
    ObjectiveConfig,
    adaptive_weight,
    adversarial_ramp,
    generator_loss,
    hinge_loss,
    log_loss,
    reconstruction_loss,
    stage_one_step,
    textbook_step,
)
from minvqgan.perceptual import LPIPS


class TwoLayers(torch.nn.Module):
    """A feature network for a perceptual loss without downloads."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Conv2d(3, 6, 3), torch.nn.Conv2d(6, 8, 3, stride=2)

    def forward(self, x):
        h = self.a(x).relu()
        return [h, self.b(h).relu()]


CONFIG = VQGANConfig(image_size=16, ch=8, ch_mult=(1, 2), z_channels=8, code_dim=4, codebook_size=16)


@pytest.fixture
def parts():
    torch.manual_seed(0)
    vqgan = VQGAN(CONFIG).double()
    disc = PatchDiscriminator(3, channels=8, num_layers=2).double()
    return vqgan, disc, LPIPS(TwoLayers()).double(), torch.rand(3, 3, 16, 16, dtype=torch.float64) * 2 - 1


def gradients(*modules):
    return [{name: p.grad.clone() for name, p in module.named_parameters()} for module in modules]


def assert_equal_gradients(ours, truth):
    """To rounding in float64, relative to the largest number of each parameter."""
    assert ours.keys() == truth.keys()
    for name, grad in ours.items():
        assert (grad - truth[name]).abs().max() <= 1e-6 * truth[name].abs().max() + 1e-12, name


@pytest.mark.parametrize("perceptual_weight", [0.0, 1.5])
@pytest.mark.parametrize("disc_loss", ["hinge", "log"])
@pytest.mark.parametrize("adv_fraction", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("max_lambda", [0.01, 1e4])
def test_one_pass_equals_the_textbook_step(parts, perceptual_weight, disc_loss, adv_fraction, max_lambda):
    """The step that training takes against plain `.backward()` on the losses, in G and in D."""
    vqgan, disc, perceptual, x = parts
    config = ObjectiveConfig("vqgan", perceptual_weight, disc_loss, 0.8, max_lambda)
    lambda_ = textbook_step(vqgan, disc, perceptual, x, config, adv_fraction)
    textbook = gradients(vqgan, disc)
    vqgan.zero_grad()
    disc.zero_grad()

    for fraction in (adv_fraction, torch.tensor(adv_fraction)):  # a number, and what a CUDA graph is given
        terms, _ = stage_one_step(vqgan, disc, perceptual, x, config, fraction)
        for ours, truth in zip(gradients(vqgan, disc), textbook, strict=True):
            assert_equal_gradients(ours, truth)
        vqgan.zero_grad()
        disc.zero_grad()
    assert terms["lambda"] == pytest.approx(lambda_.item(), rel=1e-6)
    assert (lambda_ == 0.01) == (max_lambda == 0.01), "the cap of the test must bite, and 1e4 must not"


@pytest.mark.parametrize("step", [textbook_step, stage_one_step])
def test_fixed_lambda_is_a_constant_weight(parts, step):
    """Plain autograd of L1 + 1.5 LPIPS + L_VQ + 0.5 * 0.8 * 0.03 L_GAN, over E, G and Z."""
    vqgan, disc, perceptual, x = parts
    config = ObjectiveConfig(perceptual_weight=1.5, disc_weight=0.8, fixed_lambda=0.03)
    step(vqgan, disc, perceptual, x, config, 0.5)
    (ours,) = gradients(vqgan)
    vqgan.zero_grad()
    x_hat, quantized = vqgan(x)
    rec_loss = (x - x_hat).abs().mean() + 1.5 * perceptual(x, x_hat).mean()
    (rec_loss + quantized.loss - 0.5 * 0.8 * 0.03 * disc(x_hat).mean()).backward()
    assert_equal_gradients(ours, gradients(vqgan)[0])


def test_without_d_only_the_reconstruction_trains(parts):
    vqgan, disc, perceptual, x = parts
    terms, quantized = stage_one_step(vqgan, None, perceptual, x, ObjectiveConfig(), adv_fraction=None)
    (ours,) = gradients(vqgan)
    vqgan.zero_grad()
    x_hat, again = vqgan(x)
    ((x - x_hat).abs().mean() + perceptual(x, x_hat).mean() + again.loss).backward()
    assert_equal_gradients(ours, gradients(vqgan)[0])
    assert terms.keys() == {"rec_loss", "l1", "perceptual", "codebook_loss"}
    assert torch.equal(quantized.indices, again.indices)
    stage_one_step(vqgan, disc, perceptual, x, ObjectiveConfig(), adv_fraction=0.0)
    assert all(p.grad is not None for p in disc.parameters()), "D learns alone while its gradient does not reach G"


def test_label_maps_and_vqvae(parts):
    """Cross-entropy of a one-hot map and its logits, and the squared error, by the definition."""
    x = parts[-1]
    one_hot = torch.eye(3, dtype=torch.float64)[torch.arange(9).view(1, 3, 3) % 3].permute(0, 3, 1, 2)
    logits = torch.randn(1, 3, 3, 3, dtype=torch.float64)
    for loss, truth, pair in (
        ("labels", -(logits.log_softmax(1) * one_hot).sum(1).mean(), (one_hot, logits)),
        ("vqvae", (x**2).mean(), (x, 0 * x)),
    ):
        assert reconstruction_loss(*pair, ObjectiveConfig(loss))["rec_loss"] == pytest.approx(truth.item())
    found = metrics.label_metrics(one_hot, one_hot.roll(1, 3))  # of a row's three pixels none is right
    assert found["pixel_accuracy"].tolist() == [0]
    assert found["cross_entropy"].tolist() == pytest.approx([math.log(2 + math.e)])


def test_lambda_by_hand():
    rec, gan = torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor([0.0, 2e-3])
    lambda_ = adaptive_weight(rec, gan)
    assert not lambda_.requires_grad and lambda_ == pytest.approx(5 / (2e-3 + 1e-6))
    assert adaptive_weight(rec, gan, max_lambda=5.0) == 5
    assert adaptive_weight(rec, 0 * gan) == 1e4  # delta: no division by zero


def test_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 0.5])
    assert hinge_loss(real, fake) == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 1.5) / 3))
    p_real, p_fake = (1 / (1 + (-logits).exp()) for logits in (real, fake))
    assert log_loss(real, fake) == pytest.approx((-p_real.log().mean() - (1 - p_fake).log().mean()).item() / 2)
    assert generator_loss(fake) == pytest.approx(2.5 / 3)
    assert generator_loss(fake, "log") == pytest.approx(-p_fake.log().mean().item())


def test_patch_and_smallest_image_are_what_the_docstring_says():
    """The pixels that one logit depends on, counted by its gradient."""
    for num_layers, patch in ((2, 34), (3, 70)):
        disc = PatchDiscriminator(1, channels=4, num_layers=num_layers).eval()
        smallest = 3 * 2**num_layers
        assert disc(torch.randn(2, 1, smallest, smallest)).numel() > 0
        x = torch.randn(1, 1, 128, 128, requires_grad=True)
        logits = disc(x)
        logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
        rows = x.grad[0, 0].abs().sum(1).nonzero()
        assert rows.max() - rows.min() + 1 == patch


def test_ramp():
    fractions = [adversarial_ramp(step, start=100, warmup=50, ramp=10) for step in (0, 100, 150, 151, 155, 160, 1000)]
    assert fractions == [0, 0, 0, 0.1, 0.5, 1, 1]
    assert adversarial_ramp(1, 0, 0, 0) == 1


def test_with_bfloat16_losses_are_float32(parts):
    """The distance of LPIPS with learned weights too, whose product autocast would take."""
    vqgan, disc, _, x = parts
    perceptual = LPIPS(TwoLayers(), [torch.rand(6), torch.rand(8)])
    terms, _ = stage_one_step(vqgan.float(), disc.float(), perceptual, x.float(), ObjectiveConfig(), amp=True)
    assert {value.dtype for value in terms.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_step_in_another_precision(dtype):
    """Gradients have the direction of those in float32; losses are float32 at least."""
    grads = []
    for other in (torch.float32, dtype):
        torch.manual_seed(0)
        vqgan, disc = VQGAN(CONFIG).train().to(other), PatchDiscriminator(3, 8, 2).to(other)
        perceptual = LPIPS(TwoLayers()).to(torch.promote_types(other, torch.float32))
        x = (torch.rand(3, 3, 16, 16) * 2 - 1).to(other)
        terms, _ = stage_one_step(vqgan, disc, perceptual, x, ObjectiveConfig())
        assert terms["rec_loss"].dtype == torch.promote_types(other, torch.float32)
        grads.append(torch.cat([p.grad.float().flatten() for p in vqgan.decoder.parameters()]))
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.98


def test_nothing_is_float64_in_training_and_validation():
    """Every operation on the device, of a step and of the held-out numbers, is watched."""
    torch.manual_seed(0)
    vqgan, disc, perceptual = VQGAN(CONFIG).train(), PatchDiscriminator(3, 8, 2), LPIPS(TwoLayers())
    x = torch.rand(3, 3, 16, 16) * 2 - 1
    with NoFloat64():
        stage_one_step(vqgan, None, None, x, ObjectiveConfig(loss="labels"), adv_fraction=None)
        _, quantized = stage_one_step(vqgan, disc, perceptual, x, ObjectiveConfig(disc_loss="log"), amp=True)
        vqgan.quantizer.revive_dead_codes(quantized.z)
        metrics.image_metrics(x, x, perceptual)
        metrics.label_metrics(x.gt(0).float(), x)
