"""The objective of stage one (Sec. 3.1, Eq. 4 to 7), from x_hat to the gradients of G and D.

    L_rec  = |x - x_hat| + perceptual_weight perceptual(x, x_hat)           instead of the squared error of Eq. 4
    L_D    = (mean max(0, 1 - D(x)) + mean max(0, 1 + D(x_hat))) / 2        instead of the log loss of Eq. 5
    L_G    = L_rec + L_VQ + disc_weight lambda L_GAN,   L_GAN = -mean D(x_hat)                          (Eq. 4, 6)
    lambda = |grad_{G_L} L_rec| / (|grad_{G_L} L_GAN| + delta),   G_L = the decoder's last layer        (Eq. 7)

`textbook_step` is these four lines as written (with L_GAN ramped in, see `adversarial_ramp`). `stage_one_step` computes
the same gradients in one pass, and is what training calls. Both add to the gradients; the caller steps the optimizers.

Letters: B batch, C channels, H x W pixels, h' x w' patches of D.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .options import check, option
from .quantizer import Quantized
from .vqgan import VQGAN


@dataclass
class ObjectiveConfig:
    """The choice of losses and their weights. `loss`: vqgan is all of the above; vqvae only the squared error and L_VQ
    (van den Oord et al. 2017); labels only the cross-entropy and L_VQ, for one-hot label maps and their logits.

    DEPARTURE: Eq. 6 has no disc_weight; the official code has, 0.8 in its models.
    """

    loss: str = option("vqgan", "vqvae: squared error alone; labels: by --input", choices=("vqgan", "vqvae", "labels"))
    perceptual_weight: float = option(1.0, "of the perceptual loss beside L1")
    disc_loss: str = option("hinge", "the paper writes log, its code trains with hinge", choices=("hinge", "log"))
    disc_weight: float = option(0.3, "of L_GAN, times lambda")
    max_lambda: float = option(0.05, "cap of the adaptive weight lambda")
    fixed_lambda: float = option(0.0, "a constant instead of the lambda of Eq. 7; 0: Eq. 7")
    # DEPARTURE: 1e-6 as in the paper; the official code has 1e-4.
    delta: float = option(1e-6, "added to the denominator of lambda")

    def __post_init__(self):
        check(self)


def reconstruction_loss(
    x: Tensor, x_hat: Tensor, config: ObjectiveConfig, perceptual: nn.Module | None = None
) -> dict[str, Tensor]:
    """L_rec of x, x_hat (B, C, H, W): {"rec_loss": scalar}, and its terms by name.

    DEPARTURE: the paper replaces the squared error of Eq. 4 by the perceptual loss alone. Its code adds L1, and so do
    we: LPIPS misses a small shift of colour, L1 does not.
    """
    if config.loss == "labels":
        # DEPARTURE: the official code has a binary cross-entropy for each label; a pixel has one label.
        return {"rec_loss": F.cross_entropy(x_hat, x.argmax(1))}
    if config.loss == "vqvae":
        return {"rec_loss": (x - x_hat).square().mean()}
    l1 = (x - x_hat).abs().mean()
    if perceptual is None:
        return {"rec_loss": l1, "l1": l1}
    distance = perceptual(x, x_hat).mean()
    return {"rec_loss": l1 + config.perceptual_weight * distance, "l1": l1, "perceptual": distance}


def hinge_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """L_D, hinge (Lim & Ye 2017, arXiv:1705.02894): logits (B, 1, h', w') of x and of x_hat -> scalar.

    A D that gives the same logit in [-1, 1] to both costs exactly 1.0; one that is sure and wrong more. Right logits
    beyond +-1 cost nothing, so a D that is sure and right stops growing.
    DEPARTURE: the paper's Eq. 5 is the log loss; the official code trains with this one, and so do we.
    """
    return 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())


def log_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """L_D of Eq. 5, (-log D(x) - log(1 - D(x_hat))) / 2 with D = sigmoid(logit). log 2 where D answers 0 to both."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


DISC_LOSS = {"hinge": hinge_loss, "log": log_loss}


def generator_loss(logits_fake: Tensor, disc_loss: str = "hinge") -> Tensor:
    """L_GAN: logits (B, 1, h', w') of x_hat -> scalar, low where D takes x_hat for real. hinge: -mean logit. log:
    -log D(x_hat).

    DEPARTURE: Eq. 5 read literally has log(1 - D(x_hat)), whose gradient vanishes where D is sure, just where G has
    most to learn. -log D has the same optimum (Goodfellow et al. 2014, Sec. 3). The official code uses -mean for both.
    """
    return -logits_fake.mean() if disc_loss == "hinge" else F.softplus(-logits_fake).mean()


def adversarial_ramp(step: int, start: int, warmup: int, ramp: int) -> float:
    """Fraction in [0, 1] of the adversarial gradient that reaches G at `step`.

    D learns from `start` on (in the paper after at least one epoch), alone for `warmup` steps; then its gradient is
    ramped in over `ramp` steps. Example: start 100, warmup 50, ramp 10: 0 up to step 150, 0.5 at 155, 1 from 160 on.
    DEPARTURE: in the official code (warmup = ramp = 0) an untrained D has full weight from
    its first step, because lambda scales any gradient to the length of L_rec's. Reconstructions break there.
    """
    return min(1.0, max(0.0, (step - start - warmup) / max(1, ramp)))


def adaptive_weight(
    rec_grad: Tensor, gan_grad: Tensor, max_lambda: float = 1e4, delta: float = 1e-6, fixed: float = 0.0
) -> Tensor:
    """lambda of Eq. 7, a detached scalar, from the gradients of L_rec and L_GAN with respect to G_L's weights; or the
    constant `fixed`, if it is not 0.

    DEPARTURE: the cap max_lambda. When D can no longer tell real from fake its gradient is noise, yet lambda scales it
    to the length of L_rec's: G changes faster than D learns, and D collapses (disc_loss 1.0). The official cap of 1e4
    is never reached; ours is near the lambda of a D that still learns.
    """
    lambda_ = (rec_grad.norm() / (gan_grad.norm() + delta)).clamp(max=max_lambda).detach()
    return torch.full_like(lambda_, fixed) if fixed else lambda_


def textbook_step(
    vqgan: VQGAN,
    disc: nn.Module,
    perceptual: nn.Module | None,
    x: Tensor,
    config: ObjectiveConfig,
    adv_fraction: float = 1.0,
) -> Tensor:
    """Eq. 4 to 7 as written; leaves the gradients of one step in vqgan and disc, and returns lambda.

    x (B, C, H, W). adv_fraction: see `adversarial_ramp`.
    """
    x_hat, quantized = vqgan(x)
    rec_loss = reconstruction_loss(x, x_hat, config, perceptual)["rec_loss"]
    gen_loss = generator_loss(disc(x_hat), config.disc_loss)

    last_layer = vqgan.decoder.conv_out.weight
    (rec_grad,) = torch.autograd.grad(rec_loss, last_layer, retain_graph=True)
    (gan_grad,) = torch.autograd.grad(gen_loss, last_layer, retain_graph=True)
    lambda_ = adaptive_weight(rec_grad, gan_grad, config.max_lambda, config.delta, config.fixed_lambda)  # Eq. 7

    (rec_loss + quantized.loss + adv_fraction * config.disc_weight * lambda_ * gen_loss).backward()  # Eq. 6, over G

    disc.zero_grad()  # G's loss left gradients in D, which would teach D to call fakes real
    DISC_LOSS[config.disc_loss](disc(x), disc(x_hat.detach())).backward()  # Eq. 5, over D; detached: not over G
    return lambda_


def stage_one_step(
    vqgan: VQGAN,
    disc: nn.Module | None,
    perceptual: nn.Module | None,
    x: Tensor,
    config: ObjectiveConfig,
    adv_fraction: float | Tensor | None = 1.0,
    amp: bool = False,
    scale: float = 1.0,
) -> tuple[dict[str, Tensor], Quantized]:
    """`textbook_step` with every network passed once; adds the gradients of one micro-batch to vqgan's and disc's.

    x: (B, C, H, W). adv_fraction: None: D is off. A number (or scalar tensor): see `adversarial_ramp`; at 0 D learns
    alone. amp: networks in bfloat16. scale: of all gradients, 1/n for n micro-batches.
    -> (measurements {name: scalar}, Quantized).

    Why one pass is enough: L_rec and L_GAN depend on the network through x_hat alone, and a backward pass is linear in
    the gradient it starts from,

        d(L_rec + lambda L_GAN)/d theta = (d x_hat/d theta)^T (dL_rec/dx_hat + lambda dL_GAN/dx_hat)

        x -> E -> q -> G -> G_L -> x_hat -+-> L1 and perceptual network -> L_rec
                                          +-> D ------------------------> L_GAN

    1. Each loss goes back to x_hat.  2. Both gradients go on through G_L alone, which gives lambda.  3. Their weighted
    sum goes through G_L, G, q and E. (The textbook runs the perceptual network and D backward twice, and D forward
    three times.)

    DEPARTURE: the official code makes new reconstructions for D's step, with the weights just updated. Here D learns
    from those that G learned from, one step older.
    DEPARTURE: with several micro-batches lambda, D's batch statistics and the judgement of dead codes are those of each
    micro-batch, as in the official code, and not of the whole batch.
    """
    autocast = torch.autocast(x.device.type, torch.bfloat16, enabled=amp)
    with autocast:
        x_hat, quantized = vqgan(x)
    dtype = torch.promote_types(x.dtype, torch.float32)  # of the losses, whatever the networks run in
    x_hat, real = x_hat.to(dtype), x.to(dtype)
    x_leaf = x_hat.detach().requires_grad_()  # what the losses see: their gradients stop here

    # 1. Each loss goes back to x_hat.
    with autocast:
        terms = reconstruction_loss(real, x_leaf, config, perceptual) | {"codebook_loss": quantized.loss}
    (grad,) = torch.autograd.grad(terms["rec_loss"], x_leaf)
    if disc is not None and adv_fraction is not None:
        with autocast:
            logits_real, logits_fake = disc(x).to(dtype), disc(x_leaf.to(x.dtype)).to(dtype)  # each (B, 1, h', w')
        terms["gen_loss"] = generator_loss(logits_fake, config.disc_loss)
        # The gradient of x_leaf alone, so that G's loss leaves none in D.
        (gan_grad,) = torch.autograd.grad(terms["gen_loss"], x_leaf, retain_graph=True)

        # 2. Both gradients go through G_L.
        at_last_layer = last_layer_gradients(vqgan, x_hat, grad, gan_grad)
        terms["lambda"] = adaptive_weight(*at_last_layer, config.max_lambda, config.delta, config.fixed_lambda)  # Eq. 7
        grad = grad + adv_fraction * config.disc_weight * terms["lambda"] * gan_grad  # Eq. 6

        # D's own loss, from the same logits. They are of x_leaf, which is x_hat.detach(): nothing of it reaches G.
        terms["disc_loss"] = DISC_LOSS[config.disc_loss](logits_real, logits_fake)
        (scale * terms["disc_loss"]).backward()  # Eq. 5, over D
        terms |= {"logits_real": logits_real.mean(), "logits_fake": logits_fake.mean()}

    # 3. Their weighted sum, and L_VQ, go through the whole network.
    ones = torch.ones_like(quantized.loss)
    torch.autograd.backward([x_hat, quantized.loss], [scale * grad, scale * ones])  # Eq. 4 and 6, over E, G and Z
    return {name: value.detach() for name, value in terms.items()}, quantized


def last_layer_gradients(vqgan: VQGAN, x_hat: Tensor, rec_grad: Tensor, gan_grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of losses at x_hat (B, C, H, W) -> those at the weights of G_L, (C, ch, 3, 3), for the batch of all
    processes. DEPARTURE: officially each process has a lambda of its own."""
    vqgan = getattr(vqgan, "module", vqgan)  # wrapped under torchrun
    last_layer = vqgan.decoder.conv_out.weight
    (rec,) = torch.autograd.grad(x_hat, last_layer, rec_grad, retain_graph=True)
    (gan,) = torch.autograd.grad(x_hat, last_layer, gan_grad, retain_graph=True)
    if dist.is_initialized():
        for grad in (rec, gan):
            dist.all_reduce(grad)
            grad /= dist.get_world_size()
    return rec, gan
