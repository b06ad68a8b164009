"""
Stage 2: can a language model learn from the distance between the gist of its own text and the gist of the truth?

    python gist_bottleneck.py                                       # two cores, about 4 minutes
    python gist_bottleneck.py --chunk=8 --n_gist=2 --place=spread   # any setting below
    python gist_bottleneck.py --resume=out/gist_bottleneck --arms= --prompt=my.txt   # a text continued from its gists
    torchrun --standalone --nproc_per_node=2 gist_bottleneck.py     # the same numbers on two ranks

Meta phase: cross entropy, on text cut into chunks, each with gist tokens G. Later chunks see an earlier one through
its gists alone, so what they need of it must pass through; `full` and `none` are the controls of the same compute:

                    gist                        full                    none
                x0 x1 G0 x2 x3 G1        x0 x1 G0 x2 x3 G1       x0 x1 G0 x2 x3 G1
        x0       1  .  .  .  .  .         1  .  .  .  .  .        1  .  .  .  .  .
        x1       1  1  .  .  .  .         1  1  .  .  .  .        1  1  .  .  .  .
        G0       1  1  1  .  .  .         1  1  1  .  .  .        1  1  1  .  .  .
        x2       .  .  1  1  .  .         1  1  1  1  .  .        .  .  .  1  .  .
        x3       .  .  1  1  1  .         1  1  1  1  1  .        .  .  .  1  1  .
        G1       .  .  1  1  1  1         1  1  1  1  1  1        .  .  .  1  1  1

    gist share = (none - gist) / (none - full), cross entropies of the chunks that have earlier ones

Self phase: after every true prefix the learner p writes own spans y (the likeliest M tokens v, or M samples); the
critic reads each, and the true span x, in that prefix, and gives their gists g. With d the distance of two gists:

    logscore    -sum_w K(x, w) log sum_v p_v K(v, w),  K(v, w) = softmax_w(-d^2(v, w) / tau)        proper
    praise      -sum_v a(v) log p_v,  a(v) = K(x, v) - sum_w p_w K(w, v), held fixed   a is zero at the truth, on average
    energy      E d(y, x) - E d(y, y') / 2                                                         proper
    plain       E d(y, x)                                       lowest on the most typical text: improper

No gradient reaches the gist of the truth. "None of these M" is an outcome of its own in the first path (`exact`). In
the arm `forecast` what the critic expects after a span stands for its gist: alike is what has the same future.
"""
import copy
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, grad, grad_and_value, jvp

from configurator import chosen_arms, configure, read_bottleneck, read_meta_phase, refuse
from model import GIST, GPT, TRUE, GPTConfig, adamw, bottleneck_mask, sample_tokens
from plot import draw_runs
from prepare_data import corpus_id, decode, get_batch, open_corpus, prepare, val_windows
from watch import MEMORY, Gold, Watch, new_track, note, summarise, track_gold, write_report, write_row

# --- experiment
arms = "real,frozen,shuffled,static,random"  # any of these, and self, ema, sharpen, forecast
controls = "full,none"  # masks that the meta phase trains beside gist: any of full, none, pool, with commas
meta_steps = 500        # steps of cross entropy, for each mask
self_steps = 250        # steps of each arm, on the distance of gists
hack_margin = 0.1       # nats above the best gold, three evaluations running, that count as hacked
# --- gists
chunk = 4               # text tokens in a chunk
n_gist = 1              # gist tokens of each
place = "end"           # "end" | "spread": all at the chunk's end, or gist j after span j of it
reconstruct = 0.0       # weight of a loss for writing the chunk again from its gists alone
rank = 0                # principal directions of the gists that are kept; 0 is all
# --- signal
span = 1                # own tokens after each true prefix; with span = chunk every chunk is written anew
every = 2               # own spans begin after every so many prefixes, others at each step
candidates = 8          # own spans at each prefix: the likeliest tokens, or samples
path = "exact"          # "exact" | "reinforce": the expectation over the likeliest tokens, or samples and their score
distance = "logscore"   # "logscore" | "praise" | "energy" | "plain": the loss over distances, see above
tau = 0.1               # what counts as alike, where two own spans at one prefix are at d^2 = 1 on average
critic_from = ""        # the folder of another run, of any size, whose model is the critic; "": a copy of the learner
ema_decay = 0.999       # arm ema: the critic's weights are this share old, the rest the learner's, each step
order = 1               # 1: the bottleneck alone makes the gists; 2: then also how much a step on their distance helps
order_steps = 100       # order 2: steps of the critic, after the bottleneck's
inner_length = 0.05     # order 2: length of the learner's inner step, in the norm of all weights
critic_rate = 3e-4      # order 2: Adam's learning rate of the critic
# --- model
n_layer = 3             # blocks; the gist is what enters the last one
n_head = 4              # heads in each
n_embd = 96             # width
block_size = 128        # text tokens in a sequence
# --- data
dataset = "plays"       # plays, tinyshakespeare, fineweb-edu, or a text file or folder of your own
vocab = 256             # tokens: 256 is plain bytes, 50257 is GPT-2's, any other a BPE trained on the corpus
train_tokens = 0        # use only the first so many training tokens, repeated; 0 is all
# --- optimisation
batch_size = 8          # sequences a step, over all ranks
learning_rate = 6e-3    # AdamW, in the meta phase, the last 30 % of which it falls to that of the self phase
self_learning_rate = 2e-4  # in the self phase: a learner at its peak rate would gain from any signal that slows it
warmup = 50             # steps from 0 to learning_rate, at the start of the meta phase
grad_clip = 1.0         # largest gradient norm
# --- run
seed = 1                # of weights and data
eval_interval = 25      # steps between two lines of the log
eval_windows = 64       # held-out sequences that gold is measured on
save_interval = 200     # steps between two checkpoints
device = "auto"         # "auto" | "cuda" | "mps" | "cpu": auto takes the first that is there
dtype = "float32"       # "float32" | "bfloat16" | "float64": bfloat16 is autocast over float32 weights
compile = False         # torch.compile of the learners; about a minute before the first step, then faster
out_dir = "out/gist_bottleneck"  # the run's folder; an earlier run there is moved aside
resume = ""             # the folder of a run to go on with
start = ""              # the folder of a run whose finished meta phase to start from, instead of one's own
prompt = ""             # a text file: at the end, continue it from its full text and from its gists alone
wandb_log = "no"        # "no" | "online" | "offline": also log to Weights & Biases

ARMS = ("self", "frozen", "ema", "real", "shuffled", "sharpen", "forecast", "static", "random")
CONTROLS = ("full", "none", "pool")
# Settings that the meta phase does not read: with `start`, the others must be those of the run started from.
SELF_PHASE = ("arms", "self_steps", "hack_margin", "rank", "span", "every", "candidates", "path", "distance", "tau",
              "critic_from", "ema_decay", "order", "order_steps", "inner_length", "critic_rate", "eval_interval",
              "eval_windows", "save_interval", "device", "compile", "out_dir", "resume", "start", "prompt", "wandb_log")
# Independent streams of data and of random numbers.
TEXT, FOREIGN, CHANCE, RULER, PROBE, TABLE, INNER, OUTER = range(8)
RULER_STEPS = 100  # on which the watch is calibrated, the fewest that it takes
LARGEST_FORECAST = 4096  # tokens: the principal directions of forecasts are those of a matrix [V, V]
RESTART = 20       # order 2: inner steps after which the learner goes back to the snapshot: a critic that only ever sees
                   # one learner memorises one good direction


# ----------------------------------------------------------------------------------------------
# chunks and gists

class Layout(NamedTuple):
    """Text of T tokens with the gist tokens in their places, L in all."""
    template: torch.Tensor  # int [L], the ids of the gist tokens, 0 where text goes
    chunk: torch.Tensor     # int [L], which chunk
    pos: torch.Tensor       # int [L], positions; a gist has that of the text token before it
    text: torch.Tensor      # int [T], where the text stands
    gists: torch.Tensor     # int [T / chunk, n_gist], where each chunk's gists stand
    mask: dict              # how: bool [L, L], see `bottleneck_mask`
    blend: torch.Tensor     # float [L, L], for "pool": what stands at a gist becomes the mean of its chunk's text


def layout(length, where, dtype=torch.float32):
    """The Layout of `length` text tokens, whole chunks, on the device `where`."""
    ends = [chunk if place == "end" else (j + 1) * chunk // n_gist for j in range(n_gist)]
    kind, ids, pos = [], [], []
    for t in range(length):
        behind = [vocab + j for j, end in enumerate(ends) if t % chunk + 1 == end]
        kind += [TRUE] + [GIST] * len(behind)
        ids += [0, *behind]
        pos += [t] * (1 + len(behind))
    kind, ids, pos = (torch.tensor(values, device=where) for values in (kind, ids, pos))
    which, is_gist = pos // chunk, kind == GIST
    blend = torch.eye(len(pos), device=where, dtype=dtype)
    blend[is_gist] = ((which[:, None] == which) & ~is_gist)[is_gist].to(dtype) / chunk
    return Layout(ids, which, pos, (~is_gist).nonzero()[:, 0], is_gist.nonzero()[:, 0].view(-1, n_gist),
                  {how: bottleneck_mask(which, kind, how) for how in ("gist", *CONTROLS)}, blend)


def read(model, lay, x, how="gist", **options):
    """The model's forward over text x, int [B, T], laid out with its gists: logits [B, T, V] at the text."""
    tokens = lay.template.repeat(len(x), 1)
    tokens[:, lay.text] = x
    options.setdefault("read", lay.text)
    return model(tokens, lay.pos, lay.mask[how], blend=lay.blend if how == "pool" else None, **options)


def rewriting_loss(model, lay, x, cache):
    """Cross entropy of each chunk of x written again by one that sees its gists alone, through the cache; nats a token.

    A branch for each chunk reads [WRITE, x_0 ... x_c-2] at the chunk's positions and predicts x_0 ... x_c-1.
    """
    B, T = x.shape
    chunks = x.view(B, T // chunk, chunk)
    start = torch.full_like(chunks[..., :1], vocab + n_gist)  # WRITE, the last special token
    tokens = torch.cat((start, chunks[..., :-1]), 2).unsqueeze(2)
    pos = torch.arange(T, device=x.device).view(-1, chunk)
    logits = model(tokens, pos, (lay.gists, torch.ones_like(lay.gists, dtype=torch.bool)), cache=dict(cache))
    return F.cross_entropy(logits.flatten(0, 3), x.flatten())


def bottleneck_loss(model, lay, w, how):
    """(cross entropy of text w [B, T + 1] under a mask, plus `reconstruct` times the rewriting; the former alone)."""
    cache = {} if reconstruct else None
    logits = read(model, lay, w[:, :-1], how, cache=cache)
    loss = F.cross_entropy(logits.flatten(0, 1), w[:, 1:].flatten())
    if not reconstruct:
        return loss, loss.detach()
    return loss + reconstruct * rewriting_loss(model, lay, w[:, :-1], cache), loss.detach()


@torch.no_grad()
def later_chunks(run, model, lay, windows, how):
    """Cross entropy of all chunks but the first, by the reading token's place in its chunk: float [chunk], nats."""
    total = torch.zeros(chunk, device=run.device)
    for w in windows.split(batch_size):
        with run.autocast():
            logits = read(model, lay, w[:, :-1], how)
        nats = F.cross_entropy(logits.flatten(0, 1).float(), w[:, 1:].flatten(), reduction="none").view(len(w), -1, chunk)
        total += nats[:, 1:].sum((0, 1))
    return total / (len(windows) * (block_size // chunk - 1))


def gist_share(nats):
    """(share of full minus none that the gists carry, the same by place). nats: how -> float [chunk]."""
    share = lambda a: ((a["none"] - a["gist"]) / (a["none"] - a["full"])).tolist()
    return share({k: v.mean() for k, v in nats.items()}), share(nats)


# ----------------------------------------------------------------------------------------------
# the critic: from a span of text to its gist

class Critic(NamedTuple):
    """Gists of spans: of `model`, reading them in their true past, or of a `table` that knows tokens alone."""
    model: nn.Module | None
    table: torch.Tensor | None  # float [V, D]
    whiten: torch.Tensor | None  # float [D, K]: principal directions, scaled
    forecast: bool = False      # the gist of a span is what the model expects after it, log probabilities


def past_of(critic, lay, x):
    """What the critic keeps of the true text x, int [B, T], for spans to be read after any prefix of it."""
    cache = {}
    if critic.model:
        last = None if critic.forecast else len(critic.model.blocks) - 1
        read(critic.model, lay, x, cache=cache, residual=last, read=lay.text[:1])
    return cache


def near_past(lay, starts):
    """(near, sees), int and bool [N, S]: what a token at each of the N starts would see before itself."""
    at = lay.text[starts]
    seen = lay.mask["gist"][at] & (torch.arange(len(lay.pos), device=at.device) < at[:, None])
    near = seen.byte().argsort(dim=1, descending=True, stable=True)[:, :seen.sum(1).max()]
    return near, seen.gather(1, near)


def gists(critic, lay, past, starts, spans):
    """float [B, N, M, K]: the gists of M spans at each of N starts.

    spans: tokens, int [B, N, M, s]. A branch for each span reads it and the gist tokens behind it, in the true past
    before its start; only the gist tokens are read out. A forecast is read at the span's last token.
    """
    B, N, M, s = spans.shape
    if critic.table is not None:
        g = critic.table[spans].flatten(3)
    elif critic.forecast:
        g = critic.model(spans, starts[:, None] + torch.arange(s, device=spans.device), near_past(lay, starts),
                         read=slice(s - 1, None), cache=dict(past)).log_softmax(-1).flatten(3)
        g = g - g.mean(-1, keepdim=True)
    else:
        ids = torch.arange(vocab, vocab + n_gist, device=spans.device).expand(B, N, M, n_gist)
        offset = torch.cat((torch.arange(s), torch.full((n_gist,), s - 1))).to(spans.device)
        g = critic.model(torch.cat((spans, ids), 3), starts[:, None] + offset, near_past(lay, starts),
                         read=slice(s, None), cache=dict(past), residual=len(critic.model.blocks) - 1).flatten(3)
    with torch.autocast(g.device.type, enabled=False):  # distances need more digits than bfloat16 has
        g = g.to(lay.blend.dtype)
        return g if critic.whiten is None else g @ critic.whiten


def squared_distances(g):
    """float [..., M, M] of the gists g [..., M, K], as |a|^2 + |b|^2 - 2 <a, b>."""
    with torch.autocast(g.device.type, enabled=False):
        inner = g @ g.transpose(-2, -1)
    squares = inner.diagonal(dim1=-2, dim2=-1)
    d2 = (squares.unsqueeze(-1) + squares.unsqueeze(-2) - 2 * inner).clamp_min(0)
    return d2 * ~torch.eye(g.size(-2), dtype=torch.bool, device=g.device)  # a square root has no slope at 0


def directions(symmetric):
    """(eigenvalues [D], ascending, eigenvectors [D, D]) of a matrix, in float64 on the CPU: in float32 LAPACK makes NaN, or
    gives up, where gists are alike but for rounding, as they are at the first step."""
    return (found.to(symmetric) for found in torch.linalg.eigh(symmetric.cpu().double()))


def effective_rank(values):
    """exp of the entropy of eigenvalues [K] as shares: how many directions they fill; 1 where all are 0, or rounding of
    either sign."""
    values = values.clamp_min(0)
    share = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return torch.special.entr(share).sum().exp().item()


def whitening(run, g, keep, level=True):
    """(matrix [D, K], effective rank): whitens how gists g [B, N, M, D] of one prefix differ, on the `keep` largest
    directions (0: all), and scales such that two of them are at squared distance 1 on average. Directions keep their
    relative sizes unless level."""
    off = (g - g.mean(2, keepdim=True)).flatten(0, 2)
    covariance = off.T @ off / len(off)
    run.average([covariance])
    values, vectors = directions(covariance)
    kept = values > 1e-5 * values[-1]
    kept &= torch.arange(len(values), device=g.device) >= len(values) - (keep or len(values))
    M = g.size(2)
    size = kept.sum() * values[kept] if level else values[kept].sum()
    return vectors[:, kept] / (2 * M / (M - 1) * size).sqrt(), effective_rank(values)


# ----------------------------------------------------------------------------------------------
# the signal

def starts_of(where, step=None):
    """int [N]: where own spans begin: after every true prefix from which one stays in its chunk; at a step, `every`-th."""
    t = torch.arange(1, block_size, device=where)
    t = t[t % chunk + span <= chunk]
    return t if step is None else t[step % every::every]


def observed(x, starts):
    """The true spans at the starts, int [B, N, span], of text x [B, T]."""
    return x[:, starts[:, None] + torch.arange(span, device=x.device)]


def kernel(d2):
    """K [..., M, M] = softmax over w of -d^2(v, w) / tau."""
    return (-d2 / tau).softmax(-1)


def target_mass(d2):
    """What the critic takes the truth for: float [..., M + 1] over M own spans and none of them.

    d2: [..., M + 1, M + 1], the truth last. The row of the kernel of the own span whose gist is the truth's, or none.
    """
    nearest, which = d2[..., -1, :-1].min(-1)
    row = kernel(d2[..., :-1, :-1]).gather(-2, which[..., None, None].expand(*which.shape, 1, d2.size(-1) - 1))[..., 0, :]
    met = (nearest < max(0.01 * tau, 1e-5)).unsqueeze(-1)  # the kernel cannot tell them apart, or float32 cannot
    return torch.cat((row * met, (~met).to(row.dtype)), -1)


def exact_loss(logp, d2, target):
    """The distance in expectation over own spans v and "none", with log probabilities [..., M + 1].

    d2, target: see `target_mass`. "None" is as far from every span, and from itself, as two own spans are on average.
    """
    p = logp.exp()
    if distance == "logscore":
        said = (p[..., :-1, None] * kernel(d2[..., :-1, :-1])).sum(-2)
        said = torch.cat((said.clamp_min(1e-12).log(), logp[..., -1:]), -1)
        return -(target * said).sum(-1)
    if distance == "praise":
        p = p.detach()
        expected = torch.cat(((p[..., :-1, None] * kernel(d2[..., :-1, :-1])).sum(-2), p[..., -1:]), -1)
        return -((target - expected) * logp).sum(-1)
    d = (d2 + 1e-12).sqrt()
    to_truth = (p[..., :-1] * d[..., -1, :-1]).sum(-1) + p[..., -1]
    if distance == "plain":
        return to_truth
    apart = F.pad(d[..., :-1, :-1], (0, 1, 0, 1), value=1.0)  # [..., M + 1, M + 1] over own spans and "none"
    return to_truth - 0.5 * (p.unsqueeze(-2) @ apart @ p.unsqueeze(-1)).squeeze(-1).squeeze(-1)


def sampled_loss(d2):
    """(loss [...], weights [..., M] of the score function) of M sampled own spans; d2: [..., M + 1, M + 1].

    The gradient of the loss is the mean of weight_r d log p(y_r): the weight of a sample is what it adds to the loss,
    less the same of the others without it, which is independent of it (no bias) and takes off most of the noise.
    """
    M = d2.size(-1) - 1
    if distance == "logscore":
        loss = math.log(M) - (-d2[..., -1, :-1] / tau).logsumexp(-1)
        return loss, 1 - M * (-d2[..., -1, :-1] / tau).softmax(-1)
    d = (d2 + 1e-12).sqrt()
    to_truth = d[..., -1, :-1]
    loss, weight = to_truth.mean(-1), to_truth - leave_out(to_truth)
    if distance == "energy":
        apart = d[..., :-1, :-1] * ~torch.eye(M, dtype=torch.bool, device=d.device)
        row = apart.sum(-1)
        loss = loss - 0.5 * row.mean(-1) / (M - 1)
        without = (row.sum(-1, keepdim=True) - 2 * row) / max(1, (M - 1) * (M - 2))
        weight = weight - (row / (M - 1) - without)
    return loss, weight


def leave_out(values):
    """The mean of the others at each place of [..., M]."""
    return (values.sum(-1, keepdim=True) - values) / (values.size(-1) - 1)


def with_none(top):
    """Log probabilities [..., M] of own tokens and, last, that of none of them."""
    return torch.cat((top, torch.log1p(-top.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))), -1)


def likeliest(logits):
    """(own tokens [B, N, M, 1], log probabilities [B, N, M + 1], "none" last) of logits [B, N, V]."""
    top, which = logits.log_softmax(-1).topk(candidates)
    return which.unsqueeze(-1), with_none(top)


def write_spans(learner, lay, past, logits, starts, u):
    """(own spans, int [B, N, M, span], sampled; their log probabilities [B, N, M]). u: uniform [B, N, M, span]."""
    near, grown = near_past(lay, starts), {k: (v[0].detach(), v[1].detach()) for k, v in past.items()}
    with torch.no_grad():
        said = logits.unsqueeze(2).expand(-1, -1, u.size(2), -1)
        spans = [sample_tokens(said, u[..., 0])]
        for j in range(1, span):
            said = learner(spans[-1].unsqueeze(3), starts[:, None] + j - 1, near, cache=grown).squeeze(3)
            spans.append(sample_tokens(said, u[..., j]))
    spans = torch.stack(spans, 3)
    logp = logits.log_softmax(-1).gather(-1, spans[..., 0])
    if span > 1:
        said = learner(spans[..., :-1], starts[:, None] + torch.arange(span - 1, device=u.device), near, cache=dict(past))
        logp = logp + said.log_softmax(-1).gather(-1, spans[..., 1:, None]).squeeze(-1).sum(-1)
    return spans, logp


def self_loss(arm, step, learner, critic, lay, w, foreign, u, tally=None):
    """Distance of own and true gists, in mean over prefixes: what an arm trains on. No real token is a target.

    w: text [B, T + 1]. foreign: another text, whose tokens the critic reads as the observation in the arm shuffled. In
    the arm sharpen it reads what the learner itself is likeliest to say. u: uniform numbers [B, T, M, span].
    """
    x, past = w[:, :-1], {}
    logits = read(learner, lay, x, cache=past)
    starts = starts_of(x.device, step)
    said, u = logits[:, starts - 1], u[:, starts]
    seen = observed(foreign if arm == "shuffled" else x, starts)
    with torch.no_grad():
        world = past_of(critic, lay, x)
    if path == "exact":
        own, logp = likeliest(said)
    else:
        own, logp = write_spans(learner, lay, past, said, starts, u)
    seen = said.argmax(-1)[..., None] if arm == "sharpen" else seen
    with torch.no_grad():
        g = gists(critic, lay, world, starts, torch.cat((own, seen.unsqueeze(2)), 2))
    d2 = squared_distances(g)
    target = target_mass(d2)
    if path == "exact":
        loss = exact_loss(logp, d2, target).mean()
    else:
        value, weight = sampled_loss(d2)
        loss = (weight * logp).mean()
        loss = loss + (value.mean() - loss).detach()
    if tally is not None:
        note_step(tally, loss, logits, x, own, target, observed(x, starts), said)
    return loss


def second_order(learner, theta, critic, lay, w, outer_w, average):
    """How the critic should have moved the learner's step: (dphi by name, theta' by name, gain in nats).

    One inner step on the distance L(theta, phi) of text w, judged by the cross entropy O of other text outer_w:

        u = g / |g|,  g = grad_theta L        theta' = theta - a u        lam = grad O(theta')
        w = -(a / |g|) (lam - u <u, lam>)     dphi = d_phi <grad_theta L, w> = d_phi <dL / dlogp, d/de logp(theta + e w)>

    L knows theta through the log probabilities of own tokens alone, so that one forward-mode derivative of those and the
    slope of L in them, which is a function of phi, are enough. g and lam are averaged over ranks; dphi is linear in what
    remains and is averaged by the caller.
    """
    x, starts = w[:, :-1], starts_of(w.device)  # all: a meta step is rare, and its signal small
    phi = {n: p for n, p in critic.model.named_parameters() if p.requires_grad}
    call = lambda th: lambda tokens, *rest, **options: functional_call(learner, th, (tokens, *rest), options)
    with torch.no_grad():
        own, _ = likeliest(read(call(theta), lay, x)[:, starts - 1])
    d2 = squared_distances(gists(critic, lay, past_of(critic, lay, x), starts,
                                 torch.cat((own, observed(x, starts).unsqueeze(2)), 2)))
    target = target_mass(d2)

    def own_logp(th, fused=True):
        return with_none(read(call(th), lay, x, fused=fused)[:, starts - 1].log_softmax(-1).gather(-1, own[..., 0]))

    def outer(th):
        return F.cross_entropy(read(call(th), lay, outer_w[:, :-1]).flatten(0, 1), outer_w[:, 1:].flatten())

    g = grad(lambda th: exact_loss(own_logp(th), d2.detach(), target.detach()).mean())(theta)
    average(list(g.values()))
    norm = torch.sqrt(sum(t.square().sum() for t in g.values())).clamp_min(1e-30)
    moved = {n: theta[n] - inner_length / norm * g[n] for n in g}
    lam, after = grad_and_value(outer)(moved)
    average(list(lam.values()))
    along = sum((g[n] * lam[n]).sum() for n in g) / norm ** 2
    back = {n: -inner_length / norm * (lam[n] - along * g[n]) for n in g}
    logp, rate = jvp(lambda th: own_logp(th, fused=False), (theta,), (back,))
    logp = logp.detach().requires_grad_()
    slope = torch.autograd.grad(exact_loss(logp, d2, target).mean(), logp, create_graph=True)[0]
    dphi = torch.autograd.grad((slope * rate.detach()).sum(), list(phi.values()), allow_unused=True)
    with torch.no_grad():
        gain = outer(theta) - after
    return {n: t for n, t in zip(phi, dphi) if t is not None}, moved, gain


# ----------------------------------------------------------------------------------------------
# data

def text(run, corpus, step, stream=TEXT):
    """This rank's rows of a step's text, int [B / ranks, T + 1]."""
    tokens = corpus.train[:train_tokens] if train_tokens else corpus.train
    return get_batch(tokens, seed, step, batch_size, block_size + 1, run.rank, run.ranks, stream).to(run.device)


def chance(run, step):
    """This rank's uniform numbers to sample own spans with, [B / ranks, T, candidates, span], a function of the step."""
    share, shape = batch_size // run.ranks, (batch_size, block_size, candidates, span)
    if path == "exact":
        return torch.zeros(share, block_size, 1, 1, device=run.device)  # nothing is drawn
    numbers = np.random.default_rng([seed, CHANCE, step]).random(shape, dtype=np.float32)
    return torch.from_numpy(numbers[run.rank * share:(run.rank + 1) * share]).to(run.device)


def stored_probe(run, corpus):
    """(x, noisy, other), int [4, T] each: held-out text, the same with a tenth of its tokens wrong, and wrong tokens."""
    x = val_windows(corpus.val, 4, block_size)
    rng = np.random.default_rng([seed, PROBE])
    other = torch.from_numpy(rng.permuted(x.numpy(), axis=1))
    noisy = torch.where(torch.from_numpy(rng.random(tuple(x.shape)) < 0.1), other, x)
    return tuple(t.to(run.device) for t in (x, noisy, other))


@torch.no_grad()
def examine(run, critic, lay, probe):
    """How the critic stands on the stored probe: {agreement_probe, gist_std, gist_rank}.

    agreement_probe: share of spans whose gist, read after a past with wrong tokens in it, is nearer to that of the same
    span after the true past than to that of another span. gist_std, gist_rank: standard deviation over texts, in mean
    over directions, and effective rank of the gists before whitening. A collapse shows in all three.
    """
    x, noisy, other = probe
    starts = starts_of(run.device)
    with run.autocast():
        both = torch.stack((observed(x, starts), observed(other, starts)), 2)
        past = past_of(critic, lay, x)
        clean = gists(critic, lay, past, starts, both)
        rough = gists(critic, lay, past_of(critic, lay, noisy), starts, both[:, :, :1])
        raw = gists(critic._replace(whiten=None), lay, past, starts, both[:, :, :1]).flatten(0, 2)
    d2 = (clean - rough).square().sum(-1)
    differ = (both[:, :, 0] != both[:, :, 1]).any(-1)
    off = raw - raw.mean(0)
    values, _ = directions(off.T @ off if off.size(1) < len(off) else off @ off.T)  # their eigenvalues: alike but for zeros
    return dict(agreement_probe=(d2[..., 0] < d2[..., 1])[differ].float().mean().item(),
                gist_std=raw.std(0).mean().item(), gist_rank=effective_rank(values))


# ----------------------------------------------------------------------------------------------
# steps

@torch.no_grad()
def note_step(tally, loss, logits, x, own=None, target=None, truth=None, said=None):
    """Adds a step to the tally: see `note`.

    agreement: how much of the critic's target falls on the observation, where that is among the own spans; echo: how
    much on the likeliest own one; outside: how much on none of them. Without own, where targets are real, agreement is 1.
    """
    agreement, means = torch.ones_like(loss), {}
    if own is not None:
        among = (own == truth.unsqueeze(2)).all(-1)
        first = (own == said.argmax(-1)[..., None, None]).all(-1) if span == 1 else torch.zeros_like(among)
        agreement = (target[..., :-1] * among).sum() / among.any(-1).sum().clamp_min(1)
        means = dict(echo=(target[..., :-1] * first).sum(-1).mean(), outside=target[..., -1].mean(),
                     target_entropy=torch.special.entr(target).sum(-1).mean())
    note(tally, loss, logits.log_softmax(-1), x[:, 1:], agreement, **means)


def set_rate(optimizer, step):
    """The rate of a step of the meta phase: warm-up, plateau, and a last 30 % that falls to the self phase's."""
    left = min(1.0, (meta_steps - step) / (0.3 * meta_steps))
    rate = self_learning_rate + (learning_rate - self_learning_rate) * left
    for group in optimizer.param_groups:
        group["lr"] = rate * min(1.0, (step + 1) / max(1, warmup))


def take_step(run, model, optimizer, loss, tally=None):
    """Backward, average over ranks, clip, step."""
    loss.backward()
    params = [p for p in model.parameters() if p.grad is not None]
    run.average([p.grad for p in params])
    norm = torch.nn.utils.clip_grad_norm_(params, grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if tally is not None:
        tally["grad_norm"] = tally.get("grad_norm", 0) + norm


@torch.no_grad()
def follow(judge, learner, decay):
    """The critic is the learner's moving average, critic <- decay * critic + (1 - decay) * learner; at 0 the learner."""
    torch._foreach_lerp_(list(judge.parameters()), list(learner.parameters()), 1 - decay)


def train_critic(run, corpus, snapshot, learner, critic, lay):
    """`order_steps` of second order: the critic's weights then, and the gain of the inner step, mean of the last tenth."""
    theta, gains, optimizer = None, [], torch.optim.Adam(critic.model.parameters(), critic_rate)
    critic.model.requires_grad_(True)
    for step in range(order_steps):
        if step % RESTART == 0:
            theta = {n: snapshot["learner"][n] for n, _ in learner.named_parameters()}
        dphi, theta, gain = second_order(learner, theta, critic, lay, text(run, corpus, step, INNER),
                                         text(run, corpus, step, OUTER), run.average)
        run.average(list(dphi.values()))
        for n, p in critic.model.named_parameters():
            p.grad = dphi.get(n)
        torch.nn.utils.clip_grad_norm_([p for p in critic.model.parameters() if p.grad is not None], grad_clip)
        optimizer.step()
        gains.append(gain)
        if step % eval_interval == 0:
            run.say(f"second order {step}/{order_steps}: an inner step gains {run.mean(gain):.4f} nats on other text")
    critic.model.requires_grad_(False)
    return copy.deepcopy(critic.model.state_dict()), run.mean(torch.stack(gains[-max(1, order_steps // 10):]).mean())


@torch.no_grad()
def make_critics(run, corpus, lay, learner, judge, names):
    """(the Critics of the arms `names` by kind, the effective rank of the contextual gists before whitening).

    contextual: gists, always made. forecast: what the critic expects next; of these the principal directions keep their
    sizes, for most of a forecast is the same whatever the token. static: the critic's token embeddings. random: as many
    random numbers for each token as the gists keep directions. What the learner's own spans at fresh prefixes differ in
    sets the scale of each.
    """
    x = text(run, corpus, 0, RULER)[:, :-1]
    past, starts, u = {}, starts_of(run.device), chance(run, 0)
    logits = read(learner, lay, x, cache=past)[:, starts - 1]
    own = likeliest(logits)[0] if path == "exact" else write_spans(learner, lay, past, logits, starts, u[:, starts])[0]

    def whitened(critic, keep=rank):
        g = gists(critic, lay, past_of(critic, lay, x), starts, own)
        matrix, found = whitening(run, g, keep, level=not critic.forecast)
        return critic._replace(whiten=matrix), found

    contextual, found = whitened(Critic(judge, None, None))
    critics, K = dict(contextual=contextual), contextual.whiten.size(1)
    if "forecast" in names:
        critics["forecast"] = whitened(Critic(judge, None, None, forecast=True))[0]
    if "static" in names:
        critics["static"] = whitened(Critic(None, F.normalize(judge.embed.weight[:vocab].detach(), dim=-1), None))[0]
    if "random" in names:
        numbers = np.random.default_rng([seed, TABLE]).standard_normal((vocab, max(1, round(K / span))), dtype=np.float32)
        critics["random"] = whitened(Critic(None, torch.from_numpy(numbers).to(judge.embed.weight), None), keep=0)[0]
    return critics, found


@torch.no_grad()
def calibrate(run, corpus, lay, learner, critic, watch, probe):
    """Shows the watch what is healthy: the streams on fresh text at the end of the meta phase, where nothing moves."""
    tally = {}
    for step in range(1, RULER_STEPS + 1):
        w = text(run, corpus, step, RULER)
        with run.autocast():
            self_loss("frozen", step, learner, critic, lay, w, None, chance(run, step), tally)
    run.average([tally["stream"]])
    watch.calibrate(tally["stream"].cpu().numpy(), batch_size * block_size,
                    examine(run, critic, lay, probe)["agreement_probe"], probe[0].numel())


# ----------------------------------------------------------------------------------------------
# the report

@torch.no_grad()
def judge_texts(run, lay, learner, critic, w, foreign, arm):
    """(own spans, the critic's heaviest target of each start or None, agreement) on text w, as the report shows them."""
    x, past, starts = w[:, :-1], {}, starts_of(run.device)
    said = read(learner, lay, x, cache=past)[:, starts - 1]
    own = (likeliest(said)[0] if path == "exact"
           else write_spans(learner, lay, past, said, starts, chance(run, 0)[:, starts])[0])
    truth = observed(x, starts)
    seen = dict(sharpen=said.argmax(-1)[..., None], shuffled=observed(foreign[:, :-1], starts)).get(arm, truth)
    g = gists(critic, lay, past_of(critic, lay, x), starts, torch.cat((own, seen.unsqueeze(2)), 2))
    mass = target_mass(squared_distances(g))
    among = (own == truth.unsqueeze(2)).all(-1)
    share = run.mean((mass[..., :-1] * among).sum() / among.any(-1).sum().clamp_min(1))
    apart = (starts % chunk % span == 0).nonzero()[:, 0]  # spans side by side
    heaviest = mass.argmax(-1)[0, apart].tolist()
    named = [t for i, h in zip(apart.tolist(), heaviest)
             for t in (own[0, i, h].tolist() if h < own.size(2) else [None] * span)]
    return own[0, apart, 0].flatten().tolist(), named, truth[0, apart].flatten().tolist(), share


@torch.no_grad()
def report(run, arm, step, why, watch, learner, critic, before, lay, corpus, row):
    """hacks/NNN.md: the critic of now and of the snapshot, on the own spans of now and of the snapshot, on new text.

    before: the learner and the critic's GPT before the arms. Returns what `write_report` does.
    """
    w, foreign = (text(run, corpus, meta_steps + step, stream) for stream in (TEXT, FOREIGN))
    learners = dict(then=before[0], now=learner)
    judges = dict(then=critic._replace(model=before[1] if critic.model else None), now=critic)
    seen = {(c, o): judge_texts(run, lay, learners[o], judges[c], w, foreign, arm) for c in judges for o in learners}
    judged = {key: value[3] for key, value in seen.items()}
    texts = {k: (seen[k, k][0], seen[k, k][2], seen[k, k][1]) for k in judges}
    shares = {name: row[k] for name, k in (
        ("target mass on the observation", "agreement"), ("target mass on the own likeliest token", "echo"),
        ("target mass on none of the own spans", "outside"), ("entropy of the targets (nats)", "target_entropy"),
        ("entropy of the output (nats)", "output_entropy"), ("standard deviation of the gists", "gist_std"),
        ("effective rank of the gists", "gist_rank"), ("gold (nats)", "gold_nats")) if row.get(k) is not None}
    return write_report(run, arm, step, why, watch.order(), judged, texts, shares, corpus.encoding)


@torch.no_grad()
def chunk_gists(model, lay, tokens):
    """(float [n, n_gist C] the gists of every chunk, int [n, chunk] the chunks) of text, int [m]; whole blocks of it."""
    x = tokens[:len(tokens) // block_size * block_size].view(-1, block_size)
    found = [read(model, lay, part, residual=n_layer - 1, read=lay.gists.flatten()).view(-1, n_gist * n_embd)
             for part in x.split(batch_size)]
    return torch.cat(found), x.reshape(-1, chunk)


@torch.no_grad()
def write_neighbours(run, model, lay, corpus, queries=4, among=200_000):
    """samples.txt: the chunks of the training text nearest to held-out ones, by gist (cosine) and by bag of tokens."""
    load = lambda tokens, n: torch.from_numpy(tokens[:n].astype(np.int64)).to(run.device)
    g, chunks = chunk_gists(model, lay, load(corpus.train, among))
    asked, texts = chunk_gists(model, lay, load(corpus.val, 40 * block_size))
    centre = g.mean(0)
    g, asked = F.normalize(g - centre, dim=-1), F.normalize(asked - centre, dim=-1)
    shared = lambda a, b: (a[:, :, None] == b[:, None]).sum((1, 2))  # inner product of the bags of a and of b, int [n]
    show = lambda c: repr(decode(corpus.encoding, c.tolist()))
    run.sample("==== nearest chunks of the training text\n")
    for i in range(block_size // chunk - 1, len(asked), max(1, len(asked) // queries)):
        lines = [f"chunk    {show(texts[i])}"]
        by_bag = shared(chunks, texts[i:i + 1]) / shared(chunks, chunks).sqrt()
        for name, likeness in (("by gist", asked[i] @ g.T), ("by bag", by_bag)):
            nearest = likeness.topk(min(4, len(chunks))).indices.tolist()
            lines.append(f"{name:<8} " + "  ".join(show(chunks[k]) for k in nearest))
        run.sample("\n".join(lines) + "\n\n")


@torch.no_grad()
def go_on(run, model, how, ids, steps):
    """(own tokens [steps], seconds a token, keys and values kept in a layer) of the text ids, int [P], continued greedily.

    Of a finished chunk how = "gist" keeps the keys and values of its gists alone, "full" keeps all.
    """
    def kept():
        return next(iter(cache.values()))[0].size(2) if cache else 0

    def forget(tokens):
        """Drops the last `tokens` in the cache but for the gists among them, whole chunks."""
        lay = layout(tokens * chunk // (chunk + n_gist), run.device)
        stay = torch.cat((torch.arange(kept() - tokens, device=run.device), kept() - tokens + lay.gists.flatten()))
        return {k: (a[:, :, stay], b[:, :, stay]) for k, (a, b) in cache.items()}

    cache, one, written = {}, layout(chunk, run.device), []
    whole = (len(ids) - 1) // chunk * chunk  # the rest goes token by token, as own ones do
    if whole:
        read(model, layout(whole, run.device), ids[None, :whole], how, cache=cache)
        cache = forget(kept()) if how == "gist" else cache
    began = time.time()
    for at in range(whole, len(ids) + steps - 1):
        token = ids[at] if at < len(ids) else written[-1]
        first = one.text[at % chunk]
        last = one.text[at % chunk + 1] if (at + 1) % chunk else len(one.pos)
        tokens = one.template[first:last].clone()  # the text token, and what gists stand behind it
        tokens[0] = token
        n = len(tokens)
        sees = torch.ones(n, kept() + n, dtype=torch.bool, device=run.device).tril(kept())
        logits = model(tokens[None], torch.full((n,), at, device=run.device), sees, cache=cache, read=slice(0, 1))
        if how == "gist" and not (at + 1) % chunk:
            cache = forget(len(one.pos))
        if at >= len(ids) - 1:
            written.append(logits.argmax().item())
    return written, (time.time() - began) / (len(ids) + steps - 1 - whole), kept()


def write_continuations(run, models, corpus, steps=64):
    """samples.txt and the screen: the text of the file `prompt` continued from all of it, and from its gists alone."""
    tokens = corpus.encoding.encode_ordinary(Path(prompt).read_text())
    ids = corpus.encoding.spellings * torch.tensor(tokens, device=run.device)  # of each its first spelling
    run.sample(f"==== {prompt} goes on\n")
    for how in ("full", "gist"):
        written, seconds, kept = go_on(run, models[how], how, ids, steps)
        line = (f"{how}: keys and values of {kept} tokens kept for {len(ids) + steps - 1} read, {1e3 * seconds:.2f} ms a "
                f"token\n{decode(corpus.encoding, written)!r}")
        run.say(line)
        run.sample(line + "\n\n")


# ----------------------------------------------------------------------------------------------
# the run

def check():
    """(arms, masks by name). Refuses settings that cannot be."""
    names = chosen_arms(arms, ARMS)
    masks = [m for m in controls.replace(" ", "").split(",") if m]
    for name in masks:
        if name not in CONTROLS:
            refuse(f"controls={controls!r}: {name!r} is not one of {', '.join(CONTROLS)}")
    if chunk < 1 or block_size % chunk:
        refuse(f"chunk={chunk} does not divide block_size={block_size} into whole chunks")
    if block_size < 2 * chunk:
        refuse(f"block_size={block_size} must hold two chunks of chunk={chunk} or more: the first has no earlier one")
    if not 1 <= n_gist <= chunk:
        refuse(f"n_gist={n_gist} must be from 1 to chunk={chunk}: more gists than text compress nothing")
    if not 1 <= span <= chunk:
        refuse(f"span={span} must be from 1 to chunk={chunk}")
    if n_layer < 2:
        refuse(f"n_layer={n_layer} must be 2 or more: the gist is what enters the last block")
    if not 1 <= every <= len(starts_of("cpu")):
        refuse(f"every={every} must be from 1 to {len(starts_of('cpu'))}, the prefixes that own spans may follow")
    if span > 1 and "sharpen" in names:
        refuse(f"arm 'sharpen' reads single likeliest tokens; leave it out with span={span}")
    if not meta_steps or order == 2 and not order_steps:
        refuse(f"meta_steps={meta_steps} and, with order=2, order_steps={order_steps} must be above 0")
    if order == 2 and "forecast" in names:
        refuse("arm 'forecast' reads what second order does not train, the last block; leave it out with order=2")
    if "forecast" in names and vocab > LARGEST_FORECAST:
        refuse(f"arm 'forecast' compares all {vocab} log probabilities; it needs vocab of {LARGEST_FORECAST} or less")
    if span > 1 and path != "reinforce":
        refuse(f"path={path!r} knows single own tokens; with span={span} use --path=reinforce")
    if order not in (1, 2):
        refuse(f"order={order} must be 1 (the bottleneck alone) or 2 (and second order)")
    if order == 2 and path != "exact":
        refuse(f"path={path!r} has no second order here: it goes with path='exact'")
    if path == "reinforce" and distance == "praise":
        refuse("distance='praise' goes with path='exact'; use --distance=logscore")
    if not 2 <= candidates <= (vocab - 1 if path == "exact" else 10**6):
        refuse(f"candidates={candidates} must be 2 or more" + (f", and below vocab={vocab}" if path == "exact" else ""))
    if not tau > 0:
        refuse(f"tau={tau} must be above 0")
    if ema_decay >= 1:
        refuse(f"ema_decay={ema_decay} must be below 1: it is the share of the old weights that stays")
    if critic_from and {"self", "ema"} & set(names):
        refuse("arms 'self' and 'ema' have the learner for a critic; leave them out with critic_from")
    if prompt and not (Path(prompt).is_file() and Path(prompt).stat().st_size):
        refuse(f"prompt={prompt!r} is no file with text in it")
    if prompt and "full" not in masks:
        refuse(f"prompt={prompt!r} needs full among controls={controls!r}: it continues from full context too")
    return names, ["gist", *masks]


def main():
    run = configure(globals())
    names, masks = check()
    names = run.arms_to_go(names, ARMS)
    if run.local_rank == 0:
        prepare(dataset, vocab)
    run.barrier()
    corpus = open_corpus(dataset, vocab)
    for split, tokens in (("train", corpus.train[:train_tokens or None]), ("validation", corpus.val)):
        if len(tokens) <= block_size:
            refuse(f"block_size={block_size} must be below the {len(tokens)} tokens of the {split} split")

    theirs = run.resumed["theirs"] if run.resumed else dict(run.settings, weights=None)  # of the critic
    if critic_from and not run.resumed:
        theirs = read_bottleneck(critic_from, run.device, corpus_id(corpus), vocab=vocab, chunk=chunk, n_gist=n_gist,
                                 place=place)
    theirs = {k: theirs[k] for k in ("n_layer", "n_head", "n_embd", "weights")}
    if rank > n_gist * theirs["n_embd"]:
        refuse(f"rank={rank} must be at most n_gist * n_embd = {n_gist * theirs['n_embd']} of the critic")
    lay = layout(block_size, run.device, run.weight_dtype)
    new = lambda c: GPT(GPTConfig(vocab, n_gist + 1, c["n_layer"], c["n_head"], c["n_embd"])).to(
        run.device, run.weight_dtype)
    models, optimizers = {}, {}
    for how in masks:
        torch.manual_seed(seed)
        models[how] = new(run.settings)
        optimizers[how] = adamw(models[how], learning_rate)
    learner, optimizer, watch = models["gist"], optimizers["gist"], Watch()
    judge, *before = (new(c).requires_grad_(False) for c in (theirs, run.settings, theirs))  # critic; both as they were
    parts = dict(learner=learner, judge=judge, optimizer=optimizer, watch=watch)
    meta_parts = {**parts, **{f"model_{how}": models[how] for how in masks},
                  **{f"optimizer_{how}": optimizers[how] for how in masks}}
    at = dict(arm="meta", step=0, track=new_track(), arms={}, ends={}, meta=None, snapshot=None, critic=None, gain=None,
              directions=None, watches={}, real_targets=0, corpus=corpus_id(corpus), theirs=theirs)
    tally = {}
    if run.resumed:
        if run.resumed["corpus"] != at["corpus"]:
            refuse(f"{corpus.folder} holds another corpus or tokenizer than the one that {run.out_dir} was begun with")
        run.restore(at, tally, **(meta_parts if run.resumed["arm"] == "meta" else parts))
    elif start:
        at["meta"], at["snapshot"] = read_meta_phase(start, run.stage, run.device, run.settings, SELF_PHASE,
                                                     at["corpus"])
        at["arm"] = "start"
    if compile:
        for model in models.values():
            model.compile()
    windows = val_windows(corpus.val, eval_windows, block_size + 1)
    gold = Gold(windows, corpus.token_bytes, run, batch_size // run.ranks)
    bottleneck = lambda x: read(learner, lay, x)
    probe = stored_probe(run, corpus)
    size = sum(p.numel() * p.element_size() for p in learner.parameters())
    theirs_size = sum(p.numel() * p.element_size() for p in judge.parameters())
    run.open(need_bytes=2 * ((7 + 5 * len(masks) + len(names)) * size + 3 * theirs_size))

    # ---- meta phase: cross entropy through the bottleneck, and through the masks of the controls
    if at["arm"] == "meta":
        run.start_clock(at["step"])
        for step in range(at["step"], meta_steps + 1):
            run.checkpoint(step, at, tally, **meta_parts)
            for opt in optimizers.values():
                set_rate(opt, step)
            if step % eval_interval == 0 or step == meta_steps:
                others = {f"gold_{how}": gold(lambda x: read(models[how], lay, x, how))[0] for how in masks[1:]}
                row, _ = write_row(run, "meta", step, meta_steps, tally, gold, bottleneck, optimizer, outside=None,
                                   real_targets=0, **examine(run, Critic(learner, None, None), lay, probe), **others)
                track_gold(at["track"], row, hack_margin)
            if step == meta_steps:
                break
            w = text(run, corpus, step)
            for how in masks:
                with run.autocast():
                    loss, nats = bottleneck_loss(models[how], lay, w, how)
                take_step(run, models[how], optimizers[how], loss, tally if how == "gist" else None)
                if how == "gist":
                    tally["steps"] = tally.get("steps", 0) + torch.ones_like(nats)
                    tally["loss"] = tally.get("loss", 0) + nats
        nats = {how: later_chunks(run, models[how], lay, windows.to(run.device), how) for how in masks}
        at["meta"] = dict(at["track"], later={how: v.mean().item() for how, v in nats.items()})
        if {"full", "none"} <= set(masks):
            at["meta"]["gist_share"], at["meta"]["gist_share_by_place"] = gist_share(nats)
            run.say("cross entropy of later chunks: " + ", ".join(f"{k} {v:.3f}" for k, v in at["meta"]["later"].items())
                    + f"; the gists carry {at['meta']['gist_share']:.0%} of full minus none, by place in the chunk "
                    + ", ".join(f"{v:.0%}" for v in at["meta"]["gist_share_by_place"]))
        at["snapshot"] = copy.deepcopy(dict(
            learner=learner.state_dict(), optimizer=optimizer.state_dict(),
            controls={how: models[how].state_dict() for how in masks[1:]}))
        at.update(arm="start")
        write_neighbours(run, learner, lay, corpus)

    # ---- self phase: the distance of own and true gists; no real token is a target
    snapshot = at["snapshot"]
    critics = {}
    if names:
        for model, state in zip(before, (None, theirs["weights"])):
            model.load_state_dict(state or snapshot["learner"])
        critics, found = make_critics(run, corpus, lay, *before, names)
        at["directions"] = critics["contextual"].whiten.size(1)
        run.say(f"the gists keep {at['directions']} directions, whitened; before that they fill {found:.1f}")
        if at["critic"] is None and order == 2:  # an interrupted run does these steps again
            at["critic"], at["gain"] = train_critic(run, corpus, snapshot, learner, critics["contextual"], lay)
        at["critic"] = at["critic"] or theirs["weights"] or snapshot["learner"]
        critics = {kind: c._replace(model=judge) if c.model else c for kind, c in critics.items()}
    for arm in names:
        kind = arm if arm in critics else "contextual"
        critic = critics[kind]
        before[1].load_state_dict(snapshot["learner"] if arm == "self" else at["critic"])
        if at["arm"] != arm:
            learner.load_state_dict(snapshot["learner"])
            judge.load_state_dict(before[1].state_dict())
            optimizer.load_state_dict(copy.deepcopy(snapshot["optimizer"]))
            if arm != "real":
                if kind not in at["watches"]:
                    calibrate(run, corpus, lay, learner, critic, watch, probe)
                    at["watches"][kind] = watch.state_dict()
                watch.load_state_dict(at["watches"][kind])
            at.update(arm=arm, step=0, track=new_track(), real_targets=0)
        track = at["track"]
        for group in optimizer.param_groups:
            group["lr"] = self_learning_rate
        run.start_clock(at["step"])
        for step in range(at["step"], self_steps + 1):
            run.checkpoint(step, at, tally, **parts)
            if step % eval_interval == 0 or step == self_steps:
                stands = {} if arm == "real" else examine(run, critic, lay, probe)
                row, stream = write_row(run, arm, step, self_steps, tally, gold, bottleneck, optimizer, outside=None,
                                        real_targets=at["real_targets"], **stands)
                if track_gold(track, row, hack_margin):
                    run.say(f"{arm}: hacked at step {track['steps_to_hack']}, gold {row['gold_nats']:.3f} after a best "
                            f"of {track['gold_best']:.3f}")
                    if arm != "real":
                        track["reports"].append(
                            report(run, arm, step, "gold", watch, learner, critic, before, lay, corpus, row))
                alarms = []
                if stream is not None and arm != "real":
                    alarms = watch.update(step, stream.cpu(), row["agreement_probe"])
                if alarms and step - (track["alarms"] or [-MEMORY])[-1] >= MEMORY:
                    track["alarms"].append(step)
                    track["reports"].append(
                        report(run, arm, step, alarms, watch, learner, critic, before, lay, corpus, row))
                if alarms:
                    watch.restart(stream.cpu(), row["agreement_probe"])
            if step == self_steps:
                break
            w = text(run, corpus, meta_steps + step)
            with run.autocast():
                if arm == "real":
                    logits = read(learner, lay, w[:, :-1])
                    loss = F.cross_entropy(logits.flatten(0, 1), w[:, 1:].flatten())
                    note_step(tally, loss, logits, w[:, :-1])
                    at["real_targets"] += batch_size * block_size
                else:
                    foreign = text(run, corpus, meta_steps + step, FOREIGN)[:, :-1] if arm == "shuffled" else None
                    loss = self_loss(arm, step, learner, critic, lay, w, foreign, chance(run, meta_steps + step), tally)
            take_step(run, learner, optimizer, loss, tally)
            if arm in ("self", "ema"):
                follow(judge, learner, ema_decay if arm == "ema" else 0.0)
        at["arms"][arm], at["ends"][arm] = track, copy.deepcopy(learner.state_dict())

    at["arm"] = "done"
    run.checkpoint(0, at, tally, **parts)
    if prompt:
        for how in ("gist", "full"):
            models[how].load_state_dict(snapshot["learner"] if how == "gist" else snapshot["controls"]["full"])
        write_continuations(run, models, corpus)
    extra = dict(gain=at["gain"], directions=at["directions"])
    extra |= {k: at["meta"][k] for k in ("later", "gist_share", "gist_share_by_place") if k in at["meta"]}
    run.finish(summarise(run, at["meta"], meta_steps, at["arms"], self_steps, **extra), draw_runs)


if __name__ == "__main__":
    main()
