"""
The one GPT of METALEARN: learner and critic are the same network.

What differs from GPT-2:
- RMSNorm without weights before each sublayer and before the head; queries and keys normalised too (QK-norm);
- rotary positions that the caller gives, since own and true tokens of a chunk share theirs;
- relu² in the MLP; no biases; head and embedding untied;
- output projections and the head start at zero, so that the untrained model predicts uniformly;
- special tokens (LOSS, later gists) are extra rows of the embedding, and are never predicted;
- attention by a rule over (kind, chunk, position) of query and key: `attention_mask` draws every layout;
- the input may be embeddings instead of tokens: stage 3's gists enter as means of them;
- parameters work as a plain dict: `torch.func.functional_call(model, params, (tokens,))`.

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


# ----------------------------------------------------------------------------------------------
# who sees whom

# kinds of token: the world's, the learner's own, and gists of the one and of the other
TRUE, OWN, GIST, OWN_GIST = range(4)


def attention_mask(kind, chunk, pos, truth_beside_own=False):
    """Who attends to whom: bool [L, L], row = query, column = key.

    kind, chunk, pos: int [L] each. The rule:
    - a true token attends to true tokens at its own and earlier positions;
    - an own token attends to the true tokens of earlier chunks, and to the own tokens of its chunk up to itself;
    - a gist of true text (GIST) attends to true tokens at its own and earlier positions, and to itself; with
      truth_beside_own also to the own tokens of its chunk up to its position;
    - a gist of own text (OWN_GIST) attends to the true tokens of earlier chunks, to the own tokens of its chunk up to
      its position, and to itself.

    Text is all true and one chunk, and so are the critic's triples (pred, obs, LOSS). Both are causal:

              x0 x1 x2 x3                    p0 o0 L0 p1 o1 L1      (positions 0 to 5)
        x0     1  .  .  .               p0    1  .  .  .  .  .
        x1     1  1  .  .               o0    1  1  .  .  .  .
        x2     1  1  1  .               L0    1  1  1  .  .  .
        x3     1  1  1  1               p1    1  1  1  1  .  .
                                        o1    1  1  1  1  1  .
                                        L1    1  1  1  1  1  1

    Two chunks of two tokens, own tokens y beside true tokens x, and behind them the gists A of the own chunks and B of
    the true ones (y2 has the position of x2; a gist has that of the last token it reads). Without the gists it is a
    rollout. o is what truth_beside_own adds:

                  x0 x1 x2 x3 y0 y1 y2 y3 A0 A1 B0 B1
        chunk      0  0  1  1  0  0  1  1  0  1  0  1
        position   0  1  2  3  0  1  2  3  1  3  1  3
        x0         1  .  .  .  .  .  .  .  .  .  .  .
        x1         1  1  .  .  .  .  .  .  .  .  .  .
        x2         1  1  1  .  .  .  .  .  .  .  .  .
        x3         1  1  1  1  .  .  .  .  .  .  .  .
        y0         .  .  .  .  1  .  .  .  .  .  .  .
        y1         .  .  .  .  1  1  .  .  .  .  .  .
        y2         1  1  .  .  .  .  1  .  .  .  .  .
        y3         1  1  .  .  .  .  1  1  .  .  .  .
        A0         .  .  .  .  1  1  .  .  1  .  .  .
        A1         1  1  .  .  .  .  1  1  .  1  .  .
        B0         1  1  .  .  o  o  .  .  .  .  1  .
        B1         1  1  1  1  .  .  o  o  .  .  .  1
    """
    q_kind, k_kind = kind[:, None], kind[None, :]
    q_chunk, k_chunk = chunk[:, None], chunk[None, :]
    earlier = pos[None, :] <= pos[:, None]
    of_truth, of_own = (q_kind == TRUE) | (q_kind == GIST), (q_kind == OWN) | (q_kind == OWN_GIST)
    truth_sees_true = of_truth & (k_kind == TRUE) & earlier
    own_sees_true = of_own & (k_kind == TRUE) & (k_chunk < q_chunk)
    sees_own = of_own | (q_kind == GIST) if truth_beside_own else of_own
    sees_own = sees_own & (k_kind == OWN) & (k_chunk == q_chunk) & earlier
    itself = torch.eye(len(kind), dtype=torch.bool, device=kind.device)
    return truth_sees_true | own_sees_true | sees_own | itself


def bottleneck_mask(chunk, kind, how):
    """Who attends to whom where text is cut into chunks and earlier chunks are read through their gists.

    chunk, kind (TRUE or GIST): int [L] each, in the order of the sequence. Returns bool [L, L]: everything sees its own
    chunk up to itself, and of earlier chunks: with how = "gist" (and "pool") their gists alone, with "full" all of
    them, with "none" nothing. Two chunks of two tokens x, each with a gist G at its end:

                    gist, pool                  full                    none
                x0 x1 G0 x2 x3 G1        x0 x1 G0 x2 x3 G1       x0 x1 G0 x2 x3 G1
        x0       1  .  .  .  .  .         1  .  .  .  .  .        1  .  .  .  .  .
        x1       1  1  .  .  .  .         1  1  .  .  .  .        1  1  .  .  .  .
        G0       1  1  1  .  .  .         1  1  1  .  .  .        1  1  1  .  .  .
        x2       .  .  1  1  .  .         1  1  1  1  .  .        .  .  .  1  .  .
        x3       .  .  1  1  1  .         1  1  1  1  1  .        .  .  .  1  1  .
        G1       .  .  1  1  1  1         1  1  1  1  1  1        .  .  .  1  1  1

    Raises ValueError for another `how`.
    """
    causal = torch.ones(len(chunk), len(chunk), dtype=torch.bool, device=chunk.device).tril()
    same = chunk[:, None] == chunk[None, :]
    if how in ("gist", "pool"):
        return causal & (same | (kind == GIST)[None, :])
    if how not in ("full", "none"):
        raise ValueError(f"how={how!r} must be gist, pool, full or none")
    return causal if how == "full" else causal & same


def attend(q, k, v, mask, fused):
    """Attention of q [B, H, L, D] over k, v [B, H, S, D] -> [B, H, L, D].

    mask: bool, broadcastable to [B, H, L, S]; None is causal (L = S).
    fused: PyTorch's SDPA, the fastest, which gives first derivatives only. Otherwise an explicit softmax, which also
    survives double backward and `torch.func.jvp`: second order needs that one.
    """
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    if mask is None:
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.transpose(-2, -1)) * q.size(-1) ** -0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


def attend_branches(q, k, v, past_k, past_v, near, sees, causal):
    """Attention of M short branches at each of N places of one past that all share: q [B, H, N, M, r, D] -> the same.

    k, v: [B, H, N, M, R, D], a branch's own tokens so far. past_k, past_v: [B, H, S, D]. near: int [N, S'], which tokens
    of the past a place may see at all; sees: bool [N, S'], which of those it does. causal: bool [r, R]. Branches do not
    see one another: under one mask over all their tokens this would cost N M times as much.
    """
    past_k, past_v, q = past_k[:, :, near], past_v[:, :, near], q * q.size(-1) ** -0.5
    past = (q.flatten(3, 4) @ past_k.transpose(-2, -1)).masked_fill(~sees[:, None], float("-inf"))  # [B, H, N, M r, S']
    own = (q @ k.transpose(-2, -1)).masked_fill(~causal, float("-inf"))                            # [B, H, N, M, r, R]
    weights = torch.cat((past, own.flatten(3, 4)), -1).softmax(-1)
    y = (weights[..., :past.size(-1)] @ past_v).view_as(q)
    return y + weights[..., past.size(-1):].view_as(own) @ v


# ----------------------------------------------------------------------------------------------
# the network

def norm(x):
    """RMSNorm over the last dimension, without weights (arXiv 1910.07467)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def rotary_table(pos, dim, dtype):
    """(cos, sin), each [..., 1, L, dim / 2], of the angles pos · 10000^(−2i / dim) (arXiv 2104.09864)."""
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, device=pos.device, dtype=torch.float32) / dim)
    angle = (pos[..., None].float() * frequency).unsqueeze(-3)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, table):
    """Turns x [B, H, L, D] by its positions, as D / 2 pairs of numbers."""
    cos, sin = table
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head = c.n_head
        self.qkv = nn.Linear(c.n_embd, 3 * c.n_embd, bias=False)
        self.out = nn.Linear(c.n_embd, c.n_embd, bias=False)

    def forward(self, x, table, mask, fused, cache, read):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_head, -1)).movedim(-3, 0).movedim(-2, 2)  # [B, H, ..., L, D] each
        q, k = rotate(norm(q), table), rotate(norm(k), table)
        if x.dim() == 5:
            past_k, past_v, *own = cache[self]
            if own:
                k, v = torch.cat((own[0], k), -2), torch.cat((own[1], v), -2)
            cache[self] = past_k, past_v, k, v
            causal = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool, device=x.device).tril(k.size(-2) - q.size(-2))
            y = attend_branches(q[..., read, :], k, v, past_k, past_v, *mask, causal[read])
        else:
            if cache is not None:
                if self in cache:
                    k, v = torch.cat((cache[self][0], k), 2), torch.cat((cache[self][1], v), 2)  # [B, H, S + L, D]
                cache[self] = k, v
            y = attend(q, k, v, mask, fused)
        return self.out(y.movedim(1, -2).flatten(-2))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attention = Attention(c)
        self.up = nn.Linear(c.n_embd, 4 * c.n_embd, bias=False)
        self.down = nn.Linear(4 * c.n_embd, c.n_embd, bias=False)

    def forward(self, x, table, mask, fused, cache, read=slice(None)):
        x = x[..., read, :] + self.attention(norm(x), table, mask, fused, cache, read)
        return x + self.down(self.up(norm(x)).relu().square())


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
            if name.endswith(("out.weight", "down.weight", "head.weight")):
                nn.init.zeros_(p)
            elif name == "embed.weight":
                nn.init.normal_(p, std=1.0)
            else:
                nn.init.normal_(p, std=self.config.n_embd ** -0.5)

    def forward(self, x, pos=None, mask=None, read=None, fused=True, cache=None, residual=None, blend=None):
        """Logits [B, L', V] at the positions that `read` selects (all if None).

        x: tokens, int [B, L], or embeddings, float [B, L, C].
        pos: int [L] or [B, L]; 0 to L − 1 if None. mask: bool [L, S + L], see `attention_mask`; causal if None.
        read: index of the L dimension, e.g. slice(2, None, 3); the head is the largest product of a small model.
        cache: a dict, empty at first, that keeps keys and values: the next call sees all S tokens so far, and must say
        by pos and mask where its own stand among them (ValueError).
        residual: the number k of a block; in place of logits, what enters block k, normed [B, L', C]. No later block
        is computed. (What leaves the last block at a gist is trained by nothing, for no later token reads it.)
        blend: float [L, L], how what enters each block is mixed over positions first.

        Branches: x int [B, N, M, r] or float [B, N, M, r, C] holds the next r tokens of M branches at each of N places
        of the past in the cache. pos: int [N, r]; mask: (near, sees), see `attend_branches`; the result is
        [B, N, M, r', ...]. Branches grow in the cache: pass dict(cache) to begin new ones.
        """
        if cache and (pos is None or mask is None):
            raise ValueError("with tokens in the cache, pos and mask must be given")
        x = self.embed(x) if not x.is_floating_point() else x
        pos = torch.arange(x.size(-2), device=x.device) if pos is None else pos
        table = rotary_table(pos, self.config.n_embd // self.config.n_head, x.dtype)
        *blocks, last = self.blocks[:residual]
        # in a branch only what is read goes through the last block; elsewhere its mask would have to be cut as well
        early = read if read is not None and x.dim() == 5 else slice(None)
        x = norm(x)
        for block in blocks:
            x = block(x if blend is None else blend @ x, table, mask, fused, cache)
        x = last(x if blend is None else blend @ x, table, mask, fused, cache, early)
        x = norm(x if read is None or x.dim() == 5 else x[:, read])
        return self.head(x) if residual is None else x


def adamw(model, learning_rate):
    """AdamW with decay on matrices alone: embeddings of rare tokens should not fade between their occurrences."""
    embeddings = [p for n, p in model.named_parameters() if n.endswith("embed.weight")]
    matrices = [p for n, p in model.named_parameters() if not n.endswith("embed.weight")]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": embeddings, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


# ----------------------------------------------------------------------------------------------
# writing text

def sample_tokens(logits, u):
    """One token for each row of logits [..., V], by inverting the cumulative distribution at u [...] in [0, 1).

    The randomness is an argument, so that a batch cut over ranks draws what the whole one draws.
    """
    cdf = logits.float().softmax(-1).cumsum(-1)
    token = torch.searchsorted(cdf, u.float().unsqueeze(-1) * cdf[..., -1:], right=True).squeeze(-1)
    return token.clamp(max=logits.size(-1) - 1)


@torch.no_grad()
def rollout(model, x, starts, steps, u=None):
    """Own text after many prefixes at once: own tokens, int [B, n, steps].

    x: true tokens, int [B, L]. starts: n rising positions s, 1 ≤ s ≤ L; the text that starts at s has read x[:, :s]
    alone. u: uniform numbers [B, n, steps] to sample with; None takes the likeliest token. The true tokens are read
    once; after that each step reads one new token for every start of every sequence. See the grid of
    `attention_mask`: the chunks are what the starts cut. Raises ValueError if a start lies outside 1 … L.
    """
    B, L = x.shape
    starts = torch.as_tensor(starts, device=x.device)
    if starts.min() < 1 or starts.max() > L:
        raise ValueError(f"starts must lie in 1 ... {L}, got {starts.tolist()}")
    n, pick = len(starts), (lambda logits, j: logits.argmax(-1) if u is None else sample_tokens(logits, u[:, :, j]))
    true_pos = torch.arange(L, device=x.device)
    true_chunk = torch.searchsorted(starts, true_pos, right=True)  # how many starts lie at or before the position
    own_chunk = torch.arange(1, n + 1, device=x.device)
    cache = {}
    logits = model(x, cache=cache, read=starts - 1)  # [B, n, V]
    own = [pick(logits, 0)]
    for j in range(steps - 1):
        kind = torch.cat((torch.full((L,), TRUE), torch.full(((j + 1) * n,), OWN))).to(x.device)
        chunk = torch.cat((true_chunk, own_chunk.repeat(j + 1)))
        pos = torch.cat((true_pos, (torch.arange(j + 1, device=x.device)[:, None] + starts).flatten()))
        mask = attention_mask(kind, chunk, pos)[-n:]
        own.append(pick(model(own[-1], pos=pos[-n:], mask=mask, cache=cache), j + 1))
    return torch.stack(own, dim=2)
