"""What only a CUDA GPU can show, skipped without one, and as much of it as a CPU can."""

import contextlib
import csv

import pytest
import torch
from helpers import fixture, relative_error, run_script
from torch import nn

from minvqgan.discriminator import PatchDiscriminator
from minvqgan.harness import official, runtime
from minvqgan.objective import ObjectiveConfig, stage_one_step

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def networks():
    """The official VQGAN and D of the fixtures, on the GPU, and a batch."""
    fx = fixture("vqgan")
    c = fx["config"]
    config = official.vqgan_config(c["ddconfig"], c["n_embed"], c["embed_dim"], c["beta"], legacy=False)
    disc = PatchDiscriminator(3, c["disc_ndf"], c["disc_num_layers"])
    vqgan, disc = official.load_vqgan(fx["state_dict"], config), official.load_discriminator(disc, fx["discriminator"])
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


def gradients_of(step, vqgan, disc, batches):
    """All gradients that one step of several micro-batches leaves, as one vector a network."""
    for x, fraction in batches:
        step(x) if fraction is None else step(x, fraction)
    found = []
    for network in (vqgan, disc):
        grads = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
        found.append(torch.cat(grads) if grads else torch.zeros(0))
        network.zero_grad()
    return found


@needs_gpu
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("fraction", [None, 0.0, 0.5, 1.0])
def test_recorded_gradients_are_those_of_the_step(networks, fraction, amp):
    """Twice each: a step of one micro-batch, one of two, and new weights in between."""
    vqgan, disc, x, _ = networks

    def step(x, fraction=None):
        return stage_one_step(vqgan, disc, None, x, ObjectiveConfig(max_lambda=1e4), fraction, amp)

    recorded, generator = runtime.Recorded(step, vqgan, disc), torch.Generator().manual_seed(0)
    for count in (1, 2, 1):
        batches = [(torch.rand(x.shape, generator=generator).cuda() * 2 - 1, fraction) for _ in range(count)]
        ours = gradients_of(recorded, vqgan, disc, batches)
        truth = gradients_of(step, vqgan, disc, batches)
        for one, other in zip(ours, truth, strict=True):
            assert one.shape == other.shape
            if len(other):
                assert (one - other).norm() < (0.02 if amp else 1e-3) * other.norm()
        with torch.no_grad():
            for p in [*vqgan.parameters(), *disc.parameters()]:
                p.mul_(1.01)


@needs_gpu
def test_recorded_training_follows_the_other(tmp_path):
    flags = "--preset tiny --steps 40 --log-every 10 --val-every 40 --val-images 16 --revive-every 0 --no-amp"
    flags += " --disc-start 0.25 --disc-warmup 0.25 --disc-ramp 0.25"
    rows = {}
    for name in ("cuda-graph", "no-cuda-graph"):
        done = run_script("train_vqgan.py", *flags.split(), f"--{name}", "--out", tmp_path / name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        rows[name] = list(csv.DictReader((tmp_path / name / "metrics.csv").open()))
    for ours, truth in zip(rows["cuda-graph"], rows["no-cuda-graph"], strict=True):
        for name in ("rec_loss", "codebook_loss", "disc_loss"):
            assert bool(ours[name]) == bool(truth[name])
            if truth[name]:
                assert float(ours[name]) == pytest.approx(float(truth[name]), rel=0.05), (ours["step"], name)


@needs_gpu
def test_recorded_transformer_follows_the_other(tmp_path):
    flags = "--steps 4 --val-images 16 --val-every 4"
    assert run_script("train_vqgan.py", *flags.split(), "--out", tmp_path / "v", cwd=tmp_path).returncode == 0
    flags = "--steps 40 --log-every 10 --val-every 40 --val-images 64 --no-amp --drop-cond 0"
    losses = {}
    for name in ("cuda-graph", "no-cuda-graph"):
        words = [*flags.split(), f"--{name}", "--vqgan", tmp_path / "v/last.pt", "--out", tmp_path / name]
        done = run_script("train_gpt.py", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        losses[name] = [float(row["loss"]) for row in csv.DictReader((tmp_path / name / "metrics.csv").open())]
    assert losses["cuda-graph"] == pytest.approx(losses["no-cuda-graph"], rel=0.01)


class Replayed:
    """In place of a CUDA graph: a replay calls the function again, on the recorded inputs, into the recorded output."""

    def replay(self):
        self.recorded.outputs.copy_(self.recorded.function(*self.recorded.inputs))


@pytest.fixture
def fake_cuda(monkeypatch):
    """As much of torch.cuda as a recording asks for, on the CPU: the recording itself is one more call."""
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: type("Stream", (), {"wait_stream": lambda *_: None})())
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Replayed)
    monkeypatch.setattr(torch.cuda, "get_rng_state", torch.get_rng_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", torch.set_rng_state)


def test_what_python_does_around_a_recording(fake_cuda, monkeypatch):
    """Inputs, gradients over micro-batches and after zero_grad, and nothing left of the calls before the recording."""
    layer, norm = nn.Linear(3, 2), nn.BatchNorm1d(2)

    def function(x, weight=None):
        loss = layer(x).square().mean() if weight is None else weight * norm(layer(x)).pow(3).mean()
        loss.backward()
        torch.rand(1)
        return loss.detach()

    recorded = runtime.Recorded(function, layer, norm)
    monkeypatch.setattr(Replayed, "recorded", recorded, raising=False)
    for weights in ((None,), (None, None), (1.0,), (0.5, 2.0), (3.0,)):
        batches = [(torch.randn(4, 3), *([weight] if weight else [])) for weight in weights]
        ours = [recorded(*batch).item() for batch in batches]
        found = [p.grad.clone() for p in layer.parameters()]
        layer.zero_grad()
        assert ours == pytest.approx([function(*batch).item() for batch in batches])
        for grad, p in zip(found, layer.parameters(), strict=True):
            assert torch.allclose(grad, p.grad)
        layer.zero_grad()
        norm.zero_grad()
        with torch.no_grad():
            layer.weight.add_(0.1)


def test_the_calls_before_a_recording_are_undone(fake_cuda, monkeypatch):
    """In a module's buffers and in the random generator, before the recording begins."""
    norm, seen = nn.BatchNorm1d(2), []

    @contextlib.contextmanager
    def graph(*_, **__):
        seen.append((norm.num_batches_tracked.item(), norm.running_mean.clone(), torch.get_rng_state()))
        yield

    def function(x):
        loss = norm(x + torch.rand(4, 2)).sum()
        loss.backward()
        return loss.detach()

    monkeypatch.setattr(torch.cuda, "graph", graph)
    recorded = runtime.Recorded(function, norm)
    monkeypatch.setattr(Replayed, "recorded", recorded, raising=False)
    before = torch.get_rng_state()
    recorded(torch.randn(4, 2, generator=torch.Generator()))
    ((count, mean, random),) = seen
    assert count == 0 and mean.abs().max() == 0 and torch.equal(random, before)


@pytest.mark.parametrize("name, index", [("cuda", 3), ("cuda:1", 1)])
def test_a_cuda_device_has_a_number(monkeypatch, name, index):
    """torch.cuda.set_device refuses a device without one."""
    taken = []
    monkeypatch.setattr(runtime.torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert runtime.pick_device(name) == torch.device("cuda", index) == taken[0]
