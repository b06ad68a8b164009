"""
Text in chunks, its gists, and what stands for a span of text: vectors that can be compared.

    x0 x1 x2 x3 G0 x4 x5 x6 x7 G1 ...    chunks with gist tokens behind them (stage 2)
    x0 x1 x2 x3 x4 ... y1 y2 y3 ...      own chunks beside the true ones, in one sequence (stage 3)

Who sees whom is drawn at `model.attention_mask`. Dimensions: B texts of T tokens, n chunks of k, R own texts
of each, N places at which own spans begin, M spans at each, V tokens, C = n_embd.
"""
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

from equations import log_softmax
from model import GIST, OWN, TRUE, attention_mask, rollout, sample_tokens

LARGEST_FORECAST = 4096  # tokens: the principal directions of forecasts are those of a matrix [V, V]


# ---- chunks with gist tokens behind them

class Layout(NamedTuple):
    """Text of T tokens in chunks, gist tokens behind each, L in all."""
    template: torch.Tensor  # int [L], the ids of the gist tokens, 0 where text goes
    pos: torch.Tensor       # int [L], positions; a gist has that of the text token before it
    text: torch.Tensor      # int [T], where the text stands
    gists: torch.Tensor     # int [n, n_gist], where each chunk's gists stand
    marks: torch.Tensor     # int [n_gist], the ids of the gist tokens
    mask: dict              # "gist" | "full" | "none": bool [L, L], what is seen of earlier chunks


def layout(T, chunk, n_gist, vocab, where):
    """The Layout of T text tokens, whole chunks, on the device `where`; gist tokens follow the vocabulary."""
    first = torch.arange(0, T, chunk, device=where)[:, None]
    offset = torch.arange(chunk + n_gist, device=where)
    pos = (first + offset.clamp(max=chunk - 1)).flatten()
    template = torch.where(offset < chunk, 0, vocab + offset - chunk).repeat(len(first))
    is_gist = (offset >= chunk).repeat(len(first))
    kind = torch.where(is_gist, GIST, TRUE)
    mask = {how: attention_mask(kind, pos // chunk, pos, how) for how in ("gist", "full", "none")}
    place = torch.arange(len(pos), device=where).view(len(first), -1)
    return Layout(template, pos, place[:, :chunk].flatten(), place[:, chunk:],
                  vocab + torch.arange(n_gist, device=where), mask)


def read(model, lay, x, how="gist", **options):
    """The model's forward over text x, int [B, T], laid out with its gists: logits [B, T, V] at the text."""
    tokens = lay.template.repeat(len(x), 1)
    tokens[:, lay.text] = x
    return model(tokens, lay.pos, lay.mask[how], **{"read": lay.text, **options})


@torch.no_grad()
def carried(models, lay, texts, chunk, batch, autocast):
    """{"later": nats a token of all chunks but the first, by mask; "gist_share": what the gists carry of full
    minus none, if there are both controls}.

    models: by mask. texts: int [n, T + 1], read `batch` at once under `autocast()`.
    """
    later = {}
    for how, model in models.items():
        total = 0.0
        for text in texts.split(batch):
            with autocast():
                logits = read(model, lay, text[:, :-1], how)[:, chunk:].flatten(0, 1)
            total += F.cross_entropy(logits, text[:, chunk + 1:].flatten(), reduction="sum").item()
        later[how] = total / texts[:, chunk + 1:].numel()
    if len(later) < 3:
        return dict(later=later)
    share = (later["none"] - later["gist"]) / ((later["none"] - later["full"]) or math.inf)
    return dict(later=later, gist_share=share)


# ---- own spans after true prefixes, and what stands for them

class Space(NamedTuple):
    """What stands for a span: the critic's "gist" behind it, its "forecast" after it, or "random" numbers."""
    kind: str
    whiten: torch.Tensor | None = None  # float [D, K]: principal directions, scaled
    table: torch.Tensor | None = None   # float [V, D], for "random"


def starts_of(T, chunk, span, where):
    """int [N]: the places after a true prefix from which a span stays in its chunk."""
    return torch.arange(T, device=where).view(-1, chunk)[:, :chunk - span + 1].flatten()[1:]


def spans_at(x, starts, span):
    """The spans of text x, int [B, T], at the starts: int [B, N, span]."""
    return x[:, starts[:, None] + torch.arange(span, device=x.device)]


def past_of(space, critic, lay, x):
    """A cache of the true text x, int [B, T], as the critic reads it: spans can follow any prefix of it."""
    cache = {}
    if space.kind != "random":
        until = len(critic.blocks) - 1 if space.kind == "gist" else None
        read(critic, lay, x, cache=cache, until=until, read=lay.text[:1])
    return cache


def sees_of(lay, starts):
    """bool [N, L]: what a token at each of the N starts sees of the past before it."""
    at = lay.text[starts]
    return lay.mask["gist"][at] & (torch.arange(len(lay.pos), device=at.device) < at[:, None])


def near_of(lay, sees):
    """int [N, S']: all of the past that each place `sees`, bool [N, L], and other tokens where that is less
    than the most there can be: the gists of all chunks but the last, and the text of its own but a token."""
    n, n_gist = lay.gists.shape
    most = (n - 1) * n_gist + len(lay.text) // n - 1
    return sees.byte().argsort(dim=1, descending=True, stable=True)[:, :most]


def vectors(space, critic, lay, past, starts, spans):
    """float [B, N, M, K]: what stands for M spans at each start. spans: tokens, int [B, N, M, s].

    A branch for each span reads it, and the gist tokens behind it, in the true past before its start. A gist
    is what enters the last block there: what leaves it is trained by nothing, for no later token reads it. A
    forecast is the critic's log probabilities after the span.
    """
    B, N, M, s = spans.shape
    sees = sees_of(lay, starts)
    ask = lambda tokens, **options: critic.branch(tokens, pos[:, :tokens.size(3)], sees, dict(past),
                                                  near_of(lay, sees), **options)
    pos = starts[:, None] + torch.arange(s + len(lay.marks), device=spans.device).clamp(max=s - 1)
    if space.kind == "random":
        g = space.table[spans].flatten(3)
    elif space.kind == "forecast":
        logits = ask(spans, read=slice(s - 1, None))
        g = log_softmax(logits).flatten(3)
        g = g - g.mean(-1, keepdim=True)
    else:
        tokens = torch.cat((spans, lay.marks.expand(B, N, M, -1)), 3)
        g = ask(tokens, read=slice(s, None), until=len(critic.blocks) - 1).flatten(3)
    with torch.autocast(g.device.type, enabled=False):  # distances need more digits than bfloat16 has
        g = g.to(critic.embed.weight.dtype)
        return g if space.whiten is None else g @ space.whiten


def write_spans(learner, lay, past, before, starts, u):
    """(sampled spans, int [B, N, M, span]; their log probabilities [B, N, M]). u: uniform [B, N, M, span].

    past: a cache of the true text. before: log probabilities [B, N, V] of the first token of each span.
    """
    sees, span = sees_of(lay, starts), u.size(3)
    near = near_of(lay, sees)
    grown = {block: (k.detach(), v.detach()) for block, (k, v) in past.items()}
    with torch.no_grad():
        said = before.unsqueeze(2).expand(-1, -1, u.size(2), -1)
        spans = [sample_tokens(said, u[..., 0])]
        for j in range(1, span):
            said = learner.branch(spans[-1].unsqueeze(3), starts[:, None] + j - 1, sees, grown, near)
            spans.append(sample_tokens(said.squeeze(3), u[..., j]))
    spans = torch.stack(spans, 3)
    pos = starts[:, None] + torch.arange(span - 1, device=u.device)
    later = log_softmax(learner.branch(spans[..., :-1], pos, sees, dict(past), near))
    later = later.gather(-1, spans[..., 1:, None]).squeeze(-1).sum(-1)
    return spans, before.gather(-1, spans[..., 0]) + later


# ---- distances

def squared_distances(g):
    """float [..., M, M] of the vectors g [..., M, K], as |a|² + |b|² − 2⟨a, b⟩."""
    with torch.autocast(g.device.type, enabled=False):
        inner = g @ g.transpose(-2, -1)
    squares = inner.diagonal(dim1=-2, dim2=-1)
    d2 = (squares.unsqueeze(-1) + squares.unsqueeze(-2) - 2 * inner).clamp_min(0)
    return d2 * ~torch.eye(g.size(-2), dtype=torch.bool, device=g.device)  # a square root has no slope at 0


def directions(symmetric):
    """(eigenvalues [D], ascending, eigenvectors [D, D]), found in float64 on the CPU: in float32 LAPACK makes
    NaN, or gives up, where vectors are alike but for rounding, as gists are at the first step."""
    return (found.to(symmetric) for found in torch.linalg.eigh(symmetric.cpu().double()))


def effective_rank(values):
    """exp of the entropy of eigenvalues [K] as shares: how many directions they fill; 1 where all are 0, or
    rounding of either sign."""
    values = values.clamp_min(0)
    share = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return torch.special.entr(share).sum().exp().item()


def whitening(g, average, level=True):
    """(matrix [D, K], effective rank): whitens how vectors g [B, N, M, D] of one prefix differ, and scales
    such that two of them are at squared distance 1 on average. Unless level, directions keep their sizes.

    average: of a list of tensors over ranks, in place.
    """
    off = (g - g.mean(2, keepdim=True)).flatten(0, 2)
    covariance = off.T @ off / len(off)
    average([covariance])
    values, axes = directions(covariance)
    kept = values > 1e-5 * values[-1]
    M = g.size(2)
    size = kept.sum() * values[kept] if level else values[kept].sum()
    return axes[:, kept] / (2 * M / (M - 1) * size).sqrt(), effective_rank(values)


def score_function(d, proper=True):
    """(loss [...], weights [..., M] of d log p(y_r)) of M sampled own spans; d: their distances [..., M + 1,
    M + 1], the truth last. The loss is E d(y, x), and if proper less E d(y, y′) / 2.

    The gradient of the loss is the mean of weight_r d log p(y_r): the weight of a sample is what it adds to
    the loss, less the same of the others without it, which is independent of it (no bias) and takes off most
    of the noise.
    """
    M = d.size(-1) - 1
    to_truth = d[..., -1, :-1]
    loss = to_truth.mean(-1)
    weight = to_truth - (to_truth.sum(-1, keepdim=True) - to_truth) / (M - 1)
    if proper:
        row = (d[..., :-1, :-1] * ~torch.eye(M, dtype=torch.bool, device=d.device)).sum(-1)
        loss = loss - 0.5 * row.mean(-1) / (M - 1)
        without = (row.sum(-1, keepdim=True) - 2 * row) / max(1, (M - 1) * (M - 2))
        weight = weight - (row / (M - 1) - without)
    return loss, weight


@torch.no_grad()
def make_spaces(critic, lay, x, starts, own, rng, average):
    """({kind: Space}, effective rank of the gists before whitening): what stands for a span, scaled by how
    own spans [B, N, M, s] at the starts in text x [B, T] differ in it.

    Of forecasts the principal directions keep their sizes, for most of a forecast is the same whatever the
    token; above LARGEST_FORECAST tokens there are none. Random numbers, of rng, are as many for a token as
    gists keep directions.
    """
    def scaled(space):
        g = vectors(space, critic, lay, past_of(space, critic, lay, x), starts, own)
        matrix, filled = whitening(g, average, level=space.kind != "forecast")
        return space._replace(whiten=matrix), filled

    gist, filled = scaled(Space("gist"))
    size = critic.config.vocab_size, max(1, round(gist.whiten.size(1) / own.size(3)))
    table = torch.from_numpy(rng.standard_normal(size, dtype=np.float32)).to(critic.embed.weight)
    spaces = dict(gist=gist, random=scaled(Space("random", table=table))[0])
    if critic.config.vocab_size <= LARGEST_FORECAST:
        spaces["forecast"], _ = scaled(Space("forecast"))
    return spaces, filled


@torch.no_grad()
def steadiness(space, critic, lay, x, starts, span, rng):
    """How steady gists are on text x [B, T], and how they fill their space.

    agreement_probe: share of spans whose gist, after a past with a tenth of its tokens wrong, is nearer to
    that of the same span after the true past than to that of another span. gist_std, gist_rank: standard
    deviation over texts, in mean over directions, and effective rank of the gists before whitening. A
    collapse shows in all three.
    """
    other = torch.from_numpy(rng.permuted(x.cpu().numpy(), axis=1)).to(x.device)
    noisy = torch.where(torch.from_numpy(rng.random(tuple(x.shape)) < 0.1).to(x.device), other, x)
    both = torch.stack((spans_at(x, starts, span), spans_at(other, starts, span)), 2)
    past = past_of(space, critic, lay, x)
    clean = vectors(space, critic, lay, past, starts, both)
    rough = vectors(space, critic, lay, past_of(space, critic, lay, noisy), starts, both[:, :, :1])
    raw = vectors(space._replace(whiten=None), critic, lay, past, starts, both[:, :, :1]).flatten(0, 2)
    d2 = (clean - rough).square().sum(-1)
    differ = (both[:, :, 0] != both[:, :, 1]).any(-1)
    off = raw - raw.mean(0)
    values, _ = directions(off.T @ off if off.size(1) < len(off) else off @ off.T)  # alike but for zeros
    return dict(agreement_probe=(d2[..., 0] < d2[..., 1])[differ].float().mean().item(),
                gist_std=raw.std(0).mean().item(), gist_rank=effective_rank(values))


# ---- own chunks beside the true ones

class Writer(nn.Module):
    """`rollout` as a module, so that functional_call can lend it parameters."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt

    def forward(self, *arguments):
        return rollout(self.gpt, *arguments)


def write_chunks(learner, theta, x, chunk, u):
    """What the learner writes alone, R times: y, int [B, R, n, k − 1], each chunk but its last token.

    x: int [B, T]; chunk m follows x_0 ... x_mk. u: uniform numbers [B, R, T]. theta: weights by name.
    """
    B, R, T = u.shape
    if chunk == 1:
        return x.new_zeros(B, R, T, 0)
    starts = torch.arange(1, T + 1, chunk, device=x.device).repeat(R)
    weights = {f"gpt.{n}": p for n, p in theta.items()}
    u = u.reshape(B, -1, chunk)[..., :-1]
    y = functional_call(Writer(learner), weights, (x, starts, chunk - 1, u))
    return y.view(B, R, -1, chunk - 1)


class Said(NamedTuple):
    """The learner at every place of own and of true chunks; a gist is its last hidden state there."""
    logp: torch.Tensor        # float [B, R, n, k, V], log probabilities after own prefixes
    logp_true: torch.Tensor   # float [B, n, k, V], after true ones
    gists: torch.Tensor       # float [B, R, n, k, C]
    gists_true: torch.Tensor  # float [B, n, k, C]


def say_chunks(learner, theta, x, y, **options):
    """The Said of own chunks y, see `write_chunks`, beside the true text x, int [B, T].

    One pass over the true tokens and behind them the own ones. The first place of a chunk follows the true
    prefix in both. theta: the learner's weights by name. options: of the forward pass.
    """
    (_, R, n, short), T = y.shape, x.size(1)
    packed, chunk = torch.cat((x, y.flatten(1)), 1), short + 1
    place = torch.arange(T, device=x.device)
    own = place.view(n, chunk)[:, 1:].flatten()
    pos = torch.cat((place, own.repeat(R)))
    rollouts = 1 + torch.arange(R, device=x.device)
    writer = torch.cat((torch.zeros_like(place), rollouts.repeat_interleave(len(own))))  # 0 is the world
    kind = torch.where(writer == 0, TRUE, OWN)
    mask = None
    if chunk > 1:  # what is written anew sees the truth and itself, no other writing
        mask = attention_mask(kind, (pos + short) // chunk, pos)
        mask &= (writer == 0) | (writer == writer[:, None])
    until = learner.config.n_layer
    h = functional_call(learner, theta, (packed,), dict(options, pos=pos, mask=mask, until=until))
    true, own = h[:, :T].unflatten(1, (n, chunk)), h[:, T:].unflatten(1, (R, n, short))
    speak = lambda states: log_softmax(states @ theta["head.weight"].T)
    join = lambda true, own: torch.cat((true[:, None, :, :1].expand(-1, R, -1, -1, -1), own), 3)
    logp_true = speak(true)
    return Said(join(logp_true, speak(own)), logp_true, join(true, own), true)
