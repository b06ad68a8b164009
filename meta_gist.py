"""
Stage 3: can the signal itself be learned, by how much learning from it helps?

    python meta_gist.py                                     # two cores, about 2 minutes
    python meta_gist.py --chunk=1                           # the learner writes one token at a time
    torchrun --standalone --nproc_per_node=8 meta_gist.py   # the same run on any number of ranks

The learner p_θ writes where it could have read x. The critic φ, embeddings E that start random and a
sharpness κ, praises tokens by how near they are to x: with T(v | x) = softmax_v κ cos(E_v, E_x),

    r_i(v) = T(v | x_i) − Σ_x′ p_θ(x′ | c, x_<i) T(v | x′)           praise after the true prefix c, x_<i
    θ′ = AdamW(θ, g),  g = ∇_θ L,  L = −Σ_v A(v) log p_θ(v)          the inner step: learning from A
    O(θ′) = cross entropy of θ′, 15 steps on, on other text          the outer loss: did that help?
    φ ← φ − rate · dO(θ′)/dφ                                         the meta step: what helps more?

Nothing else tells E what to mean. With chunk = 1 the signal is A = r. A longer chunk y_1 … y_k the learner
writes alone, and gists align it with the truth, the learner's own last hidden states h:

    a_j = h(c, y_<j)     b_i = h(c, x_<i)     m_ji = σ(κ_a (cos(a_j, b_i) − ν))     A_j = Σ_i m_ji r_i

Where what it has written means what the truth says at some place of the chunk, it is taught what the truth
says next there; elsewhere nothing. m_ji never sees x_i, so A is zero at the truth, on average. One step
does not tell a broad match from a sharp one: with inner steps of a set length, θ′ = θ − length · g/‖g‖, κ_a
and ν stay.

An arm is one self phase. real: θ learns from the true tokens. frozen, self, ema: from the signal of φ as the
meta phase left it, moved by as much of its length as the learner's embeddings since, or by a moving average
of that. shuffled, sharpen: as frozen, but the observation x is another text's, or what the learner says
itself. first, frozen_first: as real and frozen, at the first token of each chunk; same_place: as frozen, but
m_ji = 0 unless i = j. Of two wordings of one text (wordings.py) one is spoken and judges, the other observed;
oracle: θ learns from the first; table, mask: what is known. Arms are compared by gold, cross entropy.
"""
import copy
import functools
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

import wordings
from configurator import chosen, refuse_if
from corpus import batch_starts, val_windows, windows
from equations import (adamw_step, add, add_up, by_name, dot, gradient, inner_step, leaves, log_softmax,
                       moments_of, praise, pull_back)
from gists import say_chunks, write_chunks
from model import GPT, GPTConfig, adamw, sample_tokens
from phases import REAL, Phases
from pool import SIZE, Pool
from prepare_data import commonest, read_corpus
from run import open_run
from watch import MEMORY, note

# --- experiment
arms = "real,first,frozen,self,ema,shuffled"  # any, sharpen, frozen_first, same_place; chunk=1: first is real
meta_steps = 440        # steps of the meta phase: the learner's, then the critic's
pretrain = 400          # of these, steps of the learner alone, on real text; the rest trains the critic
self_steps = 500        # steps of each arm, with the critic's signal
# --- the signal
chunk = 4               # tokens that the learner writes alone, from a true prefix
kappa = 3.0             # sharpness that the critic starts with
kappa_a = 5.0           # of chunks of 2 or more: the sharpness of the match of gists that it starts with
nu = 0.5                # the cosine of gists at which a match is a half, that it starts with
# --- second order
inner_steps = 15        # steps that the learner takes before the outer loss judges
inner_length = 0.0      # 0: an inner step is one of AdamW, as arms take it; above 0: it has this length
val_chunks = "random"   # "random" | "aligned": what judges: any text, or the same in the other wording
outer_batch = 256       # sequences that judge
critic_rate = 0.1       # Adam's learning rate of E, falling to 0 in a line; its entries are of about 1
scalar_rate = 0.3       # the same of log κ, log κ_a and ν
# --- self phase
self_rate = 1.0         # learning rate of the self phase, as a share of learning_rate
ema_decay = 0.999       # arm ema: the share by which the critic stays behind the learner, each step
# --- model
n_layer = 2             # blocks
n_head = 4              # heads in each
n_embd = 64             # width
block_size = 32         # text tokens in a sequence
# --- data
dataset = "plays"       # plays, kjv-asv, tinyshakespeare, fineweb-edu, or a text file or folder of your own
vocab = 512             # tokens: 256 is plain bytes, 50257 is GPT-2's, any other a BPE trained on the corpus
train_tokens = 0        # use only the first so many training tokens, repeated; 0 is all
# --- optimisation
batch_size = 16         # sequences a step, over all ranks
learning_rate = 1e-3    # AdamW, constant after the warm-up
warmup = 50             # steps from 0 to learning_rate
grad_clip = 1.0         # largest gradient norm
grad_accum = 1          # pieces of a rank's batch, one after the other: the same step in less memory
decay = 1.0             # the share of its learning rate that an arm ends with; it falls in a line
# --- run
seed = 1                # of weights and data
eval_interval = 25      # steps between two lines of the log
eval_windows = 128      # held-out sequences that gold is measured on
save_interval = 200     # steps between two checkpoints
device = "auto"         # "auto" | "cuda" | "mps" | "cpu": auto takes the first that is there
dtype = "float32"       # "float32" | "bfloat16" | "float64": bfloat16 is autocast over float32 weights
compile = False         # torch.compile of the learner; about a minute before the first steps, then faster
out_dir = "out/meta_gist"  # the run's folder; an earlier run there is moved aside
resume = ""             # the folder of a run to go on with
start = ""              # the folder of a run whose finished meta phase to start from, instead of one's own
wandb_log = "no"        # "no" | "online" | "offline": also log to Weights & Biases

ARMS = ("real", "oracle", "first", "self", "frozen", "frozen_first", "same_place", "ema", "shuffled",
        "sharpen", "table", "mask")
TABLES = {"table": wordings.stands_for, "mask": wordings.rarer}  # what is known of the words: T and weights
FIRST = ("first", "frozen_first")  # learn of the first token of a chunk alone, which follows a true prefix
# Independent streams of data and of random numbers; MEASURE takes four.
_, FOREIGN, CHANCE, OUTER, INNER, PROBE, MEASURE, _, _, _, ROLLOUT, MEASURED = range(12)
EXACT = 4096             # the commonest tokens, which praise weighs one by one; of the others it draws
GRAPHS = 1               # of the last inner steps the graph is kept: more is faster and takes more memory
LENGTH = 0.05            # of the steps by which gains are measured, where inner_length is 0
SAMPLES = 2              # rollouts for each observation, in chunks of 2 or more
SCALARS = ("log_kappa", "log_kappa_a", "nu")  # of φ, beside E
common = slice(None)     # the EXACT commonest tokens, or all
no_one = lambda *heard: None


# ---- what the learner says, and what the critic makes of it. Of T places, n chunks of k = chunk: T = n k

def kernel(phi, x=slice(None)):
    """T(v | x) = softmax_v κ cos(E_v, E_x), [..., V], of tokens x or of all; in arms of TABLES as known."""
    unit = F.normalize(phi["E"], dim=-1)
    return phi["T"][x] if "T" in phi else (phi["log_kappa"].exp() * unit[x] @ unit.T).softmax(-1)


def match(phi, gists, gists_true):
    """m_ji [B, R, n, k, k], divided by that of two gists that are the same, so that chunk = 1 is A = r."""
    a, b = F.normalize(gists, dim=-1).unsqueeze(-2), F.normalize(gists_true, dim=-1)[:, None, :, None]
    sharp, cos = phi["log_kappa_a"].exp(), (a * b).sum(-1)  # no matrix product: autocast would round it
    return (sharp * (cos - phi["nu"])).sigmoid() / (sharp * (1 - phi["nu"])).sigmoid()


def signal(phi, seen, said, drawn=None, arm=""):
    """A(v), praise and blame for each token that the learner might say: [B, R, n, k, V].

    seen: the observation, int [B, T]. said: a gists.Said. drawn: of many tokens, int [B, T], one of those
    that are not `common`, drawn from p: it stands for them all in Σ_x′ p(x′) T(v | x′), weighted by what they
    have of p, without bias, and as Σ_x′ T ∂p = E T ∂log p without bias in what is derived.
    """
    logp = said.logp_true
    table = kernel(phi, common)
    of_truth = table[seen] if drawn is None else kernel(phi, seen)
    r = praise(of_truth.view_as(logp), logp[..., common].exp(), table)
    if drawn is not None:
        x = drawn.view(*logp.shape[:-1], 1)
        rest, logq = 1 - logp[..., common].detach().exp().sum(-1, keepdim=True), logp.gather(-1, x)
        r = r - rest * (1 + logq - logq.detach()) * kernel(phi, x.squeeze(-1))
    r = (phi["weight"][seen].view(*r.shape[:-1], 1) * r if "weight" in phi else r)[:, None]
    if chunk == 1:
        return r
    m = match(phi, said.gists, said.gists_true)
    return (m * torch.eye(chunk, device=m.device) if arm == "same_place" else m) @ r


# ---- second order: see equations.py for θ′, w and what is averaged over ranks; theta, phi: dicts by name

def inner_loss(a, logp):
    """L = −Σ_v A(v) log p_θ(v), nats, mean over own places."""
    return -(a * logp).sum(-1).mean()


def real_loss(learner, theta, text, every=1):
    """(nats a token of text [B, T + 1], or of each `every`-th; log p [B, T, V]): O, and the loss of real."""
    logp = log_softmax(functional_call(learner, theta, (text[:, :-1],)))
    return F.nll_loss(logp[:, ::every].flatten(0, 1), text[:, 1::every].flatten()), logp


def cut(times, *tensors):
    """The rows of tensors that are `times` batches, as many at once as are read at once."""
    return list(zip(*(t.chunk(times * grad_accum) for t in tensors)))


def real_gradient(learner, theta, text, every=1, times=1, hear=no_one):
    """(∇_θ of the cross entropy of a text on this rank, nats a token). times: batches that the text is.

    hear(loss, log p [B, T, V], observation): is told of each piece.
    """
    theta, g, mean, batch = leaves(theta), {}, 0.0, cut(times, text)
    share = 1 / len(batch)
    for piece, in batch:
        loss, logp = real_loss(learner, theta, piece, every)
        g, mean = add_up(g, gradient(loss, theta), share), mean + share * loss.detach()
        hear(loss, logp.detach(), piece[:, 1:])
    return g, mean


@torch.no_grad()
def write(learner, theta, text, u):
    """What is drawn once for a text: (own chunks, see `write_chunks`; `drawn`, see `signal`)."""
    x, drawn = text[:, :-1], None
    if vocab > EXACT:
        logits, u, chance = functional_call(learner, theta, (x,)), u[:, :-1], u[:, -1]
        drawn = sample_tokens(logits.index_fill(-1, common, -math.inf), chance)
    return write_chunks(learner, theta, x, chunk, u), drawn


def signal_gradient(learner, theta, phi, text, seen, written, arm="", graph=False):
    """(∇_θ L, (L, log p after true prefixes [B, T, V], true tokens, tokens praised most [B, R, T])).

    seen: the observation, int [B, T]. written: see `write`. arm: of FIRST, L is that of first places.
    graph: θ and φ are leaves, and ∇_θ L can be derived again by both.
    """
    theta, (y, drawn) = theta if graph else leaves(theta), written
    said = say_chunks(learner, theta, text[:, :-1], y, fused=not graph)
    with torch.set_grad_enabled(graph):
        a = signal(phi, seen, said, drawn, arm)
    places = slice(1) if arm in FIRST else slice(None)
    logp, along = said.logp[..., places, :], a[..., places, :]
    g = gradient(logp, theta, -along * vocab / along.numel(), graph)  # A is held fixed: no praise is sought
    logp_true = said.logp_true.detach().flatten(1, 2)
    return g, (inner_loss(along, logp).detach(), logp_true, text[:, 1:], a.argmax(-1).flatten(2))


def inner_gradient(learner, theta, phi, text, seen, u, average, arm="", times=1, hear=no_one):
    """g = ∇_θ L averaged over ranks. u: uniform numbers, see `chance`; times, hear: as in `real_gradient`."""
    g, batch = {}, cut(times, text, seen, u)
    for text, seen, u in batch:
        found, heard = signal_gradient(learner, theta, phi, text, seen, write(learner, theta, text, u), arm)
        g = add_up(g, found, 1 / len(batch))
        hear(*heard)
    average(list(g.values()))
    return g


def learn(theta, moments, g, count):
    """(θ, moments) after an inner step: of inner_length, or step number `count` of the learner's AdamW."""
    if inner_length:
        return inner_step(theta, g, inner_length), moments
    return adamw_step(theta, moments, g, rate("frozen", 0), count, grad_clip)


def meta_step(learner, theta, phi, texts, chances, outer, average, moments=(), count=0, hear=no_one):
    """(dφ, O(θ_S), g of the first step): how φ should have moved S steps to lower O.

    texts: of each step, int [B, T + 1]; chances: its uniform numbers; outer: the text that judges. average:
    of a list of tensors over ranks, in place. moments, count: of AdamW, and its steps so far, with
    inner_length = 0. hear: is told of the first step. Of each step θ_k, g_k and what was written are kept, of
    the GRAPHS last ones the graph of g too if it is one piece; those of the others are made again on the way
    back, so that memory grows by weights alone.
    """
    trail, phi, share = [], leaves(phi), 1 / grad_accum
    for k, (text, u) in enumerate(zip(texts, chances)):
        theta, g = leaves(theta), {}
        batch = [(t, t[:, 1:], write(learner, theta, t, v)) for t, v in cut(1, text, u)]
        kept = k >= len(texts) - GRAPHS and len(batch) == 1
        for piece in batch:
            mine, heard = signal_gradient(learner, theta, phi, *piece, graph=kept)
            g = add_up(g, mine, share)
            if k == 0:
                hear(*heard)
        average(list(g.values()))
        trail.append((theta, moments, g, batch, mine if kept else None))
        theta, moments = learn(theta, moments, g, count + k + 1)
    lam, loss = real_gradient(learner, theta, outer, times=len(outer) // len(text))       # λ = ∇O(θ_S)
    average(list(lam.values()))
    dphi = {n: torch.zeros_like(p) for n, p in phi.items()}
    of_moments = tuple({n: torch.zeros_like(p) for n, p in m.items()} for m in moments)  # λ of the moments
    for k, (theta, moments, g, batch, mine) in reversed(list(enumerate(trail))):
        step, at, found = functools.partial(learn, count=count + k + 1), (theta, moments, g), {}
        lam, of_moments, w = pull_back(step, (lam, of_moments), *at)          # λ and w, through the step
        for piece in batch:
            again = mine or signal_gradient(learner, theta, phi, *piece, graph=True)[0]
            found = add_up(found, gradient(dot(again, w), phi | theta if k else phi), share)
        average(list(found.values()))
        dphi = add(dphi, found)                                               # dφ += ∂_φ ⟨∇_θ L(θ_k, φ), w⟩
        lam = add(lam, found) if k else lam                                   # λ  += ∂_θ ⟨∇_θ L(θ_k, φ), w⟩
    return dphi, loss, trail[0][2]


# ---- what a step reads

def chance(phases, step, stream=CHANCE, rows=None):
    """Uniform numbers [B, R, T] for R rollouts, and R + 1 of them if there are many tokens."""
    rollouts = SAMPLES if chunk > 1 else 1  # with chunk = 1 there is one way to write nothing
    return phases.chance(step, (rollouts + (vocab > EXACT), block_size), stream, rows)


def meta_texts(phases, number):
    """([text of each inner step], [its uniform numbers], the text that judges) of meta step `number`."""
    steps, T = range(number * inner_steps, (number + 1) * inner_steps), block_size
    texts = [phases.text(k, INNER, split="train_other") for k in steps]
    outer, corpus, run = phases.text(number, OUTER, rows=outer_batch), phases.corpus, phases.run
    if val_chunks == "aligned":
        tokens, other = corpus.train, corpus.train_other
        starts = [batch_starts(other, seed, k, batch_size, T + 1, run.rank, run.ranks, INNER) for k in steps]
        found = wordings.twins(np.concatenate(starts), tokens, other, corpus.encoding, T + 1)
        outer = windows(tokens, found, T + 1).to(run.device)
    return texts, [chance(phases, k, ROLLOUT) for k in steps], outer


def observed(phases, arm, learner, text, step, u):
    """What the critic reads as the observation [B, T]: the truth, in the arm shuffled another text's, in the
    arm sharpen what the learner itself says after each true prefix."""
    if arm == "shuffled":
        return wordings.world(phases, step, FOREIGN)[:, 1:]
    return sample_tokens(learner(text[:, :-1]), u[:, -1]) if arm == "sharpen" else text[:, 1:]


# ---- steps

def real_step(phases, text, every=1):
    """The learner learns from real text, or from each `every`-th token of it."""
    learner = phases.parts["learner"]
    hear = lambda loss, logp, obs: note(phases.tally, loss, logp, obs, obs)
    g, _ = real_gradient(learner, by_name(learner), text, every, hear=hear)
    phases.run.average(list(g.values()))
    phases.take_step(learner, phases.parts["optimizer"], g)


def signal_step(phases, arm, text, step):
    """The learner learns from the critic's signal alone."""
    learner, phi, u = phases.parts["learner"], by_name(phases.judge()), chance(phases, step)
    with torch.no_grad():
        seen = observed(phases, arm, learner, text, step, u)
    batch, hear = (text, seen, u, phases.run.average, arm), functools.partial(note, phases.tally)
    g = inner_gradient(learner, by_name(learner), phi, *batch, hear=hear)
    phases.take_step(learner, phases.parts["optimizer"], g)


def critic_step(phases, number, mover):
    """Meta step `number`, at the learner of the pool whose turn it is; then that one steps, as arms do, or
    from real targets. mover: what holds the one of the turn."""
    run, parts, turn = phases.run, phases.parts, number % SIZE
    member, critic, learner = parts["pool"].take(turn, parts, mover), parts["critic"], mover["learner"]
    theta, phi, real = by_name(learner), by_name(critic), turn >= SIZE // 2
    texts, chances, outer = meta_texts(phases, number)
    moments = () if inner_length else moments_of(mover["optimizer"], learner)
    age, hear = pretrain + member["age"], functools.partial(note, phases.tally)
    dphi, judged, g = meta_step(learner, theta, phi, texts, chances, outer, run.average, moments, age, hear)
    if inner_length:  # one such step on, a broad match gains like a sharp one, and then ruins the run
        dphi |= {s: torch.zeros_like(phi[s]) for s in ("log_kappa_a", "nu")}
    phases.take_step(critic, parts["critic_optimizer"], dphi)
    if real:  # by the learner that may be compiled; in the meta step, which derives twice, by one that is not
        g, _ = real_gradient(parts["learner"], theta, texts[0])
        run.average(list(g.values()))
    for group in mover["optimizer"].param_groups:
        group["lr"] = rate("real" if inner_length or real else "frozen", 0)
    phases.take_step(learner, mover["optimizer"], g, noted=False)
    parts["pool"].give_back(member, mover, run.mean(judged))


@torch.no_grad()
def shift_critic(phases, decay):
    """The critic of self and ema moves with the learner: E by as much, of its own length, as the learner's
    embeddings have since the snapshot, at once (decay 0) or by 1 − decay of the way a step."""
    then, now = phases.snapshot["learner"]["embed.weight"], phases.parts["learner"].embed.weight
    E = phases.snapshot["critic"]["E"]
    moved = (now - then)[:vocab] * (E.norm() / then[:vocab].norm())
    phases.parts["critic"]["E"].lerp_(E + moved, 1 - decay)


# ---- what the log and the reports show

def measure(phases, theta, number):
    """A normalised step from theta on held-out text, of four batches: not a batch's noise is to be seen.

    gain: nats a token that it takes off other held-out text; gain_shuffled, gain_real: with another text's
    observation, with real targets; all equally long. cosine_real: of the signal's gradient with the real one;
    cos_bb, cos_bb_real: of each between two batches, where a memorised direction shows.
    """
    learner, phi, average = phases.parts["learner"], by_name(phases.parts["critic"]), phases.run.average
    length, rows = inner_length or LENGTH, 4 * batch_size
    text, again, foreign = (phases.text(number, MEASURE + k, rows, "val_other") for k in range(3))
    other, u = phases.text(number, MEASURE + 3, rows, "val"), chance(phases, number, MEASURED, rows)
    signal_g, shuffled_g, again_g = (inner_gradient(learner, theta, phi, t, seen[:, 1:], u, average, times=4)
                                     for t, seen in ((text, text), (text, foreign), (again, again)))
    real, more = (real_gradient(learner, theta, t, times=4)[0] for t in (text, again))
    average([*real.values(), *more.values()])
    cos = lambda a, b: dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().clamp_min(1e-30)
    found = dict(cosine_real=cos(signal_g, real), cos_bb=cos(signal_g, again_g), cos_bb_real=cos(real, more))
    nats = lambda theta: torch.stack([real_loss(learner, theta, t)[0] for t, in cut(4, other)]).mean()
    before = nats(theta)
    for name, g in dict(gain=signal_g, gain_shuffled=shuffled_g, gain_real=real).items():
        found[name] = before - nats(inner_step(theta, g, length))
    average(list(found.values()))
    return {name: value.item() for name, value in found.items()}


def examine(phases):
    """{agreement_probe: share of held-out tokens praised most if the learner is sure of random ones; kappa,
    kappa_a, nu}, and in the critic's part of the meta phase what `measure` finds."""
    critic, pool, where = phases.parts["critic"], phases.parts.get("pool"), phases.run.device
    obs, phi = val_windows(phases.corpus.val, 4, block_size + 1)[:, 1:].to(where), by_name(critic)
    own = np.random.default_rng([seed, PROBE]).integers(0, vocab, tuple(obs.shape))
    told = (kernel(phi, obs) - kernel(phi, torch.from_numpy(own).to(where))).argmax(-1)
    found = dict(agreement_probe=(told == obs).float().mean().item(), kappa=critic["log_kappa"].exp().item(),
                 kappa_a=critic["log_kappa_a"].exp().item(), nu=critic["nu"].item())
    if phases.arm == "meta" and phases.step >= pretrain:
        number = phases.step - pretrain
        held = pool.members[number % SIZE].get("learner") or by_name(phases.parts["learner"])
        theta = {name: t.to(where) for name, t in held.items()}
        with phases.run.autocast():
            measured = measure(phases, theta, number)
        phases.kept["found"].append(dict(measured, step=phases.step))
        found.update(measured, restarts=pool.restarts)
    return found


@torch.no_grad()
def ask(phases, learner, critic, step):
    """(own, true and praised tokens of a step's first row; agreement of the last two), read as in the arm."""
    text, u, theta = wordings.world(phases, step), chance(phases, step), by_name(learner)
    seen = observed(phases, phases.arm, learner, text, step, u)
    y, drawn = write(learner, theta, text, u)
    said, obs = say_chunks(learner, theta, text[:, :-1], y), text[:, 1:]
    told = signal(by_name(critic), seen, said, drawn, phases.arm).argmax(-1).flatten(2)
    own = said.logp_true.argmax(-1).flatten(1)
    return own[0].tolist(), obs[0].tolist(), told[0, 0].tolist(), (told == obs[:, None]).float().mean()


# ---- the run

def check():
    """The arms by name. Refuses settings that cannot be."""
    names = chosen("arms", arms, ARMS)
    refuse_if(pretrain > meta_steps, f"pretrain={pretrain} must be at most meta_steps={meta_steps}")
    refuse_if(chunk < 1 or block_size % chunk, f"chunk={chunk} must divide block_size={block_size}")
    refuse_if(not 1 <= inner_steps <= 64, f"inner_steps={inner_steps} must be from 1 to 64")
    refuse_if(min(kappa, kappa_a) <= 0, f"kappa={kappa} and kappa_a={kappa_a} must be above 0")
    refuse_if(not inner_length and not pretrain, f"pretrain={pretrain} must be above 0 with inner_length=0")
    refuse_if(outer_batch < batch_size or outer_batch % batch_size,
              f"outer_batch={outer_batch} must be a multiple of batch_size={batch_size}")
    refuse_if(dataset != wordings.NAME and {"oracle", *TABLES, "aligned"} & {val_chunks, *names},
              f"dataset={dataset!r}: arms oracle, table, mask, val_chunks='aligned' need {wordings.NAME!r}")
    refuse_if(val_chunks == "aligned" and outer_batch != inner_steps * batch_size,
              f"outer_batch={outer_batch}: with val_chunks='aligned' it must be inner_steps * batch_size")
    return names


def rate(arm, step):
    """The learner's learning rate: a warm-up, then constant."""
    count = step if arm == "meta" else meta_steps + step
    share = 1.0 if arm in ("meta", "real", "oracle") else self_rate
    return share * learning_rate * min(1.0, (count + 1) / max(1, warmup))


def main():
    global common
    run = open_run(globals())
    names, corpus = run.arms_to_go(check(), ARMS), read_corpus(run, block_size)
    torch.manual_seed(seed)
    learner = GPT(GPTConfig(vocab, 1, n_layer, n_head, n_embd)).to(run.device, run.weight_dtype)
    scalars = dict(zip(SCALARS, map(torch.tensor, (math.log(kappa), math.log(kappa_a), nu))))
    critic = nn.ParameterDict(dict(E=torch.randn(vocab, n_embd), **scalars))
    critic, other = critic.to(run.device, run.weight_dtype), copy.deepcopy(learner)
    adam = torch.optim.Adam([{"params": [critic["E"]]}, {"params": [critic[s] for s in scalars]}])
    optimizers = dict(optimizer=adamw(learner, learning_rate), critic_optimizer=adam)
    of = lambda arm: {name: torch.from_numpy(a).to(critic["E"]) for name, a in TABLES[arm](corpus).items()}
    known = {arm: nn.ParameterDict(dict(critic.items(), **of(arm))) for arm in TABLES if arm in names}
    mover = dict(learner=other, optimizer=adamw(other, learning_rate))
    parts = dict(learner=learner, critic=critic, pool=Pool(run.room_for(3 * SIZE, learner)), **optimizers)
    common = commonest(corpus, EXACT).to(run.device) if vocab > EXACT else slice(None)
    phases = Phases(run, corpus, parts, dict(found=[]), read=learner, rate=rate,
                    judge=lambda: known.get(phases.arm, critic), examine=lambda: examine(phases),
                    ask=lambda *who: ask(phases, *who, meta_steps + phases.step))
    phases.begin(self_phase=("self_rate",) if inner_length else ())
    if compile:
        learner.compile()

    # ---- meta phase: real tokens are the learner's targets, then the judges of the critic
    for step in phases.meta(meta_steps):
        with run.autocast():
            if step < pretrain:
                real_step(phases, phases.text(step))
            else:
                for group, top in zip(adam.param_groups, (critic_rate, scalar_rate)):
                    group["lr"] = top * (meta_steps - step) / (meta_steps - pretrain)
                critic_step(phases, step - pretrain, mover)
    phases.drop("pool")
    if phases.snapshot is None:
        streams, probe = phases.at["streams"][:pretrain].cpu(), phases.row["agreement_probe"]
        for step in range(len(streams))[-max(MEMORY, pretrain // 5):]:  # agreement with the critic of the end
            streams[step, 1] = run.mean(ask(phases, learner, critic, step)[-1])
        phases.watch.calibrate(streams, batch_size * block_size, probe, 4 * block_size)
        phases.take_snapshot()

    # ---- self phase: the critic's signal is all that the learner learns from
    for arm in phases.arms(names):
        every = chunk if arm == "first" else 1
        for step in phases.steps(self_steps):
            text = wordings.world(phases, meta_steps + step)
            with run.autocast():
                if arm in REAL:
                    real_step(phases, text, every)
                    phases.at["real_targets"] += batch_size * block_size // every
                else:
                    signal_step(phases, arm, text, meta_steps + step)
            if arm in ("self", "ema"):
                shift_critic(phases, ema_decay if arm == "ema" else 0.0)
    last = [f for f in phases.kept["found"] if f["step"] > meta_steps - max(1, (meta_steps - pretrain) // 10)]
    found = {k: sum(f[k] for f in last) / len(last) for k in last[0] if k != "step"}
    run.say("one inner step on held-out text: " + "  ".join(f"{k} {v:.4f}" for k, v in found.items()))
    phases.finish(**found)


if __name__ == "__main__":
    main()
