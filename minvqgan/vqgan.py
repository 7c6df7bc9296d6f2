"""Stage one as a whole (Sec. 3.1, Fig. 2): x -> z = E(x) -> z_q = q(z) -> x_hat = G(z_q).                      (Eq. 3)

    x       (B, C, H, W)     image in [-1, 1], or a one-hot label map
    z, z_q  (B, D, h, w)     latents and codes, h = H / f, w = W / f, f = 2^m
    indices (B, h, w) int64  the number of each code: what stage two models
    x_hat   (B, C, H, W)

A 1x1 convolution on either side of the quantizer maps E's z_channels to the D dimensions of a code, and back for G: in
few dimensions more codes are used (arXiv:2110.04627).
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .decoder import Decoder
from .encoder import Encoder
from .options import check, option
from .quantizer import GumbelQuantizer, Quantized, VectorQuantizer

INPUT_KINDS = ("rgb", "gray", "edges", "lowres", "labels", "depth")  # explained in harness/data.py


@dataclass
class VQGANConfig:
    """What a VQGAN is built from; saved in its checkpoint. The names are those of the official configuration, with
    `image_size` for `resolution`, `codebook_size` for `n_embed` and `code_dim` for `embed_dim`."""

    in_channels: int = 3  # C, of the image and of the reconstruction
    input_kind: str = "rgb"  # one of INPUT_KINDS
    image_size: int = option(32, "side of the training images in pixels; others that f divides work too", least=1)
    ch: int = option(16, "channels at full resolution", least=1)
    ch_mult: tuple[int, ...] = option((1, 2, 4), "channel factor of each level; f = 2^(levels - 1)", least=1)
    num_res_blocks: int = option(1, "residual blocks per level", least=1, most=100)
    attn_resolutions: tuple[int, ...] = option((), "sides of further maps with attention", least=1)
    norm_groups: int = option(1, "groups of each GroupNorm; keep 16 channels or more in a group", least=1)
    dropout: float = option(0.0, "in the residual blocks", most=1)
    z_channels: int = option(64, "channels of the latent map", least=1)
    codebook_size: int = option(256, "number of codes K", least=1)
    code_dim: int = option(16, "dimensions of a code", least=1)
    beta: float = option(0.25, "weight of the commitment term")
    legacy: bool = option(False, "beta on the codebook term, as the official code had it for long")
    l2_norm: bool = option(False, "compare latents and codes by direction")
    rotation: bool = option(False, "rotation trick instead of straight-through")
    gumbel: bool = option(False, "Gumbel-softmax quantizer instead of nearest neighbours")

    def __post_init__(self):
        check(self)
        if self.input_kind not in INPUT_KINDS:
            raise ValueError(f"input_kind is {self.input_kind!r:.40}, not one of {', '.join(INPUT_KINDS)}")
        for channels in (self.ch, *(self.ch * mult for mult in self.ch_mult)):
            if channels % self.norm_groups:
                raise ValueError(f"--norm-groups {self.norm_groups} does not divide a layer's {channels} channels")
        size, f = self.image_size, self.f
        if size % f:
            nearest = f"{size // f * f} or {size // f * f + f}" if size > f else f
            raise ValueError(f"--image-size {size} is not divisible by f = {f}; use {nearest}")

    @property
    def f(self) -> int:
        """Downsampling factor f = 2^m."""
        return 2 ** (len(self.ch_mult) - 1)


class VQGAN(nn.Module):
    """G(q(E(x))).  forward: x (B, C, H, W) -> (x_hat (B, C, H, W), Quantized). Images are in [-1, 1]."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.config = c = config
        self.encoder = Encoder(c)
        self.to_code = nn.Conv2d(c.z_channels, c.code_dim, 1)
        self.quantizer: VectorQuantizer | GumbelQuantizer
        if c.gumbel:
            self.quantizer = GumbelQuantizer(c.codebook_size, c.code_dim, in_channels=c.code_dim)
        else:
            self.quantizer = VectorQuantizer(c.codebook_size, c.code_dim, c.beta, c.legacy, c.l2_norm, c.rotation)
        self.from_code = nn.Conv2d(c.code_dim, c.z_channels, 1)
        self.decoder = Decoder(c)

    def latents(self, x: Tensor) -> Tensor:
        """z before quantization: (B, C, H, W) -> (B, D, h, w). Raises ValueError for an image that does not fit."""
        c, f = self.config, self.config.f
        if x.ndim != 4 or x.shape[1] != c.in_channels:
            raise ValueError(f"expected images (B, {c.in_channels}, H, W), got {tuple(x.shape)}")
        H, W = x.shape[2:]
        if not torch.compiler.is_compiling() and (H % f or W % f or not H or not W):
            below, above = ((max(1, H // f + up) * f, max(1, W // f + up) * f) for up in (0, 1))
            raise ValueError(f"{H} x {W} is not divisible by f = {f}; nearest sizes that work: {below}, {above}")
        return self.to_code(self.encoder(x))

    def encode(self, x: Tensor) -> Quantized:
        """x (B, C, H, W) in [-1, 1] -> Quantized(z_q (B, D, h, w), indices (B, h, w), loss, z)."""
        return self.quantizer(self.latents(x))

    def decode(self, z_q: Tensor) -> Tensor:
        """z_q (B, D, h, w) -> x_hat (B, C, H, W): near [-1, 1] for images, logits for label maps."""
        return self.decoder(self.from_code(z_q))

    def forward(self, x: Tensor) -> tuple[Tensor, Quantized]:
        quantized = self.encode(x)
        return self.decode(quantized.z_q), quantized

    @torch.no_grad()
    def encode_indices(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) in [-1, 1] -> indices (B, h, w) int64 in [0, K)."""
        # Images in [0, 1] are a common mistake. Not looked for on a GPU, which would have to be waited for.
        looks = not torch.compiler.is_compiling() and x.device.type == "cpu" and self.config.input_kind != "labels"
        if looks and x.numel() and 0 <= x.min() < 0.1 and 0.5 < x.max() <= 1:
            warnings.warn("these images are in [0, 1], but the model takes [-1, 1]: 2 * x - 1", stacklevel=3)
        return self.encode(x).indices

    @torch.no_grad()
    def decode_indices(self, indices: Tensor) -> Tensor:
        """indices (B, h, w), of any integer type -> x_hat (B, C, H, W). Raises ValueError for others."""
        K, dtype = self.config.codebook_size, indices.dtype
        if indices.ndim != 3 or dtype.is_floating_point or dtype == torch.bool:
            raise ValueError(f"expected integer indices (B, h, w), got {tuple(indices.shape)} of {dtype}")
        indices = indices.long()  # before comparing: 256 is 0 in uint8
        if not torch.compiler.is_compiling() and indices.numel() and (indices.min() < 0 or indices.max() >= K):
            raise ValueError(f"indices must lie in [0, {K}), got {indices.min().item()} to {indices.max().item()}")
        return self.decode(self.quantizer.embed(indices))
