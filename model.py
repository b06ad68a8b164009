"""
The one GPT of METALEARN: learner and critic are the same network.

What differs from GPT-2:
- LayerNorm without weights before each sublayer and before the head;
- rotary positions that the caller gives, since own and true tokens of a chunk share theirs;
- no biases; head and embedding untied;
- output projections and the head start at zero, so that the untrained model predicts uniformly;
- special tokens (LOSS, gists) are extra rows of the embedding, and are never predicted;
- one rule says who attends to whom, from (kind, chunk, position): `attention_mask` draws every layout;
- parameters work as a plain dict: `torch.func.functional_call(model, theta, (tokens,))`.

Dimensions: B sequences, L tokens in each, C = n_embd, H heads of D = C / H, V = vocab_size, S cached tokens.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 512  # text tokens; only these are predicted
    n_special: int = 1     # extra rows of the embedding: ids vocab_size, vocab_size + 1, ...
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 128


# ---- who sees whom

# kinds of token: the world's, the learner's own, and gists of the one and of the other
TRUE, OWN, GIST, OWN_GIST = range(4)

# within a chunk: what each kind (row) sees of each kind (column), up to itself
WITHIN = ((1, 0, 0, 0),  # TRUE
          (0, 1, 0, 0),  # OWN
          (1, 0, 1, 0),  # GIST
          (0, 1, 0, 1))  # OWN_GIST

# of earlier chunks: what everybody sees of each kind
EARLIER = dict(text=(1, 0, 0, 0), gist=(0, 0, 1, 0), full=(1, 0, 1, 0), none=(0, 0, 0, 0))


def attention_mask(kind, chunk, pos, earlier="text"):
    """Who attends to whom: bool [L, L], row = query, column = key.

    kind, chunk, pos: int [L] each. Within its chunk a token sees what WITHIN allows, up to itself: earlier
    positions, and of its own position what stands before it. Of earlier chunks it sees what `earlier` names.
    Raises ValueError for an unknown one.

    Text is all true and one chunk, and so are the critic's triples (own, obs, LOSS): both are causal.

    earlier = "text", two chunks of two tokens, own tokens y beside true tokens x (y2 has the position of x2):

                  x0 x1 x2 x3 y0 y1 y2 y3
        chunk      0  0  1  1  0  0  1  1
        position   0  1  2  3  0  1  2  3
        x0         1  .  .  .  .  .  .  .
        x1         1  1  .  .  .  .  .  .
        x2         1  1  1  .  .  .  .  .
        x3         1  1  1  1  .  .  .  .
        y0         .  .  .  .  1  .  .  .
        y1         .  .  .  .  1  1  .  .
        y2         1  1  .  .  .  .  1  .
        y3         1  1  .  .  .  .  1  1

    Two chunks of two tokens, each with a gist G at its end, which has the position of the token before it:

                 earlier = "gist"            "full"                  "none"
                x0 x1 G0 x2 x3 G1      x0 x1 G0 x2 x3 G1      x0 x1 G0 x2 x3 G1
        x0       1  .  .  .  .  .       1  .  .  .  .  .       1  .  .  .  .  .
        x1       1  1  .  .  .  .       1  1  .  .  .  .       1  1  .  .  .  .
        G0       1  1  1  .  .  .       1  1  1  .  .  .       1  1  1  .  .  .
        x2       .  .  1  1  .  .       1  1  1  1  .  .       .  .  .  1  .  .
        x3       .  .  1  1  1  .       1  1  1  1  1  .       .  .  .  1  1  .
        G1       .  .  1  1  1  1       1  1  1  1  1  1       .  .  .  1  1  1
    """
    if earlier not in EARLIER:
        raise ValueError(f"earlier={earlier!r} must be one of {', '.join(EARLIER)}")
    row = lambda t: t[:, None]
    place = torch.arange(len(kind), device=kind.device)
    up_to_itself = (pos < row(pos)) | (pos == row(pos)) & (place <= row(place))
    within = torch.tensor(WITHIN, dtype=torch.bool, device=kind.device)[row(kind), kind]
    of_earlier = torch.tensor(EARLIER[earlier], dtype=torch.bool, device=kind.device)[kind]
    return (chunk == row(chunk)) & within & up_to_itself | (chunk < row(chunk)) & of_earlier

causal = lambda L, device: torch.ones(L, L, dtype=torch.bool, device=device).tril()  # bool [L, L]


def attend(q, k, v, mask, fused):
    """Attention of q [B, H, L, D] over k, v [B, H, S, D] -> [B, H, L, D].

    mask: bool, broadcastable to [B, H, L, S]; None is causal (L = S).
    fused: PyTorch's SDPA, the fastest, which gives first derivatives only. Otherwise an explicit softmax,
    which also survives double backward and `torch.func.jvp`: second order needs that one.
    """
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    mask = causal(k.size(2), k.device) if mask is None else mask
    scores = (q @ k.transpose(-2, -1)) * q.size(-1) ** -0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


def attend_branches(q, k, v, past_k, past_v, seen, near, mine):
    """Attention of M short branches at each of N places of one past: q [B, H, N, M, r, D] -> the same.

    k, v: [B, H, N, M, R, D], a branch's own tokens so far. past_k, past_v: [B, H, S, D]; near: int [N, S'],
    what of it a place may see, copied for each; None: all of it, and none is copied. seen: bool [N, S' or S],
    what a place does see. mine: bool [r, R]. One mask over all branches would cost N M times as much.
    """
    past_k, past_v, q = past_k[:, :, near], past_v[:, :, near], q * q.size(-1) ** -0.5  # [..., 1 or N, S', D]
    asks = q.reshape(*past_k.shape[:3], -1, q.size(-1))
    past = (asks @ past_k.transpose(-2, -1)).view(*q.shape[:3], -1, seen.size(1))         # [..., N, M r, S']
    own = (q @ k.transpose(-2, -1)).masked_fill(~mine, float("-inf")).flatten(3, 4)       # [..., N, M r, R]
    weights = torch.cat((past.masked_fill(~seen[:, None], float("-inf")), own), -1).softmax(-1)
    on_past, on_own = weights.split((seen.size(1), k.size(-2)), -1)
    return (on_past.reshape(*asks.shape[:-1], -1) @ past_v).view_as(q) + on_own.unflatten(3, q.shape[3:5]) @ v


# ---- the network

def norm(x):
    """LayerNorm over the last dimension, without weights (arXiv 1607.06450).

    For second derivatives take gradients of gradients, or their jvp: the gradient of a jvp is wrong here
    (PyTorch 2.13 holds the statistics fixed in it).
    """
    return F.layer_norm(x, x.shape[-1:])


def rotary_table(pos, dim, dtype):
    """(cos, ∓ sin), each [..., L, 1, dim], of the angles pos · 10000^(−2i / dim) (arXiv 2104.09864)."""
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, device=pos.device, dtype=torch.float32) / dim)
    angle = (pos[..., None].float() * frequency).unsqueeze(-2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x, table):
    """Turns x [..., L, H, D] by its positions, as D / 2 pairs of numbers, D / 2 apart."""
    cos, sin = table
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head = c.n_head
        self.qk = nn.Linear(c.n_embd, 2 * c.n_embd, bias=False)
        self.v = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.out = nn.Linear(c.n_embd, c.n_embd, bias=False)

    def heads(self, x, table):
        """q, k and v, each [B, H, ..., L, D], of x [B, ..., L, C]."""
        qk = self.qk(x).unflatten(-1, (2 * self.n_head, -1))  # turned at once, while a token's numbers adjoin
        q, k = rotate(qk, table).movedim(-2, 1).chunk(2, 1)
        return q, k, self.v(x).unflatten(-1, (self.n_head, -1)).movedim(-2, 1)

    def join(self, y):
        return self.out(y.movedim(1, -2).flatten(-2))

    def forward(self, x, table, mask, fused, cache, read=None):
        q, k, v = self.heads(x, table)
        if read is not None:
            q, mask = q[:, :, read], (causal(q.size(2), q.device) if mask is None else mask)[read]
        if cache is not None:
            if self in cache:
                k, v = (torch.cat((past, new), 2) for past, new in zip(cache[self], (k, v)))  # S + L tokens
            cache[self] = k, v
        return self.join(attend(q, k, v, mask, fused))

    def branch(self, x, table, past, cache, read):
        q, k, v = self.heads(x, table)
        past_k, past_v, *own = cache[self]
        if own:
            k, v = torch.cat((own[0], k), -2), torch.cat((own[1], v), -2)
        cache[self] = past_k, past_v, k, v
        mine = causal(k.size(-2), x.device)[-q.size(-2):]
        return self.join(attend_branches(q[..., read, :], k, v, past_k, past_v, *past, mine[read]))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attention = Attention(c)
        self.up = nn.Linear(c.n_embd, 4 * c.n_embd, bias=False)
        self.down = nn.Linear(4 * c.n_embd, c.n_embd, bias=False)

    def mlp(self, x):
        return x + self.down(F.gelu(self.up(norm(x))))

    def forward(self, x, table, mask, fused, cache, read=None):
        y = self.attention(norm(x), table, mask, fused, cache, read)
        return self.mlp((x if read is None else x[:, read]) + y)

    def branch(self, x, table, past, cache, read=slice(None)):
        return self.mlp(x[..., read, :] + self.attention.branch(norm(x), table, past, cache, read))


class GPT(nn.Module):
    def __init__(self, config):
        """Raises ValueError if n_embd is not an even multiple of n_head."""
        super().__init__()
        if config.n_embd % (2 * config.n_head):
            raise ValueError(f"n_embd={config.n_embd} must be an even multiple of n_head={config.n_head}")
        self.config = config
        self.embed = nn.Embedding(config.vocab_size + config.n_special, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.initialise()

    def initialise(self):
        for name, p in self.named_parameters():
            scale = 1.0 if name == "embed.weight" else self.config.n_embd ** -0.5
            last = name.endswith(("out.weight", "down.weight", "head.weight"))
            nn.init.normal_(p, std=0.0 if last else scale)

    def forward(self, x, pos=None, mask=None, read=None, fused=True, cache=None, until=None):
        """Logits [B, L', V] at the positions that `read` selects, a slice or a list of them; all if None.

        x: tokens, int [B, L], or embeddings, float [B, L, C].
        pos: int [L] or [B, L]; 0 to L − 1 if None. mask: bool [L, S + L], causal if None.
        cache: a dict, empty at first, that keeps keys and values: the next call sees all S tokens so far, and
        must say by pos and mask where its own stand among them (ValueError).
        until: the number of a block from 1; in place of logits, what enters it, normed [B, L', C], or what
        leaves the last one if until = n_layer. No later block is computed, the one before where it is read.
        """
        if cache and (pos is None or mask is None):
            raise ValueError("with tokens in the cache, pos and mask must be given")
        x = self.embed(x) if not x.is_floating_point() else x
        table = self.table(torch.arange(x.size(1), device=x.device) if pos is None else pos, x.dtype)
        *blocks, last = self.blocks[:until]
        x = norm(x)
        for block in blocks:
            x = block(x, table, mask, fused, cache)
        x = norm(last(x, table, mask, fused, cache, read))
        return self.head(x) if until is None else x

    def branch(self, x, pos, sees, cache, near=None, read=slice(None), until=None):
        """Logits [B, N, M, r', V] of M branches at each of N places of the past that `cache` holds.

        x: int [B, N, M, r], the next r tokens of each branch. pos: int [N, r]. sees: bool [N, S], which
        tokens of the past a place sees; near: int [N, S'], all of these, where they are few. read, until: as
        in `forward`. Branches grow in the cache: pass dict(cache) to begin new ones. Only what is read goes
        through the last block.
        """
        past, x = (sees if near is None else sees.gather(1, near), near), self.embed(x)
        table = self.table(pos[:, None], x.dtype)
        *blocks, last = self.blocks[:until]
        x = norm(x)
        for block in blocks:
            x = block.branch(x, table, past, cache)
        x = norm(last.branch(x, table, past, cache, read))
        return self.head(x) if until is None else x

    def table(self, pos, dtype):
        return rotary_table(pos, self.config.n_embd // self.config.n_head, dtype)


def adamw(model, learning_rate):
    """AdamW with decay on matrices alone: embeddings of rare tokens should not fade between them."""
    embeddings = [p for n, p in model.named_parameters() if n.endswith("embed.weight")]
    matrices = [p for n, p in model.named_parameters() if not n.endswith("embed.weight")]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": embeddings, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


# ---- writing text

def sample_tokens(logits, u):
    """One token for each row of logits [..., V]: the cumulative distribution inverted at u [...] in [0, 1).

    The randomness is an argument, so that a batch cut over ranks draws what the whole one draws.
    """
    cdf = logits.float().softmax(-1).cumsum(-1)
    token = torch.searchsorted(cdf, u.float().unsqueeze(-1) * cdf[..., -1:], right=True).squeeze(-1)
    return token.clamp(max=logits.size(-1) - 1)


@torch.no_grad()
def rollout(model, x, starts, steps, u=None):
    """Own text after many prefixes at once: own tokens, int [B, n, steps].

    x: true tokens, int [B, L], read once. starts: n positions s, 1 ≤ s ≤ L: a branch that has read x[:, :s]
    alone grows there. u: uniform numbers [B, n, steps] to sample with; None takes the likeliest token. Raises
    ValueError if a start of a list lies outside 1 … L; to look at a tensor would wait for the device.
    """
    if not isinstance(starts, torch.Tensor) and not 1 <= min(starts) <= max(starts) <= x.size(1):
        raise ValueError(f"starts must lie in 1 ... {x.size(1)}, got {starts}")
    starts = torch.as_tensor(starts, device=x.device)
    cache, own = {}, []
    sees = torch.arange(x.size(1), device=x.device) < starts[:, None]
    logits = model(x, cache=cache, read=starts - 1)  # [B, n, V]
    for j in range(steps):
        own.append(logits.argmax(-1) if u is None else sample_tokens(logits, u[:, :, j]))
        if j < steps - 1:
            logits = model.branch(own[-1][:, :, None, None], starts[:, None] + j, sees, cache)[:, :, 0, 0]
    return torch.stack(own, dim=2)
