"""The quantizer q and its codebook Z of Sec. 3.1: every latent vector is replaced by the nearest of K learned codes.

    z_q = q(z),   q(z)_ij = argmin over e_k in Z of |z_ij - e_k|                                        (Eq. 2)
    L_VQ = |sg[z] - z_q|^2 + beta |sg[z_q] - z|^2,   sg = stop-gradient (`detach`)         (Eq. 4, v1 and v2)

The first term moves the codes to the latents, the second (the *commitment*) moves the latents to their codes. Eq. 4 has
|x - x_hat|^2 beside them (`objective.py`) and, in the paper's third version, no beta (`codebook_loss` tells why). The
argmin has no gradient; the decoder's gradient at z_q is handed to z as it is ("straight-through", Eq. 3).

Letters: B batch, D dims of a code, h x w latent map, N = B*h*w vectors, K codes.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# The N x K distances are made in blocks of at most this many numbers (float32: 256 MB).
MAX_DISTANCES = 2**26


class Quantized(NamedTuple):
    z_q: Tensor  # (B, D, h, w) codes, with the gradient handed on to z
    indices: Tensor  # (B, h, w) int64 in [0, K)
    loss: Tensor  # scalar, the codebook loss L_VQ
    z: Tensor  # (B, D, h, w) what q read; detached


def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """Eq. 2: the index of the nearest row of `codebook` (K, D) for each row of `z` (N, D) -> (N,) int64.

    |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 is the same for all codes: one matrix product is all it takes. Call it
    with float32: in bfloat16 the products round to 3 digits and near neighbours are mixed up.
    """
    e_squared = codebook.square().sum(1)  # (K,)
    blocks = z.split(max(1, MAX_DISTANCES // len(codebook)))
    return torch.cat([torch.addmm(e_squared, block, codebook.T, alpha=-2).argmin(1) for block in blocks])


def straight_through(z: Tensor, z_q: Tensor) -> Tensor:
    """The value of z_q with the gradient of z: d out / d z = 1 and d out / d z_q = 0 (Bengio et al. 2013)."""
    return z + (z_q - z).detach()


def rotation_trick(z: Tensor, z_q: Tensor) -> Tensor:
    """The value of z_q as a constant rotation and scaling of z: d out / d z = (|z_q| / |z|) R (Fifty et al. 2024,
    arXiv:2410.06424).  z, z_q: (N, D) -> (N, D).

    Straight-through hands the same gradient to every z of a cell. Here it turns along with the angle between z and its
    code. R = I - 2 r r^T + 2 e u^T turns u = z/|z| to e = z_q/|z_q|, with r the unit vector halfway between them.
    """
    with torch.no_grad():
        z_norm, e_norm = z.norm(dim=1, keepdim=True).clamp_min(1e-6), z_q.norm(dim=1, keepdim=True)  # (N, 1)
        u, e = z / z_norm, z_q / e_norm.clamp_min(1e-6)
        r = F.normalize(u + e, dim=1)
    rotated = z - 2 * r * (r * z).sum(1, keepdim=True) + 2 * e * (u * z).sum(1, keepdim=True)
    return rotated * (e_norm / z_norm)


def codebook_stats(counts: Tensor) -> tuple[float, float]:
    """How often each code was chosen, counts (K,) -> (usage, perplexity).

    usage: fraction of the codes chosen at all, in [0, 1]. perplexity: exp(entropy), in [1, K]: the number of equally
    frequent codes that would carry as much. K codes of which 20 do the work have usage 1 and perplexity 20.
    """
    counts = counts.cpu().double()  # float64 not on the device: Apple's GPUs have none
    p = counts / counts.sum().clamp_min(1)
    entropy = -(p * p.clamp_min(1e-30).log()).sum()
    return (counts > 0).double().mean().item(), entropy.exp().item()


def count_codes(indices: Tensor, codebook_size: int) -> Tensor:
    """How often each code was chosen, over all processes: indices of any shape -> (K,) float32."""
    # Not torch.bincount, which makes a GPU wait: it looks for the largest index first.
    ones = torch.ones(indices.numel(), device=indices.device)
    counts = ones.new_zeros(codebook_size).index_add_(0, indices.flatten(), ones)
    if dist.is_initialized():  # all processes must agree on which codes are dead
        dist.all_reduce(counts)
    return counts


class VectorQuantizer(nn.Module):
    """q and Z.  forward: z (B, D, h, w) -> Quantized.

    codebook_size K, code_dim D
    beta: weight of the commitment term
    legacy: put beta on the *other* term, as the official code did for a long time and its published models were
        trained (taming-transformers, `VectorQuantizer2(legacy=True)`); see `codebook_loss`
    l2_norm: compare directions only, latents and codes both scaled to length 1 (Yu et al. 2021, arXiv:2110.04627)
    rotation: hand the gradient on by `rotation_trick` instead of `straight_through`
    """

    def __init__(
        self,
        codebook_size: int,
        code_dim: int,
        beta: float = 0.25,
        legacy: bool = False,
        l2_norm: bool = False,
        rotation: bool = False,
    ):
        super().__init__()
        self.codebook_size, self.beta, self.legacy = codebook_size, beta, legacy
        self.l2_norm, self.rotation = l2_norm, rotation
        self.codebook = nn.Embedding(codebook_size, code_dim)
        # The official code's start: small and uniform. Untouched, a few codes near the latents win every comparison and
        # the rest never move, because the loss pulls only on codes that were chosen. `revive_dead_codes` is the cure.
        nn.init.uniform_(self.codebook.weight, -1 / codebook_size, 1 / codebook_size)
        # Running fraction of the latents that chose each code; 0 before the first batch: all codes begin as dead.
        self.register_buffer("recent_use", torch.zeros(codebook_size))
        # How often each code was chosen in training, over all processes, since somebody set it to 0: for the log. No
        # buffer, because it is none of the model's.
        self.counts: Tensor | float = 0.0

    def codes(self) -> Tensor:
        """The K codes as they are compared: (K, D)."""
        return F.normalize(self.codebook.weight, dim=1) if self.l2_norm else self.codebook.weight

    def embed(self, indices: Tensor) -> Tensor:
        """Codes of given indices: (B, h, w) int64 -> (B, D, h, w)."""
        return F.embedding(indices, self.codes()).permute(0, 3, 1, 2)

    def codebook_loss(self, z: Tensor, z_q: Tensor) -> Tensor:
        """L_VQ of Eq. 4, the mean over all numbers of z and z_q (any equal shape) -> scalar.

        Both terms have the same value and differ only in who moves, so a misplaced beta shows in no loss curve. That
        happened; beta has a story of three parts:
          1. VQ-VAE, and the first versions of the paper, weigh the *commitment* (the latents' move) by beta = 0.25.
          2. The official code multiplied the other term (`legacy=True`; its published models were trained so): the
             commitment then has weight 1.
          3. The third version of the paper has no beta: with the swap the commitment had weight 1 in all models, so
             its Eq. 4 gives both terms weight 1 (`beta=1` here). The published weights come from 2.
        DEPARTURE: the default is VQ-VAE's 0.25 on the commitment; and means instead of Eq. 4's sums, as in the official
        code.
        """
        codes_to_latents = (z_q - z.detach()).square().mean()
        latents_to_codes = (z_q.detach() - z).square().mean()
        if self.legacy:
            return latents_to_codes + self.beta * codes_to_latents
        return codes_to_latents + self.beta * latents_to_codes

    # Mixed precision must not reach in here: see `nearest_code`.
    @torch.autocast("cuda", enabled=False)
    @torch.autocast("mps", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(self, z: Tensor) -> Quantized:
        B, D, h, w = z.shape
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        flat = z.permute(0, 2, 3, 1).reshape(-1, D)  # (N, D)
        if self.l2_norm:
            flat = F.normalize(flat, dim=1)
        codes = self.codes()  # (K, D)
        with torch.no_grad():
            indices = nearest_code(flat, codes)  # (N,)
        if self.training:
            self._track_use(indices)
        z_q = F.embedding(indices, codes)  # (N, D): a gather; a one-hot product would be N x K
        loss = self.codebook_loss(flat, z_q)
        out = (rotation_trick if self.rotation else straight_through)(flat, z_q)

        def to_map(rows: Tensor) -> Tensor:
            return rows.view(B, h, w, D).permute(0, 3, 1, 2)  # (N, D) -> (B, D, h, w)

        return Quantized(to_map(out), indices.view(B, h, w), loss, to_map(flat.detach()))

    @torch.no_grad()
    def _track_use(self, indices: Tensor) -> None:
        counts = count_codes(indices, self.codebook_size)
        self.counts += counts
        self.recent_use.lerp_((counts / counts.sum()).to(self.recent_use), 0.02)

    @torch.no_grad()
    def revive_dead_codes(self, z: Tensor, threshold: float = 0.05) -> int:
        """Move codes that are hardly chosen onto latents of the current batch; returns how many.

        z: (B, D, h, w), `Quantized.z`. A code is dead when its recent fraction of the latents is below `threshold` / K,
        a twentieth of what each would have if all were chosen equally often. Before the first step all are: the same
        call initialises the codebook from data.
        DEPARTURE: neither the paper nor its code does this, and there many codes stay unused for good. (Cf. the random
        restarts of Jukebox, Dhariwal et al. 2020, arXiv:2005.00341.)
        """
        dead = (self.recent_use < threshold / self.codebook_size).nonzero().squeeze(1)
        candidates = z.permute(0, 2, 3, 1).flatten(0, 2)  # (N, D)
        if len(candidates) >= len(dead):
            chosen = torch.randperm(len(candidates))[: len(dead)].to(z.device)
        else:  # two codes at one latent: the second is never chosen, and revived again
            chosen = torch.randint(len(candidates), (len(dead),)).to(z.device)
        replacement = candidates[chosen].to(self.codebook.weight.dtype)
        if dist.is_initialized():  # else each process revives to its own latents, and the codebooks differ
            dist.broadcast(replacement, src=0)
        self.codebook.weight[dead] = replacement
        self.recent_use[dead] = 1 / self.codebook_size  # not dead again before it could be chosen
        return len(dead)


class GumbelQuantizer(nn.Module):
    """Codes drawn from a softmax instead of a nearest neighbour (Jang et al. 2016, arXiv:1611.01144): the official f8
    model with 8192 codes has it.  forward: z (B, D, h, w) -> Quantized.

    A 1x1 convolution gives K logits a position. In training a code is drawn by Gumbel noise, one-hot forward and
    softmax(./temperature) backward; lower `temperature` in the course of training (1 to 1/16). The loss is the KL
    divergence from the uniform distribution: it keeps the codes in use.

    DEPARTURE: in eval mode the code is the argmax of the logits; the official code draws noise there too, so that
    encoding the same image twice gives different indices.
    """

    def __init__(self, codebook_size: int, code_dim: int, in_channels: int, kl_weight: float = 5e-4):
        super().__init__()
        self.codebook_size, self.kl_weight, self.temperature = codebook_size, kl_weight, 1.0
        self.proj = nn.Conv2d(in_channels, codebook_size, 1)
        self.codebook = nn.Embedding(codebook_size, code_dim)
        self.counts: Tensor | float = 0.0  # as in VectorQuantizer

    def embed(self, indices: Tensor) -> Tensor:
        """Codes of given indices: (B, h, w) int64 -> (B, D, h, w)."""
        return self.codebook(indices).permute(0, 3, 1, 2)

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("mps", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(self, z: Tensor) -> Quantized:
        logits = self.proj(z.float())  # (B, K, h, w)
        log_p = logits.log_softmax(1)
        loss = self.kl_weight * (log_p.exp() * (log_p + math.log(self.codebook_size))).sum(1).mean()
        if not self.training:
            indices = logits.argmax(1)  # (B, h, w)
            return Quantized(self.embed(indices), indices, loss, z.detach())
        one_hot = F.gumbel_softmax(logits, tau=self.temperature, hard=True, dim=1)  # (B, K, h, w)
        z_q = torch.einsum("bkhw,kd->bdhw", one_hot, self.codebook.weight)
        indices = one_hot.argmax(1)
        self.counts += count_codes(indices, self.codebook_size)
        return Quantized(z_q, indices, loss, z.detach())
