"""The transformer: nothing sees the future, the cache changes nothing, and the official numbers."""

import pytest
import torch
from helpers import fixture, relative_error

from minvqgan.gpt import GPT, GPTConfig, KVCache
from minvqgan.harness import official
from minvqgan.orders import ORDERS


@pytest.fixture
def gpt():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(num_codes=16, num_cond=3, block_size=20, n_layer=2, n_head=2, n_embd=8)).eval()
    torch.nn.init.normal_(gpt.position_embedding)  # zero at first: every position would look alike
    return gpt


def test_official_logits_and_greedy_continuation():
    fx = fixture("gpt")
    gpt = official.load_gpt(fx["state_dict"], fx["config"])
    with torch.no_grad():
        assert relative_error(gpt(fx["tokens"]), fx["logits"]) < 1e-5
        cache, tokens, greedy = KVCache(gpt.config, 3, 40, gpt.position_embedding), fx["prompt"], []
        for _ in range(39):
            tokens = gpt(tokens, cache).argmax(2)
            greedy.append(tokens)
    assert torch.equal(torch.cat(greedy, 1), fx["greedy"])


def test_no_token_sees_the_future(gpt):
    tokens = torch.randint(0, 19, (2, 12))
    before = gpt(tokens)
    assert before.shape == (2, 12, 16)
    for changed in range(12):
        other = tokens.clone()
        other[:, changed] = (other[:, changed] + 1) % 19
        after = gpt(other)
        assert torch.equal(before[:, :changed], after[:, :changed])
        assert not torch.allclose(before[:, changed], after[:, changed])


@pytest.mark.parametrize("parts", [[12], [1] * 12, [5, 1, 1, 3, 2]])
@torch.no_grad()
def test_cached_equals_full(gpt, parts):
    tokens = torch.randint(0, 19, (2, 12))
    cache = KVCache(gpt.config, 2, 12, gpt.position_embedding)
    logits = torch.cat([gpt(piece, cache) for piece in tokens.split(parts, 1)], 1)
    assert torch.allclose(logits, gpt(tokens), atol=1e-5)
    cache = KVCache(gpt.config, 2, 12, gpt.position_embedding)
    *_, last = (gpt(piece, cache, last_only=True) for piece in tokens.split(parts, 1))
    assert torch.allclose(last, logits[:, -1:], atol=1e-5)


def test_half_of_the_embeddings_are_dropped_in_training():
    gpt, seen = GPT(GPTConfig(16, 3, 20, n_layer=1, n_head=1, n_embd=64, dropout=0.5)), []
    gpt.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append((inputs[0] == 0).double().mean().item()))
    for mode in (True, False):
        gpt.train(mode)(torch.arange(19).expand(8, -1))
    assert seen == [pytest.approx(0.5, abs=4 * (0.25 / (8 * 19 * 64)) ** 0.5), 0]


def test_what_no_transformer_can_be_or_read(gpt):
    with pytest.raises(ValueError, match="21 tokens are more than the 20"):
        gpt(torch.zeros(1, 21, dtype=torch.long))
    for wrong, match in (
        ({"n_head": 3, "n_embd": 8}, "--n-head 3 does not divide --n-embd 8"),
        ({"n_layer": 0}, "--n-layer is 0, not a whole number from 1 to 1000"),
    ):
        with pytest.raises(ValueError, match=match):
            GPTConfig(**{"num_codes": 4, "num_cond": 1, "block_size": 4} | wrong)


@pytest.mark.parametrize("name", [name for name in ORDERS if name != "row"])
def test_orders_equal_the_official_ones(name):
    assert torch.equal(ORDERS[name](8), fixture("orders")[name.replace("-", "_")])


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16])
def test_orders_are_permutations(n):
    for name, order in ORDERS.items():
        assert torch.equal(order(n).sort().values, torch.arange(n * n)), name
