"""minvqgan: VQGAN, small enough to read and good enough to use.

Reading order: options, layers, encoder, quantizer, decoder, vqgan, perceptual, discriminator, objective, then
train_vqgan.py, which puts them to work; gpt, orders, conditioning, two_stage, sampler, then train_gpt.py and sample.py.
"""

from .harness.checkpoint import load
from .sampler import Sampling
from .two_stage import TwoStage
from .vqgan import VQGAN, VQGANConfig

__all__ = ["VQGAN", "Sampling", "TwoStage", "VQGANConfig", "load"]
