"""Encoder and decoder by torch.export, by torch.compile without graph breaks, and by ONNX, at any size and batch."""

import io

import pytest
import torch
from torch import nn
from torch.export import Dim

from minvqgan import VQGAN, VQGANConfig

CONFIG = {"image_size": 16, "ch": 8, "ch_mult": (1, 2, 2), "z_channels": 8, "code_dim": 4, "codebook_size": 32}
SIZES = [(1, 16, 16), (3, 8, 24), (2, 32, 16)]  # batch, height, width


class Encode(nn.Module):
    def __init__(self, model: VQGAN):
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, x):
        return self.model.encode_indices(x)


class Decode(Encode):
    def forward(self, indices):
        return self.model.decode_indices(indices)


@pytest.fixture(scope="module", params=[{}, {"l2_norm": True, "attn_resolutions": (8,)}, {"gumbel": True}], ids=str)
def model(request):
    torch.manual_seed(0)
    model = VQGAN(VQGANConfig(**CONFIG | request.param)).eval()
    nn.init.normal_(model.quantizer.codebook.weight)
    return model


def inputs(size):
    """An image and codes of this batch, height and width."""
    B, H, W = size
    generator = torch.Generator().manual_seed(H)
    x = torch.randn(B, 3, H, W, generator=generator)
    return x, torch.randint(0, 32, (B, H // 4, W // 4), generator=generator)


# Sides of images are multiples of f = 4.
IMAGE_DIMS = {0: Dim("batch"), 2: 4 * Dim("h"), 3: 4 * Dim("w")}
CODE_DIMS = {0: Dim("batch"), 1: Dim("h"), 2: Dim("w")}


def by_onnx(module, example, dims):
    """The function that onnxruntime runs: tensor -> tensor."""
    pytest.importorskip("onnxscript")
    runtime, file = pytest.importorskip("onnxruntime"), io.BytesIO()
    torch.onnx.export(module, (example,), dynamo=True, dynamic_shapes=(dims,)).save(file)
    session = runtime.InferenceSession(file.getvalue())
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def by_export(module, example, dims):
    return torch.export.export(module, (example,), dynamic_shapes=(dims,)).module()


def by_compile(module, example, dims):
    return torch.compile(module, fullgraph=True, dynamic=True, backend="eager")


@pytest.mark.parametrize("how", [by_export, by_compile, pytest.param(by_onnx, marks=pytest.mark.slow)])
def test_any_size_and_batch(model, how):
    x, indices = inputs((2, 16, 24))
    encode, decode = how(Encode(model), x, IMAGE_DIMS), how(Decode(model), indices, CODE_DIMS)
    for size in SIZES:
        x, indices = inputs(size)
        assert torch.equal(encode(x), model.encode_indices(x))
        assert (decode(indices) - model.decode_indices(indices)).abs().max() < 1e-4
