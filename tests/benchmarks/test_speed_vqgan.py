"""A stage-one training step beside the official order of work, at equal architecture and batch.

The official order (taming-transformers, `VQModel.training_step` and `VQLPIPSWithDiscriminator.forward`), written down
here in plain form: the autoencoder and LPIPS run forward once for the generator's step and once more for the
discriminator's; lambda comes from two gradients through the decoder's last layer, and `backward` of the sum then runs
LPIPS and D backward a second time. Its tensors lie in the default memory format, its LPIPS is the
package's, its SiLU is written x * sigmoid(x), its Adam is not fused.
"""

from unittest import mock

import lpips
import pytest
import torch
import torchvision
from timing import paired_ratio

from minvqgan import VQGAN, VQGANConfig
from minvqgan.discriminator import PatchDiscriminator, adaptive_weight, generator_loss, hinge_loss
from minvqgan.harness.metrics import lpips_weights
from minvqgan.perceptual import LPIPS, VGG16Features

CONFIG = VQGANConfig(
    image_size=64,
    ch=32,
    ch_mult=(1, 2, 4),
    num_res_blocks=1,
    norm_groups=32,
    z_channels=64,
    codebook_size=512,
    code_dim=64,
)


def our_lpips():
    return LPIPS(VGG16Features(torchvision.models.vgg16(weights=None).features), lpips_weights())


def package_lpips():
    """The official code carries a copy of this package."""
    return lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval().requires_grad_(False)


class Parts:
    """Model, discriminator, LPIPS, optimizers and a batch, equal for both sides but for the memory format."""

    def __init__(self, with_lpips: bool, memory_format: torch.memory_format, fused: bool, make_lpips):
        torch.manual_seed(0)
        self.vqgan = VQGAN(CONFIG).to(memory_format=memory_format)
        self.disc = PatchDiscriminator(3, 64, 3).to(memory_format=memory_format)
        self.lpips = None
        if with_lpips:
            self.lpips = make_lpips().to(memory_format=memory_format)
        self.opt_g = torch.optim.Adam(self.vqgan.parameters(), 1e-5, betas=(0.5, 0.9), fused=fused)
        self.opt_d = torch.optim.Adam(self.disc.parameters(), 1e-5, betas=(0.5, 0.9), fused=fused)
        self.x = (torch.rand(8, 3, 64, 64) * 2 - 1).contiguous(memory_format=memory_format)

    def rec_loss(self, x_hat):
        loss = (self.x - x_hat).abs().mean()
        return loss if self.lpips is None else loss + self.lpips(self.x, x_hat).mean()


@mock.patch("torch.nn.functional.silu", lambda x, inplace=False: x * torch.sigmoid(x))
def official_order(p: Parts):
    x_hat, quantized = p.vqgan(p.x)
    rec_loss, gen_loss = p.rec_loss(x_hat), generator_loss(p.disc(x_hat))
    last = p.vqgan.decoder.conv_out.weight
    (rec,) = torch.autograd.grad(rec_loss, last, retain_graph=True)
    (gan,) = torch.autograd.grad(gen_loss, last, retain_graph=True)
    lambda_ = (rec.norm() / (gan.norm() + 1e-4)).clamp(0, 1e4).detach()
    p.opt_g.zero_grad()
    (rec_loss + 0.8 * lambda_ * gen_loss + quantized.loss).backward()
    p.opt_g.step()

    x_hat, _ = p.vqgan(p.x)
    p.rec_loss(x_hat)  # computed at the head of the loss's `forward` and not used in this half of the step
    p.opt_d.zero_grad()
    hinge_loss(p.disc(p.x), p.disc(x_hat.detach())).backward()
    p.opt_d.step()


def our_order(p: Parts):
    x_hat, quantized = p.vqgan(p.x)
    x_leaf = x_hat.detach().requires_grad_()
    (grad,) = torch.autograd.grad(p.rec_loss(x_leaf), x_leaf)
    logits_real, logits_fake = p.disc(p.x), p.disc(x_leaf)
    (gan_grad,) = torch.autograd.grad(generator_loss(logits_fake), x_leaf, retain_graph=True)
    lambda_, _, _ = adaptive_weight(grad, gan_grad, x_hat, p.vqgan.decoder.conv_out.weight)
    torch.autograd.backward([x_hat, quantized.loss], [grad + 0.8 * lambda_ * gan_grad, None])
    hinge_loss(logits_real, logits_fake).backward()
    for opt in (p.opt_g, p.opt_d):
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("with_lpips, at_least", [(True, 1.6), (False, 1.35)])
def test_training_step(benchmark, with_lpips, at_least):
    ours = Parts(with_lpips, torch.channels_last, fused=True, make_lpips=our_lpips)
    theirs = Parts(with_lpips, torch.contiguous_format, fused=False, make_lpips=package_lpips)
    median, low, high = paired_ratio(lambda: our_order(ours), lambda: official_order(theirs))
    benchmark.extra_info["ratio"] = f"{median:.2f} ({low:.2f} to {high:.2f})"
    benchmark.pedantic(our_order, (ours,), rounds=3)
    print(f"\nstep {'with' if with_lpips else 'without'} LPIPS: {median:.2f} x ({low:.2f} to {high:.2f}) as fast")
    assert median >= at_least
