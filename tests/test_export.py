"""Encoder and decoder by torch.export, by torch.compile without graph breaks, and by ONNX, at any size and batch."""

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


@pytest.mark.parametrize("how", ["export", "compile"])
def test_exported_and_compiled_without_graph_breaks(model, how):
    def translated(module, example, dims):
        if how == "export":
            return torch.export.export(module, (example,), dynamic_shapes=(dims,)).module()
        return torch.compile(module, fullgraph=True, dynamic=True, backend="eager")

    x, indices = inputs((2, 16, 24))
    encode, decode = translated(Encode(model), x, IMAGE_DIMS), translated(Decode(model), indices, CODE_DIMS)
    for size in SIZES:
        x, indices = inputs(size)
        assert torch.equal(encode(x), model.encode_indices(x))
        assert torch.allclose(decode(indices), model.decode_indices(indices), atol=1e-5)


@pytest.mark.slow
def test_onnx(model, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    x, indices = inputs((2, 16, 24))
    torch.onnx.export(Encode(model), (x,), tmp_path / "e.onnx", dynamo=True, dynamic_shapes=(IMAGE_DIMS,))
    torch.onnx.export(Decode(model), (indices,), tmp_path / "d.onnx", dynamo=True, dynamic_shapes=(CODE_DIMS,))
    encoder, decoder = (runtime.InferenceSession(tmp_path / name) for name in ("e.onnx", "d.onnx"))
    for size in SIZES:
        x, indices = inputs(size)
        (found,) = encoder.run(None, {encoder.get_inputs()[0].name: x.numpy()})
        assert torch.equal(torch.from_numpy(found), model.encode_indices(x))
        (found,) = decoder.run(None, {decoder.get_inputs()[0].name: indices.numpy()})
        assert (torch.from_numpy(found) - model.decode_indices(indices)).abs().max() < 1e-4
