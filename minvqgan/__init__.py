"""minvqgan: VQGAN, small enough to read and good enough to use.

    model = minvqgan.load("runs/vqgan/last.pt")       a VQGAN, or a TwoStage, in eval mode
    indices = model.encode_indices(x)                 x (B, 3, H, W) in [-1, 1] -> (B, h, w)
    x_hat = model.decode_indices(indices)
    minvqgan.save_model("mine.pt", model)             the model alone, without the state of its training

Reading order: options, layers, encoder, quantizer, decoder, vqgan, perceptual, discriminator, objective, then
train_vqgan.py, which uses them; orders, gpt, conditioning, two_stage, sampler, then train_gpt.py and sample.py.
"""

from .harness.checkpoint import load, save_model
from .sampler import Sampling
from .two_stage import TwoStage
from .vqgan import VQGAN, VQGANConfig

__version__ = "0.1.0"  # pyproject.toml reads it here
__all__ = ["VQGAN", "Sampling", "TwoStage", "VQGANConfig", "load", "save_model"]
