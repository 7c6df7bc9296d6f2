"""The quantizer q and its codebook Z of Sec. 3.1: every latent vector is replaced by the nearest of K learned codes.

    z_q = q(z),   q(z)_ij = argmin over e_k in Z of |z_ij - e_k|                                        (Eq. 2)
    L_VQ = |sg[z] - z_q|^2 + beta |sg[z_q] - z|^2,   sg = stop-gradient (`detach`)         (Eq. 4, v1 and v2)

The first term moves the codes to the latents, the second (the *commitment*) the latents to their codes; `codebook_loss`
says why the paper's third version has no beta. The argmin has no gradient, so the decoder's gradient at z_q is copied
to z ("straight-through").

Letters: B batch, D dims of a code, h x w latent map, N = B*h*w vectors, K codes.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# The N x K distances are computed in blocks of at most this many numbers (float32: 256 MB).
MAX_DISTANCES = 2**26


class Quantized(NamedTuple):
    z_q: Tensor  # (B, D, h, w) codes, with the gradient passed on to z
    indices: Tensor  # (B, h, w) int64 in [0, K)
    loss: Tensor  # scalar, the codebook loss L_VQ
    z: Tensor  # (B, D, h, w) the latents that were compared, for `revive_dead_codes`; detached


def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """Eq. 2: the index of the nearest row of `codebook` (K, D) for each row of `z` (N, D) -> (N,) int64.

    |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 is the same for all codes, so one matrix product is enough. Use float32
    or more: bfloat16 rounds the products to 3 digits and confuses near neighbours.
    """
    e_squared = codebook.square().sum(1)  # (K,)
    # A compiled or exported program takes one block: with several it would work for this N only.
    blocks = [z] if torch.compiler.is_compiling() else z.split(max(1, MAX_DISTANCES // len(codebook)))
    # addmm: |e|^2 - 2 z.e of every pair, one row for each z.
    return torch.cat([torch.addmm(e_squared, block, codebook.T, alpha=-2).argmin(1) for block in blocks])


def straight_through(z: Tensor, z_q: Tensor) -> Tensor:
    """The value of z_q with the gradient of z: d out / d z = 1 and d out / d z_q = 0 (Bengio et al. 2013)."""
    return z + (z_q - z).detach()


def rotation_trick(z: Tensor, z_q: Tensor) -> Tensor:
    """The value of z_q as a constant rotation and scaling of z: d out / d z = (|z_q| / |z|) R (Fifty et al. 2024,
    arXiv:2410.06424).  z, z_q: (N, D) -> (N, D).

    Straight-through gives every z of a cell the same gradient; here the gradient turns with the angle between z and its
    code. The rotation from u = z/|z| to e = z_q/|z_q| is, with r the unit vector halfway between them,

        R = I - 2 r r^T + 2 e u^T        I - 2 r r^T takes u to -e, and the last term adds 2 e
    """
    with torch.no_grad():
        z_norm, e_norm = z.norm(dim=1, keepdim=True).clamp_min(1e-6), z_q.norm(dim=1, keepdim=True)  # (N, 1)
        u, e = z / z_norm, z_q / e_norm.clamp_min(1e-6)
        r = F.normalize(u + e, dim=1)
    rotated = z - 2 * r * (r * z).sum(1, keepdim=True) + 2 * e * (u * z).sum(1, keepdim=True)  # R z, row by row
    return rotated * (e_norm / z_norm)


def codebook_stats(counts: Tensor) -> tuple[float, float]:
    """(usage, perplexity) of how often each code was chosen, counts (K,).

    usage: fraction of the codes chosen at all. perplexity: exp(entropy), the number of equally frequent codes that
    would carry as much information. If 20 of K codes do all the work but each is chosen once: usage 1, perplexity 20.
    """
    counts = counts.cpu().double()  # on the CPU, because Apple's GPUs have no float64
    entropy = torch.special.entr(counts / counts.sum().clamp_min(1)).sum()  # of -p log p
    return (counts > 0).double().mean().item(), entropy.exp().item()


def count_codes(indices: Tensor, codebook_size: int) -> Tensor:
    """How often each code was chosen, over all processes: indices of any shape -> (K,) int32."""
    # Not torch.bincount: it makes a GPU wait for the largest index.
    ones = torch.ones(indices.numel(), dtype=torch.int32, device=indices.device)
    counts = ones.new_zeros(codebook_size).index_add_(0, indices.flatten(), ones)
    if dist.is_initialized():  # all processes must agree on which codes are dead
        dist.all_reduce(counts)
    return counts


class VectorQuantizer(nn.Module):
    """q and Z.  forward: z (B, D, h, w) -> Quantized.

    beta, legacy: see `codebook_loss`. rotation: `rotation_trick` instead of `straight_through`. l2_norm: latents and
    codes are scaled to length 1, so that directions are compared (Yu et al. 2021, arXiv:2110.04627).
    """

    recent_use: Tensor  # (K,)
    counts: Tensor  # (K,)

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
        # The official initialisation. With it alone a few codes win every comparison and the others never move, because
        # the loss moves chosen codes only. `revive_dead_codes` is the cure.
        nn.init.uniform_(self.codebook.weight, -1 / codebook_size, 1 / codebook_size)
        # Running fraction of the latents that chose each code; 0 before the first batch, so all codes start as dead.
        self.register_buffer("recent_use", torch.zeros(codebook_size))
        # Counts for the log, of training passes over all processes; scripts set them to 0. Not part of the checkpoint.
        self.register_buffer("counts", torch.zeros(codebook_size, dtype=torch.int32), persistent=False)

    def codes(self) -> Tensor:
        """The K codes as they are compared, in float32 at least: (K, D)."""
        weight = self.codebook.weight.to(torch.promote_types(self.codebook.weight.dtype, torch.float32))
        return F.normalize(weight, dim=1) if self.l2_norm else weight

    def embed(self, indices: Tensor) -> Tensor:
        """Codes of given indices: (B, h, w) int64 -> (B, D, h, w)."""
        return F.embedding(indices, self.codes()).permute(0, 3, 1, 2).to(self.codebook.weight.dtype)

    def codebook_loss(self, z: Tensor, z_q: Tensor) -> Tensor:
        """L_VQ of Eq. 4, the mean over all numbers of z and z_q (any equal shape) -> scalar.

        Both terms have the same value and differ only in what they move, so a misplaced beta shows in no loss curve:
          1. VQ-VAE, and the first versions of the paper, weight the *commitment* by beta = 0.25.
          2. The official code put beta on the other term (`legacy=True`), so the commitment had weight 1. The published
             weights were trained so.
          3. The paper's third version therefore has no beta: both terms have weight 1 (`beta=1` here).
        DEPARTURE: the default is VQ-VAE's 0.25 on the commitment; and means instead of Eq. 4's sums, as in the official
        code.
        """
        codes_to_latents = (z_q - z.detach()).square().mean()
        latents_to_codes = (z_q.detach() - z).square().mean()
        if self.legacy:
            return latents_to_codes + self.beta * codes_to_latents
        return codes_to_latents + self.beta * latents_to_codes

    # No mixed precision: see `nearest_code`.
    @torch.autocast("cuda", enabled=False)
    @torch.autocast("mps", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(self, z: Tensor) -> Quantized:
        B, D, h, w = z.shape
        codes = self.codes()  # (K, D)
        flat = z.permute(0, 2, 3, 1).reshape(-1, D).to(codes.dtype)  # (N, D)
        if self.l2_norm:
            flat = F.normalize(flat, dim=1)
        with torch.no_grad():
            indices = nearest_code(flat, codes)  # (N,)
            if self.training:
                counts = count_codes(indices, self.codebook_size)
                self.counts += counts  # in place, as CUDA graphs need it
                self.recent_use.lerp_((counts / counts.sum()).to(self.recent_use), 0.02)  # over about 50 batches
        z_q = F.embedding(indices, codes)  # (N, D): a gather; a one-hot product would be N x K
        loss = self.codebook_loss(flat, z_q)
        z_q = (rotation_trick if self.rotation else straight_through)(flat, z_q)
        z_q, z = (rows.view(B, h, w, D).permute(0, 3, 1, 2) for rows in (z_q, flat.detach()))  # (B, D, h, w)
        return Quantized(z_q.to(self.codebook.weight.dtype), indices.view(B, h, w), loss, z)

    @torch.no_grad()
    def revive_dead_codes(self, z: Tensor, threshold: float = 0.05) -> int:
        """Move codes that are hardly ever chosen to latents of the current batch; returns how many.

        z: (B, D, h, w), `Quantized.z`. A code is dead when its recent fraction of the latents is below `threshold` / K,
        a twentieth of an equal part. Before the first step all are dead: the call initialises the codebook from data.
        DEPARTURE: neither the paper nor its code does this, and there many codes are never used. (Cf. the random
        restarts of Jukebox, Dhariwal et al. 2020, arXiv:2005.00341.)
        """
        dead = (self.recent_use < threshold / self.codebook_size).nonzero().squeeze(1)
        candidates = z.permute(0, 2, 3, 1).flatten(0, 2)  # (N, D)
        # Each latent once. If there are too few, they are used again: of two equal codes the second is never chosen, so
        # it will be revived again.
        chosen = torch.randperm(len(candidates))[torch.arange(len(dead)) % len(candidates)]
        replacement = candidates[chosen.to(z.device)].to(self.codebook.weight.dtype)
        if dist.is_initialized():  # otherwise each process takes its own latents, and the codebooks differ
            dist.broadcast(replacement, src=0)
        self.codebook.weight[dead] = replacement
        self.recent_use[dead] = 1 / self.codebook_size  # gives them time to be chosen
        return len(dead)


class GumbelQuantizer(nn.Module):
    """Codes drawn from a softmax instead of a nearest neighbour (Jang et al. 2016, arXiv:1611.01144), as in the
    official f8 model with 8192 codes.  forward: z (B, D, h, w) -> Quantized.

    A 1x1 convolution gives K logits at each position. In training a code is drawn with Gumbel noise: one-hot in the
    forward pass, softmax(./temperature) in the backward pass; scripts lower `temperature` from 1 to 1/16. The loss is
    the KL divergence from the uniform distribution, which keeps all codes in use.

    DEPARTURE: in eval mode the code is the argmax of the logits; the official code draws noise there too, so that
    encoding the same image twice gives different indices.
    """

    counts: Tensor  # (K,), as in VectorQuantizer

    def __init__(self, codebook_size: int, code_dim: int, in_channels: int, kl_weight: float = 5e-4):
        super().__init__()
        self.codebook_size, self.kl_weight, self.temperature = codebook_size, kl_weight, 1.0
        self.proj = nn.Conv2d(in_channels, codebook_size, 1)
        self.codebook = nn.Embedding(codebook_size, code_dim)
        self.register_buffer("counts", torch.zeros(codebook_size, dtype=torch.int32), persistent=False)

    def embed(self, indices: Tensor) -> Tensor:
        """Codes of given indices: (B, h, w) int64 -> (B, D, h, w)."""
        return self.codebook(indices).permute(0, 3, 1, 2)

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("mps", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(self, z: Tensor) -> Quantized:
        dtype = torch.promote_types(self.proj.weight.dtype, torch.float32)
        weight, bias = (p.to(dtype) for p in self.proj.parameters())
        logits = F.conv2d(z.to(dtype), weight, bias)  # (B, K, h, w)
        log_p = logits.log_softmax(1)
        divergence = (log_p.exp() * (log_p + math.log(self.codebook_size))).sum(1)  # of p log(p / (1 / K)): (B, h, w)
        loss = self.kl_weight * divergence.mean()
        if not self.training:
            indices = logits.argmax(1)  # (B, h, w)
            return Quantized(self.embed(indices), indices, loss, z.detach())
        one_hot = F.gumbel_softmax(logits, tau=self.temperature, hard=True, dim=1)  # (B, K, h, w)
        z_q = torch.einsum("bkhw,kd->bdhw", one_hot.to(self.codebook.weight.dtype), self.codebook.weight)
        indices = one_hot.argmax(1)
        self.counts += count_codes(indices, self.codebook_size)
        return Quantized(z_q, indices, loss, z.detach())
