"""What only a CUDA GPU can show, skipped without one; and what Python does around a CUDA graph, with a fake one."""

import contextlib

import pytest
import torch
from helpers import STAGE_ONE, STAGE_TWO, fixture, metrics_rows, official_models, relative_error, run_script, same_bits
from torch import nn

from minvqgan.harness import runtime
from minvqgan.harness.cuda_graph import CudaGraph
from minvqgan.objective import ObjectiveConfig, stage_one_step

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def networks():
    """The official VQGAN and D of the fixtures, on the GPU, and a batch."""
    fx = fixture("vqgan")
    vqgan, disc = official_models(fx, legacy=False)
    return vqgan.cuda().train(), disc.cuda().train(), fx["x"].cuda(), fx


@needs_gpu
def test_official_numbers(networks):
    vqgan, disc, x, fx = networks
    assert torch.equal(vqgan.encode_indices(x).cpu(), fx["indices"])
    assert relative_error(vqgan.decode_indices(fx["indices"].cuda()).cpu(), fx["x_rec"]) < 1e-4
    objective = ObjectiveConfig(disc_weight=fx["config"]["disc_weight"], max_lambda=1e4, delta=1e-4)
    terms, _ = stage_one_step(vqgan, disc, None, x, objective)
    assert relative_error(objective.disc_weight * terms["lambda"].cpu(), fx["adaptive_weight"]) < 1e-3
    assert relative_error(vqgan.decoder.conv_out.weight.grad.cpu(), fx["grads"]["decoder.conv_out.weight"]) < 1e-3


def gradients_of(step, networks, batches):
    """The gradients that a step of several micro-batches leaves, as one vector a network."""
    for batch in batches:
        step(*batch)
    found = []
    for network in networks:
        grads = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
        found.append(torch.cat(grads) if grads else torch.zeros(0))
        network.zero_grad()
    return found


@needs_gpu
@pytest.mark.parametrize("amp", [False, True])
def test_a_graph_has_the_gradients_of_the_step(networks, amp):
    """D is off, joins, learns alone and comes in; steps of one and two micro-batches; weights move in between."""
    *both, x, _ = networks

    def step(x, adv_fraction):
        return stage_one_step(*both, None, x, ObjectiveConfig(max_lambda=1e4), adv_fraction, amp)

    graph, generator = CudaGraph(step, *both), torch.Generator().manual_seed(0)
    for count, fraction in ((1, None), (2, None), (1, 0.0), (2, 0.5), (1, 1.0)):
        batches = [(torch.rand(x.shape, generator=generator).cuda() * 2 - 1, fraction) for _ in range(count)]
        found, expected = gradients_of(graph, both, batches), gradients_of(step, both, batches)
        for ours, truth in zip(found, expected, strict=True):
            assert ours.shape == truth.shape
            assert (ours - truth).norm() <= (0.02 if amp else 1e-3) * truth.norm()
        with torch.no_grad():
            for network in both:
                for p in network.parameters():
                    p.mul_(1.01)


@needs_gpu
def test_both_scripts_train_as_without_a_graph(tmp_path):
    """The same losses with and without --cuda-graph, D off, alone and joined."""
    flags = "--device cuda --steps 20 --log-every 5 --save-every 20 --val-every 20 --seed 1 --out"
    one = f"--revive-every 0 --disc-start 0.25 --disc-warmup 0.25 --disc-ramp 0.25 {flags}"
    two = f"--vqgan graph/last.pt --cond class --drop-cond 0 --pkeep 1 {flags}"
    for script, words, names in ((STAGE_ONE, one, ("rec_loss", "disc_loss")), (STAGE_TWO, two, ("loss",))):
        runs = {"graph": "--cuda-graph", "plain": "--no-cuda-graph"}
        runs = {out if script is STAGE_ONE else f"gpt_{out}": flag for out, flag in runs.items()}
        for out, flag in runs.items():
            done = run_script(*script, *words.split(), out, flag, cwd=tmp_path)
            assert done.returncode == 0, done.stderr[-3000:]
        for ours, truth in zip(*(metrics_rows(tmp_path / out) for out in runs), strict=True):
            for name in names:
                assert bool(ours[name]) == bool(truth[name])
                assert not truth[name] or float(ours[name]) == pytest.approx(float(truth[name]), rel=0.05), name


class Replayed:
    """Stands in for a CUDA graph: a replay calls the function again on the recorded inputs."""

    def replay(self):
        self.recorded.outputs.copy_(self.recorded.function(*self.recorded.inputs))


@pytest.fixture
def fake_cuda(monkeypatch):
    """As much of torch.cuda as a recording asks for, on the CPU: the recording itself is one more call."""
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: type("Stream", (), {"wait_stream": lambda *_: None})())
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Replayed)
    monkeypatch.setattr(torch.cuda, "get_rng_state", torch.get_rng_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", torch.set_rng_state)


def test_what_python_does_around_a_recording(fake_cuda, monkeypatch):
    """Inputs; gradients over micro-batches and after zero_grad; and the calls before a recording are undone, in buffers
    and in the random generator."""
    layer, norm, seen = nn.Linear(3, 2), nn.BatchNorm1d(2), []

    def state() -> list:
        return [norm.num_batches_tracked.clone(), norm.running_mean.clone(), torch.get_rng_state()]

    @contextlib.contextmanager
    def graph(*_, **__):
        seen.append(state())
        yield

    def function(x, weight):
        loss = layer(x).square().mean() if weight is None else weight * norm(layer(x)).pow(3).mean()
        loss.backward()
        torch.rand(1)
        return loss.detach()

    monkeypatch.setattr(torch.cuda, "graph", graph)
    recorded = CudaGraph(function, layer, norm)
    monkeypatch.setattr(Replayed, "recorded", recorded, raising=False)
    for weights in ((None,), (None, None), (1.0,), (0.5, 2.0), (3.0,)):
        batches, count, before = [(torch.randn(4, 3), weight) for weight in weights], len(seen), state()
        ours = [recorded(*batch).item() for batch in batches]
        assert len(seen) == count + (weights in ((None,), (1.0,))) and all(same_bits(s, before) for s in seen[count:])
        found = [p.grad.clone() for p in layer.parameters()]
        layer.zero_grad()
        assert ours == pytest.approx([function(*batch).item() for batch in batches])
        for grad, p in zip(found, layer.parameters(), strict=True):
            assert torch.allclose(grad, p.grad)
        layer.zero_grad()
        norm.zero_grad()
        with torch.no_grad():
            layer.weight.add_(0.1)


@pytest.mark.parametrize("name, index", [("cuda", 0), ("cuda:1", 1)])
def test_a_cuda_device_has_a_number(monkeypatch, name, index):
    """torch.cuda.set_device refuses a device without one."""
    taken = []
    monkeypatch.setattr(runtime.torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert runtime.pick_device(name) == torch.device("cuda", index) == taken[0]
