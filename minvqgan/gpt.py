"""The transformer of stage two (Sec. 3.2): an image as a sequence of codes, s = s_1 ... s_T, predicted one by one.

    p(s | c) = prod_i p(s_i | s_<i, c)                                                                 (Eq. 10)

A decoder-only transformer like GPT-2: learned positions, pre-norm blocks, GELU. It reads tokens (B, T) and predicts the
next one at every position: logits (B, T, K). Tokens below K are image codes, tokens from K on belong to the condition.
The head has logits for image codes only, because c is never predicted.

Letters: B batch, T tokens, C width, h heads of C/h dims, K image codes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .layers import attention
from .options import check, option


@dataclass
class GPTConfig:
    num_codes: int  # K: the head's outputs
    num_cond: int  # condition tokens, numbered K to K + num_cond - 1
    block_size: int  # longest sequence [c | s]
    n_layer: int = option(4, "blocks", least=1, most=1000)
    n_head: int = option(4, "attention heads per block", least=1)
    n_embd: int = option(128, "width", least=1)
    dropout: float = option(0.0, "fraction of activations dropped; 0.1 and more on small datasets", most=1)

    def __post_init__(self):
        check(self)
        if self.n_embd % self.n_head:
            raise ValueError(f"--n-head {self.n_head} does not divide --n-embd {self.n_embd}")


class KVCache:
    """Keys and values of the tokens read so far, for up to `length` tokens of `batch` sequences, without gradients.

    Without it each new token would recompute those of all earlier ones. Allocated once, because growing it by `cat`
    would copy everything at every token. `like`: a weight, for the device and the precision.
    """

    def __init__(self, config: GPTConfig, batch: int, length: int, like: Tensor):
        shape = (2, batch, config.n_head, length, config.n_embd // config.n_head)
        # float32 at least on a CPU, where attention to a bfloat16 cache takes four to eight times as long.
        dtype = torch.promote_types(like.dtype, torch.float32) if like.device.type == "cpu" else like.dtype
        self.memory = [torch.empty(shape, dtype=dtype, device=like.device) for _ in range(config.n_layer)]
        self.filled = 0

    def extend(self, layer: int, kv: Tensor) -> Tensor:
        """Store keys and values of t new tokens, (2, B, h, t, C/h); returns all so far, (2, B, h, filled + t, C/h)."""
        end = self.filled + kv.shape[3]
        self.memory[layer][:, :, :, self.filled : end] = kv
        return self.memory[layer][:, :, :, :end]


class CausalSelfAttention(nn.Module):
    """softmax(q k^T / sqrt(C/h) + mask) v, in h heads: (B, t, C) -> (B, t, C). The mask hides every later token."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: KVCache | None, layer: int) -> Tensor:
        B, t, C = x.shape
        qkv = self.qkv(x).view(B, t, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (3, B, h, t, C/h)
        q, kv, mask = qkv[0], qkv[1:], None
        if cache is not None:
            kv = cache.extend(layer, kv)  # (2, B, h, filled + t, C/h)
            if cache.filled and t > 1:  # several tokens after others: row i sees all up to filled + i
                mask = torch.ones(t, kv.shape[3], dtype=torch.bool, device=x.device).tril(cache.filled)
        causal = mask is None and t > 1  # a single new token sees everything before it
        y = attention(q, kv[0], kv[1], mask, self.dropout if self.training else 0.0, causal)  # (B, h, t, C/h)
        return self.proj(y.transpose(1, 2).reshape(B, t, C))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). With the norms before each layer nothing rescales the sum from the
    first block to the last, and deep stacks train stably."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C = config.n_embd
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attention = CausalSelfAttention(config)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KVCache | None, layer: int, last_only: bool = False) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), cache, layer))
        if last_only:
            x = x[:, -1:]  # (B, 1, C)
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """forward: tokens (B, T) int64 in [0, K + num_cond) -> logits (B, T, K).

    cache: the T tokens follow those in the cache; their logits equal those of a pass over the whole sequence.
    last_only: logits at the last token only, (B, 1, K), which is all that sampling needs.
    Raises ValueError for a sequence longer than block_size.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.num_codes + config.num_cond, config.n_embd)
        self.position_embedding = nn.Parameter(torch.zeros(config.block_size, config.n_embd))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.num_codes, bias=False)
        self.apply(self._init)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, cache: KVCache | None = None, last_only: bool = False) -> Tensor:
        first = cache.filled if cache is not None else 0
        end = first + tokens.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens are more than the {self.config.block_size} of this transformer")
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding[first:end])  # (B, T, C)
        for layer, block in enumerate(self.blocks):
            # With last_only, the last block skips its MLP at all positions but the last.
            x = block(x, cache, layer, last_only and layer == len(self.blocks) - 1)
        if cache is not None:
            cache.filled = end
        return self.head(self.norm(x))  # (B, T, K)


def parameter_groups(gpt: GPT, weight_decay: float) -> list[dict]:
    """For AdamW: weight decay on the matrices of linear layers only, as in GPT-2 and the paper's code. An embedding's
    row would decay at every step but learn only when its token occurs; biases and norms gain nothing from it."""
    decayed = [m.weight for m in gpt.modules() if isinstance(m, nn.Linear)]
    others = [p for p in gpt.parameters() if all(p is not matrix for matrix in decayed)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
