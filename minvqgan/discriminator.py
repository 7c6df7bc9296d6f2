"""Everything adversarial (Sec. 3.1, Eq. 5 to 7): the patch discriminator D, its losses, and the adaptive weight lambda.

    D learns  L_D = mean max(0, 1 - D(x)) + mean max(0, 1 + D(x_hat)), halved    (hinge; the paper has the log loss)
    G learns  L_rec + lambda L_GAN,   L_GAN = -mean D(x_hat)                                            (Eq. 6)
    lambda = |grad_{G_L} L_rec| / (|grad_{G_L} L_GAN| + delta),   G_L = the decoder's last layer         (Eq. 7)

Letters: B batch, C channels, H x W pixels, h' x w' patches.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """D of pix2pix (Isola et al. 2017, arXiv:1611.07004): x (B, C, H, W) -> (B, 1, h', w'), one logit a patch.

    It never sees the whole picture: each logit judges a patch (70 pixels wide for num_layers = 3, 34 for 2), so it
    learns texture and edges, and leaves the composition to stage two. H and W must be at least 2^(num_layers + 2).
    """

    def __init__(self, in_channels: int = 3, channels: int = 64, num_layers: int = 3):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        c = channels
        for n in range(1, num_layers + 1):
            c_next = channels * min(2**n, 8)
            stride = 2 if n < num_layers else 1
            # No bias: the BatchNorm that follows would subtract it again.
            layers += [
                nn.Conv2d(c, c_next, 4, stride, padding=1, bias=False),
                nn.BatchNorm2d(c_next),
                nn.LeakyReLU(0.2),
            ]
            c = c_next
        layers.append(nn.Conv2d(c, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        self.apply(self._init)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # (B, C, H, W) -> (B, 1, h', w')


def hinge_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """L_D, hinge (Lim & Ye 2017, arXiv:1705.02894). 1.0 means that D cannot tell: it answers 0 to everything.

    Logits beyond +-1 on the right side cost nothing more, so a D that is sure stops moving instead of running away.
    DEPARTURE: the paper's Eq. 5 is the log loss; the official code trains with this one, and so do we.
    """
    return 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())


def log_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """L_D of Eq. 5, -log D(x) - log(1 - D(x_hat)) with D = sigmoid(logit), halved. log 2 means that D cannot tell."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


def generator_loss(logits_fake: Tensor) -> Tensor:
    """L_GAN: G wants the logits of its images high."""
    return -logits_fake.mean()


def adversarial_ramp(step: int, start: int, warmup: int, ramp: int) -> float:
    """Share in [0, 1] of the adversarial gradient that reaches G at `step`.

    D begins to learn at `start`; for `warmup` steps it learns alone, then its gradient comes in over `ramp` steps.
    DEPARTURE: the official code lets an untrained D push with full weight from its first step, and reconstructions
    break there: that gradient has a length (lambda gives it one) but no meaning yet.
    """
    return min(1.0, max(0.0, (step - start - warmup) / max(1, ramp)))


def adaptive_weight(
    rec_grad: Tensor,
    gan_grad: Tensor,
    x_hat: Tensor,
    last_weight: Tensor,
    delta: float = 1e-6,
    max_weight: float = 1e4,
) -> tuple[Tensor, Tensor, Tensor]:
    """lambda of Eq. 7 from the two losses' gradients at x_hat -> (lambda, |grad L_rec|, |grad L_GAN|), detached
    scalars.

    rec_grad, gan_grad: dL_rec/dx_hat and dL_GAN/dx_hat, (B, C, H, W).
    x_hat: the decoder's output, still in its graph. last_weight: G_L's weight.
    delta: 1e-6 as in the paper (the official code has 1e-4).
    max_weight: lambda is clamped to [0, max_weight]. It makes up for a small gradient of D, also where that is small
        because D has nothing to say any more: then G is pushed by noise at full strength, outruns whatever D learns
        next, and D stays silent. The 1e4 of the official code never bites; a cap near the lambda of an awake D does.

    Why one pass is enough. Both losses depend on the network through x_hat alone, and a backward pass is linear in the
    gradient that it is fed with:

        d(L_rec + lambda L_GAN)/d theta = (d x_hat/d theta)^T (dL_rec/dx_hat + lambda dL_GAN/dx_hat)

    So the two gradients at x_hat are taken once each (through LPIPS and D, not through the network). Pushed through
    the last convolution alone, a single layer, they give the two norms and with them lambda. Then their weighted sum
    goes back through the whole network once. The textbook way, `backward` on L_rec + lambda L_GAN after two
    `autograd.grad`, runs LPIPS and D backward twice for the same numbers.
    """
    grads = [torch.autograd.grad(x_hat, last_weight, g, retain_graph=True)[0] for g in (rec_grad, gan_grad)]
    if dist.is_initialized():  # the ratio of the whole batch's gradients, not of this process's share
        for g in grads:
            dist.all_reduce(g)
            g /= dist.get_world_size()
    rec_norm, gan_norm = (g.norm() for g in grads)
    return (rec_norm / (gan_norm + delta)).clamp(0, max_weight), rec_norm, gan_norm
