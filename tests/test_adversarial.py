"""D, its losses and the adaptive weight, against autograd by the definition."""

import math

import pytest
import torch

from minvqgan import VQGAN, VQGANConfig
from minvqgan.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    adversarial_ramp,
    generator_loss,
    hinge_loss,
    log_loss,
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


@pytest.fixture
def parts():
    torch.manual_seed(0)
    config = VQGANConfig(image_size=16, ch=8, ch_mult=(1, 2), z_channels=8, code_dim=4, codebook_size=16)
    vqgan = VQGAN(config).double()
    disc = PatchDiscriminator(3, channels=8, num_layers=2).double()
    return vqgan, disc, LPIPS(TwoLayers()).double(), torch.rand(3, 3, 16, 16, dtype=torch.float64) * 2 - 1


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def test_one_pass_equals_the_textbook_step(parts):
    """backward() of L_rec + lambda L_GAN + L_VQ, with lambda from two autograd.grad, against the step of the script."""
    vqgan, disc, perceptual, x = parts

    x_hat, quantized = vqgan(x)
    rec_loss = (x - x_hat).abs().mean() + perceptual(x, x_hat).mean()
    gen_loss = generator_loss(disc(x_hat))
    last = vqgan.decoder.conv_out.weight
    (rec,) = torch.autograd.grad(rec_loss, last, retain_graph=True)
    (gan,) = torch.autograd.grad(gen_loss, last, retain_graph=True)
    lambda_ = (rec.norm() / (gan.norm() + 1e-6)).detach()
    (rec_loss + 0.8 * lambda_ * gen_loss + quantized.loss).backward()
    textbook = gradients(vqgan)

    vqgan.zero_grad()
    disc.zero_grad()
    x_hat, quantized = vqgan(x)
    x_leaf = x_hat.detach().requires_grad_()
    (rec_grad,) = torch.autograd.grad((x - x_leaf).abs().mean() + perceptual(x, x_leaf).mean(), x_leaf)
    logits_fake = disc(x_leaf)
    (gan_grad,) = torch.autograd.grad(generator_loss(logits_fake), x_leaf, retain_graph=True)
    ours, _, _ = adaptive_weight(rec_grad, gan_grad, x_hat, last)
    torch.autograd.backward([x_hat, quantized.loss], [rec_grad + 0.8 * ours * gan_grad, None])

    assert torch.allclose(ours, lambda_, rtol=1e-6)
    for name, grad in gradients(vqgan).items():
        assert (grad - textbook[name]).abs().max() <= 1e-6 * textbook[name].abs().max() + 1e-12, name


def test_the_generators_step_leaves_no_gradient_in_d_and_ds_step_none_in_g(parts):
    vqgan, disc, _, x = parts
    x_hat, _ = vqgan(x)
    x_leaf = x_hat.detach().requires_grad_()
    logits_real, logits_fake = disc(x), disc(x_leaf)
    torch.autograd.grad(generator_loss(logits_fake), x_leaf, retain_graph=True)
    assert all(p.grad is None for p in disc.parameters())
    hinge_loss(logits_real, logits_fake).backward()
    ours = gradients(disc)
    disc.zero_grad()
    hinge_loss(disc(x), disc(x_hat.detach())).backward()  # the textbook way, with a forward pass of its own
    assert all(torch.equal(grad, ours[name]) for name, grad in gradients(disc).items())
    assert all(p.grad is None for p in vqgan.parameters())


def test_lambda_is_detached_and_clamped(parts):
    vqgan, _, _, x = parts
    x_hat, _ = vqgan(x)
    g = torch.randn_like(x_hat)
    lambda_, rec_norm, gan_norm = adaptive_weight(g, 1e-3 * g, x_hat, vqgan.decoder.conv_out.weight)
    assert not lambda_.requires_grad
    assert lambda_ == pytest.approx((rec_norm / (gan_norm + 1e-6)).item()) and lambda_ > 900
    assert adaptive_weight(g, 1e-3 * g, x_hat, vqgan.decoder.conv_out.weight, max_weight=5.0)[0] == 5
    assert adaptive_weight(g, 0 * g, x_hat, vqgan.decoder.conv_out.weight)[0] == 1e4  # delta: no division by zero


def test_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 0.5])
    assert hinge_loss(real, fake) == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 1.5) / 3))
    d = lambda logit: 1 / (1 + math.exp(-logit))  # noqa: E731
    truth = -sum(math.log(d(r)) for r in (2.0, 0.5, -1.0)) / 3 - sum(math.log(1 - d(f)) for f in (-3.0, 0.0, 0.5)) / 3
    assert log_loss(real, fake) == pytest.approx(truth / 2)
    assert generator_loss(fake) == pytest.approx(2.5 / 3)


def test_d_can_tell_apart_what_differs_in_texture():
    torch.manual_seed(0)
    disc = PatchDiscriminator(3, channels=8, num_layers=2)
    opt = torch.optim.Adam(disc.parameters(), 2e-3, betas=(0.5, 0.9))
    for _ in range(60):
        sharp = torch.randn(8, 3, 16, 16).sign() * 0.5
        blurred = torch.nn.functional.avg_pool2d(sharp, 3, 1, 1)
        loss = hinge_loss(disc(sharp), disc(blurred))
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert loss < 0.2


def test_patch_size_is_what_the_docstring_says():
    """The pixels that one logit depends on, counted by its gradient."""
    for num_layers, patch in ((2, 34), (3, 70)):
        disc = PatchDiscriminator(1, channels=4, num_layers=num_layers).eval()
        x = torch.randn(1, 1, 128, 128, requires_grad=True)
        logits = disc(x)
        logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
        rows = x.grad[0, 0].abs().sum(1).nonzero()
        assert rows.max() - rows.min() + 1 == patch


def test_smallest_picture_of_d():
    for num_layers in (2, 3):
        size = 2 ** (num_layers + 2)
        assert PatchDiscriminator(3, 4, num_layers)(torch.randn(2, 3, size, size)).numel() > 0


def test_ramp():
    shares = [adversarial_ramp(step, start=100, warmup=50, ramp=10) for step in (0, 100, 150, 151, 155, 160, 1000)]
    assert shares == [0, 0, 0, 0.1, 0.5, 1, 1]
    assert adversarial_ramp(1, 0, 0, 0) == 1
