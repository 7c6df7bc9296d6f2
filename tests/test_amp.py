"""Where bfloat16 is chosen without being asked for."""

import time

import pytest
import torch
import torch.nn.functional as F

from minvqgan.harness import runtime

CPU = torch.device("cpu")


@pytest.mark.parametrize("slow", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["conv2d", "mm"])
def test_the_faster_precision_is_chosen(monkeypatch, slow, name):
    """Both operations must gain: each in turn is made slow in one precision, the other one always in float32."""
    for module, function, dtype in ((F, "conv2d", torch.float32), (torch, "mm", torch.float32)):
        dtype = slow if function == name else dtype

        def delayed(a, b, dtype=dtype):
            time.sleep(0.003 if a.dtype == dtype else 0)

        monkeypatch.setattr(module, function, delayed)
    assert runtime.pick_amp(None, CPU) == (slow == torch.float32)
    assert not runtime.pick_amp(None, CPU, width=128)
    assert runtime.pick_amp(True, CPU, width=128) and not runtime.pick_amp(False, CPU)


def test_the_choice_leaves_no_trace():
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    assert runtime.pick_amp(None, CPU) in (True, False)
    assert torch.equal(state, torch.get_rng_state()) and torch.get_num_threads() == threads
