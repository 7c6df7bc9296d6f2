"""Both stages as one: the official models' numbers for every kind of condition, and the sliding window."""

from dataclasses import replace

import pytest
import torch
from helpers import fixture, official_files, relative_error
from test_sampler import slow_choice

from minvqgan import VQGAN, VQGANConfig, sampler
from minvqgan.conditioning import ClassCondition, CoordinateCondition, NoCondition, SpatialCondition, coordinates
from minvqgan.gpt import GPT, GPTConfig
from minvqgan.harness import official
from minvqgan.sampler import Sampling
from minvqgan.two_stage import TwoStage, TwoStageConfig, condition_length

GREEDY = Sampling(temperature=0)
KINDS = ("none", "class", "coords", "spatial")


@pytest.mark.parametrize("kind", ["none", "class", "coord", "depth"])
def test_official_numbers(kind, tmp_path):
    fx = fixture(f"net2net_{kind}")
    model = official.load(*official_files(fx, tmp_path))
    with torch.no_grad():
        s, r = model.image_tokens(fx["x"]), model.condition_tokens(fx["c"])
        assert torch.equal(s, fx["z_indices"])
        assert torch.equal(r.flatten(1), fx["c_indices"])
        logits = model.gpt(torch.cat([r.flatten(1), s[:, :-1]], 1))[:, r.flatten(1).shape[1] - 1 :]
        assert relative_error(logits, fx["logits"]) < 1e-5
        assert relative_error(model(s, r).mean(), fx["loss"]) < 1e-5
        assert relative_error(model.nll(fx["x"], fx["c"]).mean(), fx["loss"]) < 1e-5
        assert relative_error(model.vqgan.decode_indices(model.to_map(s)), fx["image_of_z"]) < 1e-5
    indices = model.sample_indices(fx["c"], sampling=GREEDY).flatten(1)
    assert torch.equal(indices[:, :64], fx["greedy_64"])
    completed = model.sample_indices(fx["c"], sampling=GREEDY, given=s.view(2, 16, 16), keep=128).flatten(1)
    assert torch.equal(completed[:, :128], s[:, :128])
    n = fx["completion_from_128"].shape[1]
    assert n > 128 and torch.equal(completed[:, :n], fx["completion_from_128"])
    if "slide_c" in fx:
        assert torch.equal(model.condition_tokens(fx["slide_c"]), fx["slide_c_indices"])
        assert model.config.n == fx["slide_window"]
        for wave in (False, True):
            found = model.sample_indices(fx["slide_c"], sampling=Sampling(temperature=0, wave=wave))
            assert torch.equal(found, fx["slide_greedy"])
    assert ("slide_c" in fx) == (kind in ("coord", "depth"))


CONFIG = VQGANConfig(image_size=8, ch=8, ch_mult=(1, 2), z_channels=8, code_dim=4, codebook_size=16)


def make_model(kind="none", order="row", guided=False, n=4):
    torch.manual_seed(0)
    condition = {
        "none": lambda: NoCondition(),
        "class": lambda: ClassCondition(3),
        "coords": lambda: CoordinateCondition(f=2, levels=31),
        "spatial": lambda: SpatialCondition(VQGAN(CONFIG)),
    }[kind]()
    length = condition_length(condition, n) + n * n
    gpt = GPT(GPTConfig(16, condition.num_tokens + guided, length, n_layer=2, n_head=2, n_embd=16))
    torch.nn.init.normal_(gpt.position_embedding)
    for block in gpt.blocks:  # weights large enough that what stands before matters
        torch.nn.init.normal_(block.attention.qkv.weight, std=0.4)
    torch.nn.init.normal_(gpt.head.weight, std=0.5)
    return TwoStage(VQGAN(CONFIG), condition, gpt, TwoStageConfig(n, order, guided)).eval()


def condition_for(kind, count, h=4, w=4):
    if kind == "class":
        return torch.arange(count) % 3
    if kind == "coords":
        return coordinates(2 * h, 2 * w).expand(count, -1, -1, -1)
    return torch.randn(count, 3, 2 * h, 2 * w)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_the_sum_of_single_predictions(kind):
    """-log p(s | c) = -sum_i log p(s_i | s_<i, c), each factor from a forward pass of its own. Condition tokens lie
    behind the codes."""
    model = make_model(kind, guided=True)
    x, c = torch.randn(2, 3, 8, 8), condition_for(kind, 2)
    s, r = model.image_tokens(x), model.condition_tokens(c).flatten(1)
    assert r.min() >= 16 and r.max() < 16 + model.condition.num_tokens == model.null
    truth = torch.zeros(2)
    for i in range(16):
        logits = model.gpt(torch.cat([r, s[:, :i]], 1))[:, -1]
        truth -= logits.log_softmax(1).gather(1, s[:, i : i + 1])[:, 0]
    assert model(s, r).shape == (2, 16)
    assert torch.allclose(model.nll(x, c), truth.detach() / 16, atol=1e-5)


def test_a_condition_of_many_tokens_is_dropped_as_a_whole():
    model, seen = make_model("spatial", guided=True), []
    model.gpt.register_forward_pre_hook(lambda gpt, inputs: seen.append(inputs[0][:, :16]))
    s, r = torch.zeros(40, 16, dtype=torch.long), torch.full((40, 4, 4), 17)
    model(s, r, drop_cond=0.5)
    dropped = seen[0] == model.null
    assert torch.equal(dropped.all(1), dropped.any(1)) and 4 < dropped.all(1).sum() < 36
    assert (seen[0][~dropped] == 17).all()


@pytest.mark.parametrize("order", ["subsample", "z-curve", "spiral-out", "spiral-in", "alternate"])
def test_orders_go_there_and_back(order):
    model = make_model(order=order)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model.to_map(model.image_tokens(x)), model.vqgan.encode_indices(x))
    with pytest.raises(ValueError, match="only row order slides"):
        model.sample(n=1, size=(6, 6))


def test_guidance_temperature_and_filters_in_their_order():
    """Every code from two forward passes, with c and without, and by the slow definition of a choice."""
    model = make_model("class", guided=True)
    torch.nn.init.normal_(model.gpt.token_embedding.weight)  # so that c matters
    c, u = torch.tensor([0, 2]), sampler.uniforms(0, range(2), 16)
    ours = model.sample_indices(c, sampling=Sampling(temperature=0.7, top_k=9, top_p=0.8, guidance=2.5))
    assert not torch.equal(ours, model.sample_indices(c, sampling=Sampling(temperature=0.7, top_k=9, top_p=0.8)))
    for b in range(2):
        s: list[int] = []
        for i in range(16):
            tokens = [torch.tensor([[first, *s]]) for first in (16 + c[b].item(), model.null)]
            with_c, without_c = (model.gpt(t)[0, -1] for t in tokens)
            logits = (without_c + 2.5 * (with_c - without_c)).tolist()
            s.append(slow_choice(logits, u[b, i].item(), 0.7, 9, 0.8))
        assert ours[b].flatten().tolist() == s


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_image_for_any_batch_and_without_the_cache(kind, guidance):
    model = make_model(kind, guided=True)
    c, how = condition_for(kind, 4), Sampling(guidance=guidance)
    together = model.sample_indices(c, 1, [5, 6, 7, 8], sampling=how)
    alone = [model.sample_indices(c[i : i + 1], 1, [5 + i], sampling=how) for i in range(4)]
    assert torch.equal(together, torch.cat(alone))
    drawn: list[int] = []
    uncached = Sampling(guidance=guidance, use_cache=False, on_token=drawn.append)
    assert torch.equal(together, model.sample_indices(c, 1, [5, 6, 7, 8], sampling=uncached))
    assert sum(drawn) == together.numel()
    assert len({tuple(row.flatten().tolist()) for row in together}) == 4


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_bfloat16_samples_the_same_image_in_any_batch(guidance):
    """Wide enough that rounding shows: a product of one row differs from the same row among others."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(64, 2, 64, n_layer=2, n_head=8, n_embd=512)).eval().bfloat16()
    torch.nn.init.normal_(gpt.head.weight, std=0.1)
    r, s, u = torch.full((4, 1), 64), torch.zeros(4, 0, dtype=torch.long), torch.rand(4, 64)
    how = Sampling(guidance=guidance), 65
    together = sampler.continue_tokens(gpt, r, s, u, *how)
    for size in (1, 2, 3):
        batches = zip(*(t.split(size) for t in (r, s, u)), strict=True)
        alone = [sampler.continue_tokens(gpt, *batch, *how) for batch in batches]
        assert torch.equal(together, torch.cat(alone))
    assert len({tuple(row.tolist()) for row in together}) == 4


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(4, 4), (4, 9), (9, 4), (5, 5), (7, 10), (11, 6)])
@pytest.mark.parametrize("kind, n", [("none", 4), ("coords", 4), ("spatial", 4), ("none", 3)])
def test_wave_equals_one_by_one_equals_the_definition(kind, n, size, stride):
    """The definition: for each position in reading order the whole window, recomputed, and the logits at its place."""
    if stride > n:
        return
    model = make_model(kind, n=n)
    c = condition_for(kind, 2, *size)
    r, u = model.condition_tokens(c), sampler.uniforms(0, [0, 1], size[0] * size[1])
    h, w = size
    s = torch.zeros(2, h, w, dtype=torch.long)
    for i in range(h):
        left, top = 0, max(0, min(i - n // 2, h - n))
        for j in range(w):
            while left < w - n and j - left >= n // 2 - stride // 2 + stride:  # the window moves on by its stride
                left = min(left + stride, w - n)
            cut = (slice(None), slice(top, top + n), slice(left, left + n))
            before = r[cut].flatten(1) if r.ndim == 3 else r
            logits = model.gpt(torch.cat([before, s[cut].flatten(1)[:, :-1]], 1))[:, before.shape[1] - 1 :]
            p = logits[:, (i - top) * n + j - left].detach().double().softmax(1)
            s[:, i, j] = (p.cumsum(1) <= u[:, i * w + j, None]).sum(1)
    for wave in (True, False):
        assert torch.equal(model.sample_indices(c, size=size, sampling=Sampling(wave=wave, stride=stride)), s)


@pytest.mark.parametrize("size", [(4, 4), (7, 10)])
def test_completion_keeps_what_is_given(size):
    model = make_model("none")
    given = torch.randint(0, 16, (2, *size))
    full = model.sample_indices(torch.zeros(2, 1), size=size, given=given, keep=size[0] * size[1])
    assert torch.equal(full, given)
    keep = 2 * size[1] + 1
    half = model.sample_indices(torch.zeros(2, 1), size=size, given=given, keep=keep)
    assert torch.equal(half.flatten(1)[:, :keep], given.flatten(1)[:, :keep])
    assert not torch.equal(half, given)
    # What is continued is what the model itself began: keeping any prefix of a sample gives the sample back.
    whole = model.sample_indices(torch.zeros(2, 1), size=size)
    assert torch.equal(model.sample_indices(torch.zeros(2, 1), size=size, given=whole, keep=keep), whole)


def test_images_completions_and_mistakes():
    model, classes = make_model("class"), torch.tensor([0, 2])
    images = model.sample(classes, seed=1)
    assert images.shape == (2, 3, 8, 8)
    completed, given = model.complete(images, 0.5, classes), model.vqgan.encode_indices(images)
    codes = model.sample_indices(classes, given=given, keep=8)  # two of the four rows
    assert torch.equal(completed, model.vqgan.decode_indices(codes)) and not torch.equal(codes, given)
    assert torch.equal(model.complete(images, 0.4, classes), completed), "whole rows"
    assert make_model("coords").sample(n=2, size=(6, 8)).shape == (2, 3, 12, 16)
    for match, c, how in (
        ("needs a condition", None, {}),
        (r"classes must lie in \[0, 3\), got 3 to 3", [3], {}),
        (r"expected integer classes \(B,\), got \(1, 1\) of torch.int64", [[0]], {}),
        ("dropped conditions", [0], {"sampling": Sampling(guidance=2.0)}),
        ("fewer than the 4 x 4", [0], {"size": (3, 8)}),
        ("a stride of 5 is not between 1 and 4", [0], {"size": (6, 8), "sampling": Sampling(stride=5)}),
    ):
        with pytest.raises(ValueError, match=match):
            model.sample(None if c is None else torch.tensor(c), **how)
    with pytest.raises(ValueError, match=r"given codes are \(2, 16\), not \(2, 4, 4\)"):
        model.sample_indices(classes, given=given.flatten(1), keep=8)
    with pytest.raises(ValueError, match="the condition covers 4 x 4 latents, the image has 6 x 6"):
        make_model("coords").sample_indices(condition_for("coords", 1), size=(6, 6))


def test_coordinates_of_a_crop_are_a_crop_of_the_coordinates():
    c = coordinates(6, 10)
    assert c.shape == (1, 6, 10) and c[0, 0, 0] == 0 and c[0, 2, 3] == pytest.approx(23 / 60)
    condition = CoordinateCondition(f=2, levels=60)
    tokens = condition(c[None])
    assert torch.equal(tokens[:, 1:, 1:4], condition(c[None, :, 2:, 2:8]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_likelihood_and_samples_in_another_precision(kind, dtype):
    model = make_model(kind)
    x, c = torch.randn(2, 3, 8, 8), condition_for(kind, 2)
    s, r = model.image_tokens(x), model.condition_tokens(c)
    truth = model(s, r).detach()
    model.to(dtype)
    found = model(s, r).detach()  # the same codes: rounding may give an image others
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.allclose(found.float(), truth, atol=0.5) and (found - truth).abs().mean() < 0.05
    c = c.to(dtype) if kind == "spatial" else c
    assert model.nll(x.to(dtype), c).isfinite().all()
    assert model.sample(c).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_codes_and_classes_of_any_integer_type(dtype):
    model = make_model("class")
    s, classes = torch.randint(0, 16, (3, 16)), torch.arange(3)
    r = model.condition_tokens(classes.to(dtype)).to(dtype)
    assert torch.equal(model(s.to(dtype), r), model(s, model.condition_tokens(classes)))
    ours, truth = (
        model.sample_indices(classes.to(t), given=s.view(3, 4, 4).to(t), keep=8) for t in (dtype, torch.int64)
    )
    assert torch.equal(ours, truth)


def test_parts_that_were_not_made_for_each_other():
    model = make_model("class")
    coarser, larger = VQGAN(replace(CONFIG, ch_mult=(1, 1, 1))), VQGAN(replace(CONFIG, codebook_size=17))
    spatial = {"gpt": make_model("spatial").gpt, "condition": SpatialCondition(coarser)}
    for match, parts in (
        ("a sequence of 25 tokens does not fit the transformer's 17", {"config": TwoStageConfig(5)}),
        ("needs 16 codes and 20 tokens in all", {"condition": ClassCondition(4)}),
        ("needs 17 codes", {"vqgan": larger}),
        ("the condition is downsampled by 4, the image by 2", spatial),
    ):
        own = {"vqgan": model.vqgan, "condition": model.condition, "gpt": model.gpt, "config": model.config}
        with pytest.raises(ValueError, match=match):
            TwoStage(**own | parts)
    with pytest.raises(ValueError, match="--order is 'random', not one of row, "):
        TwoStageConfig(4, order="random")


def test_only_the_transformer_trains():
    model = make_model("spatial").train()
    assert model.gpt.training and not model.vqgan.training and not model.condition.vqgan.training
    assert not any(p.requires_grad for part in (model.vqgan, model.condition) for p in part.parameters())
