"""The causal CNN: it must never see what it predicts."""

import pytest
import torch
import torch.nn.functional as F

from minvqgan.course.pixelsnail import MaskedConv2d, PixelSNAIL, causal_kernel
from minvqgan.sampler import Sampling, uniforms

K, N = 11, 5


@pytest.fixture
def model():
    torch.manual_seed(0)
    return PixelSNAIL(K, N, num_classes=3, channels=16, blocks=2, res_blocks=1).eval()


def test_no_logit_depends_on_its_own_code_or_a_later_one(model):
    torch.manual_seed(1)
    indices, classes = torch.randint(K, (1, N, N)), torch.tensor([1])
    with torch.no_grad():
        before = model(indices, classes).flatten(2)
        for position in range(N * N):
            other = indices.clone().flatten(1)
            other[0, position] = (other[0, position] + 1) % K
            after = model(other.view(1, N, N), classes).flatten(2)
            changed = (before != after).any(1)[0]
            assert not changed[: position + 1].any(), position
            # Attention carries it to every later position: nothing is hidden from the future.
            assert changed[position + 1 :].all(), position


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("sees_itself", [False, True])
def test_kernels_against_the_definition(k, sees_itself):
    middle = k // 2
    for i in range(k):
        for j in range(k):
            before = i < middle or (i == middle and j < middle) or (sees_itself and (i, j) == (middle, middle))
            assert causal_kernel(k, sees_itself)[i, j] == before
    conv, x = MaskedConv2d(2, 3, k, sees_itself), torch.randn(1, 2, 6, 6)
    assert torch.equal(conv(x), F.conv2d(x, conv.weight * causal_kernel(k, sees_itself), conv.bias, padding=middle))


def test_samples(model):
    classes = torch.tensor([0, 1, 2])
    sampled = model.sample(classes, uniforms(0, [5, 6, 7], N * N))
    assert sampled.shape == (3, N, N) and sampled.min() >= 0 and sampled.max() < K
    assert torch.equal(sampled[1:2], model.sample(classes[1:2], uniforms(0, [6], N * N)))
    greedy = model.sample(classes, uniforms(0, [5, 6, 7], N * N), Sampling(temperature=0))
    with torch.no_grad():  # each code is the likeliest given those before it
        assert torch.equal(model(greedy, classes).argmax(1), greedy)
    with pytest.raises(ValueError, match="5 x 5"):
        model(torch.zeros(1, 4, 4, dtype=torch.long), classes[:1])
