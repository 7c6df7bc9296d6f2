"""minvqgan: VQGAN, small enough to read and good enough to use.

Reading order: layers, encoder, quantizer, decoder, vqgan, perceptual, discriminator; then train_vqgan.py, which puts
them to work.
"""

from .harness.checkpoint import load
from .vqgan import VQGAN, VQGANConfig

__all__ = ["VQGAN", "VQGANConfig", "load"]
