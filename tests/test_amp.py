"""Where bfloat16 is chosen without being asked for, and a layer that leaves it."""

import time

import pytest
import torch
import torch.nn.functional as F

from minvqgan.harness import runtime
from minvqgan.layers import GroupNorm

CPU = torch.device("cpu")


@pytest.mark.parametrize("slow", ["", "conv2d", "mm"])
def test_bfloat16_is_chosen_if_both_operations_gain(monkeypatch, slow):
    """Each in turn is made slow in bfloat16, the others in float32."""
    for module, name in ((F, "conv2d"), (torch, "mm")):
        dtype = torch.bfloat16 if name == slow else torch.float32
        monkeypatch.setattr(module, name, lambda a, b, dtype=dtype: time.sleep(0.003 * (a.dtype == dtype)))
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    assert runtime.pick_amp(None, CPU) == (not slow) and not runtime.pick_amp(None, CPU, width=128)
    assert runtime.pick_amp(True, CPU, width=128) and not runtime.pick_amp(False, CPU)
    assert torch.equal(state, torch.get_rng_state()) and torch.get_num_threads() == threads


@pytest.mark.parametrize("groups", [1, 2, 8, 32])
def test_a_group_norm_in_bfloat16_is_that_of_float32_rounded(groups):
    """Narrow groups go through float32, wide ones do not: gradients and values are torch's for both."""
    torch.manual_seed(0)
    ours, plain = GroupNorm(32, groups), torch.nn.GroupNorm(groups, 32, eps=1e-6)
    x = (torch.randn(2, 32, 8, 8) * 3 + 1).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x)
    expected = plain(x.float())
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), expected, rtol=2**-7, atol=2**-7)
    g = torch.randn_like(expected)
    found = torch.autograd.grad(y, [x, *ours.parameters()], g.bfloat16())
    for a, b in zip(found, torch.autograd.grad(expected, [x, *plain.parameters()], g), strict=True):
        assert (a.float() - b.float()).norm() < 0.02 * b.float().norm()
