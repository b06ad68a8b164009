"""
Stage 3: can the signal itself be learned, by how much learning from it helps?

    python meta_gist.py                                          # two cores, about 2 minutes
    python meta_gist.py --own=rollout --chunk=4 --n_gist=4       # chunks that the learner writes alone, compared by gists
    torchrun --standalone --nproc_per_node=8 meta_gist.py        # the same numbers on any number of ranks

The learner p_θ writes where it could have read x. The critic φ, embeddings E that start random and a sharpness κ,
praises tokens by how near they are to x, T_φ(v | x) = softmax_v κ cos(E_v, E_x):

    a(v) = trust · [T_φ(v | x) − Σ_x′ p_θ(x′) T_φ(v | x′)]       the signal; at its mean zero where own text is like true
    θ′ = θ − length · g/‖g‖,   g = ∇_θ L,  L = −Σ_v a(v) log p_θ(v)      the inner step: the learner learns from it
    O(θ′) = cross entropy of θ′ on other text                    the outer loss: did that help?
    φ ← φ − rate · dO(θ′)/dφ                                     the meta step: what would have helped more?

Nothing else tells E what to mean. trust is 1 after a true prefix; in a chunk that the learner writes alone it falls as
the gists of its text, a_i, and of the true one, b_i, come apart: exp −η Σ_i (1 − cos(a_i, b_i)), with η in φ too.

In the code: theta, phi, the signal a, the gradient g, the direction u = g/‖g‖, lam = ∇O(θ′), and w, which is lam pulled
back through the step. An arm is one self phase: θ moves by g alone. Its critic is φ as the meta phase left it (frozen),
φ moved as far as the learner has moved since (self) or by a moving average of that (ema). The arms first and frozen_first
are real and frozen on the first token of each chunk alone: what chunks are worth is what is learned beyond them.
"""
import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, grad_and_value, jvp, vjp

from configurator import chosen_arms, configure, read_bottleneck, read_meta_phase, refuse
from model import GIST, GPT, OWN, OWN_GIST, TRUE, GPTConfig, adamw, attention_mask, rollout, sample_tokens
from plot import draw_runs
from prepare_data import (batch_starts, corpus_id, decode, get_batch, open_corpus, planted_answers, prepare, val_windows,
                          windows)
from watch import MEMORY, STREAMS, Gold, Watch, new_track, note, summarise, track_gold, write_report, write_row

# --- experiment
arms = "real,frozen,self,ema,shuffled,sharpen"  # any of these, and first, frozen_first
meta_steps = 600        # steps of the meta phase: the learner's, then the critic's
pretrain = 400          # of these, steps of the learner alone, on real text; the rest trains the critic
self_steps = 500        # steps of each arm, with the critic's signal
hack_margin = 0.1       # nats above the best gold, three evaluations running, that count as hacked
# --- the signal
own = "dense"           # "dense" | "rollout": one own token after every true prefix; or chunks that it writes alone
chunk = 1               # tokens that the learner writes alone, from a true prefix
n_gist = 1              # gists of a chunk; gist j reads the j-th part of it
gist_layer = 0          # blocks that a gist passes through; 0: it is the mean of its tokens' embeddings
gist_b = "truth"        # "truth" | "own+truth": what the gist of the observation reads
samples = 1             # rollouts for each observation
zero_mean = True        # subtract what the critic says when it reads own text in the observation's place
kappa = 1.0             # sharpness that the critic starts with
eta = 10.0              # distrust of what comes after the texts have parted, that the critic starts with
critic_from = ""        # the folder of a run of gist_bottleneck.py whose embeddings and blocks the critic starts with
# --- second order
inner_steps = 1         # steps that the learner takes before the outer loss judges
rule = "fixed"          # "fixed" | "proportional" | "sgd": an inner step is as long as length, times ‖θ‖, times ‖g‖
length = 0.05           # length of an inner step, in the norm of all weights
mixed = "forward"       # "forward" | "difference" | "graph": how ∂⟨∇L, w⟩ is computed; graph is the reference
val_chunks = "random"   # "next" | "random" | "similar": which text judges: what follows, any, or the nearest by gists
index_every = 100       # meta steps after which the index of gists is made anew, for val_chunks = "similar"
outer_batch = 64        # sequences that judge
critic_rate = 0.1       # Adam's learning rate of φ, falling to 0 in a line; the embeddings have entries of about 1
scalar_rate = 0.03      # the same of log κ and log η
pool = 4                # learners that the critic is trained on, in turn
pool_self = 0.5         # share of them that move by the signal; the others move by real text
pool_steps = 100        # steps after which a learner of the pool starts again; sooner if its gold is hacked
# --- self phase
self_rate = 1.0         # learning rate of the self phase, as a share of learning_rate
ema_decay = 0.999       # arm ema: the share by which the critic stays behind the learner, each step
# --- model
n_layer = 2             # blocks
n_head = 4              # heads in each
n_embd = 64             # width
block_size = 32         # text tokens in a sequence
# --- data
dataset = "plays"       # plays, tinyshakespeare, fineweb-edu, or a text file or folder of your own
vocab = 512             # tokens: 256 is plain bytes, 50257 is GPT-2's, any other a BPE trained on the corpus
train_tokens = 0        # use only the first so many training tokens, repeated; 0 is all
# --- optimisation
batch_size = 16         # sequences a step, over all ranks
learning_rate = 1e-3    # AdamW, constant after the warm-up
warmup = 50             # steps from 0 to learning_rate
grad_clip = 1.0         # largest gradient norm
# --- run
seed = 1                # of weights and data
eval_interval = 25      # steps between two lines of the log
eval_windows = 128      # held-out sequences that gold is measured on
save_interval = 200     # steps between two checkpoints
device = "auto"         # "auto" | "cuda" | "mps" | "cpu": auto takes the first that is there
dtype = "float32"       # "float32" | "bfloat16" | "float64": bfloat16 is autocast over float32 weights
compile = False         # torch.compile of the gradients; minutes before the first steps, then faster
out_dir = "out/meta_gist"  # the run's folder; an earlier run there is moved aside
resume = ""             # the folder of a run to go on with
start = ""              # the folder of a run whose finished meta phase to start from, instead of one's own
wandb_log = "no"        # "no" | "online" | "offline": also log to Weights & Biases

ARMS = ("self", "frozen", "ema", "real", "first", "frozen_first", "shuffled", "sharpen")
REAL = ("real", "first")  # arms with real targets
FIRST = ("first", "frozen_first")  # arms that learn of the first token of a chunk alone, which follows a true prefix
# Settings that the meta phase does not read: with `start`, the others must be those of the run started from.
SELF_PHASE = ("arms", "self_steps", "hack_margin", "self_rate", "ema_decay", "eval_interval",
              "eval_windows", "save_interval", "device", "compile", "out_dir", "resume", "start", "wandb_log")
# Independent streams of data and of random numbers.
TEXT, FOREIGN, CHANCE, OUTER, INNER, PROBE, MEASURE = range(7)
SCALARS = ("log_eta", "log_kappa")  # of the critic, beside its network
PIECE = 16    # tokens of a piece of text that has a gist in the index
NEAR = 30000  # tokens apart that may still be the same play


# ----------------------------------------------------------------------------------------------
# what the learner says, and what the critic makes of it

def kernel(phi, gists):
    """T(v | gist) = softmax_v κ cos(E_v, gist), for gists [..., C]: [..., V]. What the critic praises, given a gist."""
    unit = lambda t: F.normalize(t, dim=-1)
    return (phi["log_kappa"].exp() * unit(gists) @ unit(phi["embed.weight"][:vocab]).T).softmax(-1)


def write(learner, theta, x, u):
    """What the learner says in the observation's place, on x [B, T]: R own texts y, int [B, R, T], each chunk written
    alone after the true text before it, by the uniform numbers u [B, R, T]. With own = "dense" it is None: the learner's
    distribution after every true prefix stands for all that it might have said there.
    """
    if own == "dense":
        return None
    call = lambda tokens, **options: functional_call(learner, theta, (tokens,), options)
    starts = torch.arange(1, block_size + 1, chunk, device=x.device)
    u = u.flatten(0, 1).unflatten(1, (len(starts), chunk))
    return rollout(call, x.repeat_interleave(samples, 0), starts, chunk, u).view(x.size(0), samples, -1)


def speak(learner, theta, x, u):
    """(y, p): what the learner says and its distribution there, [B, R, T, V] at each own token, or [B, T, V]."""
    y = write(learner, theta, x, u)
    return y, log_p(learner, theta, x, y).exp()


def layout(device, gists):
    """(kind, chunk, position), int [L] each, of what the packed sequences hold; see `attention_mask`.

    The learner's: true tokens 0 to T − 1, then each chunk's own tokens but its last. The critic's, gists = True: true
    tokens 0 to T, all own tokens, then the gists of own chunks and of true ones, each at the end of what it reads.
    """
    T, long, span = block_size, chunk if gists else chunk - 1, chunk // n_gist
    start = 1 + chunk * torch.arange(T // chunk, device=device)[:, None]
    own_pos = (start + torch.arange(long, device=device)).flatten()
    parts = [(TRUE, torch.arange(T + gists, device=device)), (OWN, own_pos)]
    if gists:
        end = (start + span * torch.arange(1, n_gist + 1, device=device) - 1).flatten()
        parts += [(OWN_GIST, end), (GIST, end)]
    kind = torch.cat([torch.full_like(p, k) for k, p in parts])
    pos = torch.cat([p for _, p in parts])
    return kind, (pos + chunk - 1) // chunk, pos


def log_p(learner, theta, x, y, **options):
    """log p_θ(v) at every own position: [B, R, T, V] after own prefixes, [B, T, V] after true ones if y is None."""
    if y is None:
        return functional_call(learner, theta, (x,), options).log_softmax(-1)
    (B, R, T), n = y.shape, block_size // chunk
    kind, chunks, pos = layout(x.device, False)
    last = y.view(B * R, n, chunk)[..., :-1].flatten(1)
    packed = torch.cat((x.repeat_interleave(R, 0), last), 1)
    first = chunk * torch.arange(n, device=x.device)[:, None]                # the true token before each chunk, then own
    then = T + torch.arange(last.size(1), device=x.device).view(n, chunk - 1)
    options.update(pos=pos, mask=attention_mask(kind, chunks, pos), read=torch.cat((first, then), 1).flatten())
    return functional_call(learner, theta, (packed,), options).log_softmax(-1).view(B, R, T, -1)


def gists(critic, phi, w, y):
    """(b, a), [B, R, T / span, C] each: gists of the true chunks and of the own ones, all chunks of all texts at once.

    A gist starts as the mean of the embeddings of its part of the chunk, and the blocks add the context.
    """
    (B, R, T), table, span = y.shape, phi["embed.weight"], chunk // n_gist
    mean = lambda tokens: table[tokens].unflatten(-2, (-1, span)).mean(-2)   # [..., T, C] -> [..., T / span, C]
    b, a = mean(w[:, 1:])[:, None].expand(-1, R, -1, -1), mean(y)
    if gist_layer == 0:
        return b, a
    kind, chunks, pos = layout(w.device, True)
    mark = table[vocab:].repeat(T // chunk, 1)                               # gist j of each chunk has row vocab + j
    tokens = torch.cat((w[:, None].expand(-1, R, -1), y), 2)
    packed = torch.cat((table[tokens], a + mark, b + mark), 2).flatten(0, 1)
    mask = attention_mask(kind, chunks, pos, gist_b == "own+truth")
    body = {k: v for k, v in phi.items() if k not in SCALARS}
    out = functional_call(critic, body, (packed,), dict(pos=pos, mask=mask, fused=False, residual=gist_layer))
    a, b = out.view(B, R, len(pos), -1)[:, :, -2 * mark.size(0):].chunk(2, 2)
    return b, a


def trust(critic, phi, w, y):
    """exp −η Σ (1 − cos(a_i, b_i)) over the gists i of its chunk before it, [B, R, T, 1]: what is observed tells of an
    own token the less, the farther the own text and the true one have come apart before it."""
    b, a = gists(critic, phi, w, y)
    apart = (1 - F.cosine_similarity(a, b, dim=-1)).unflatten(-1, (-1, n_gist))
    before = (apart.cumsum(-1) - apart).flatten(-2).repeat_interleave(chunk // n_gist, -1)
    return (-phi["log_eta"].exp() * before).exp()[..., None]


def signal(critic, phi, w, seen, said):
    """a(v), praise and blame for each token that the learner might say: [B, T, V], or [B, R, T, V] of R own texts.

    seen: the observation, int [B, T]; said: (y, p) of the learner. Subtracted is what the critic makes of the learner's
    own next token in the observation's place, exactly: Σ_x′ p(x′) T(v | x′) needs T of every token once, [V, V].
    """
    (y, p), table = said, kernel(phi, phi["embed.weight"][:vocab])
    praise = table[seen] if y is None else table[seen][:, None]
    a = praise - p @ table if zero_mean else praise.expand_as(p)
    return a if y is None else trust(critic, phi, torch.cat((w[:, :1], seen), 1), y) * a


# ----------------------------------------------------------------------------------------------
# second order, in the order of its equations: pure functions of theta and phi, dicts of tensors by name

def inner_loss(a, logp):
    """L = −Σ_v a(v) log p_θ(v), nats, mean over own positions."""
    return -(a * logp).sum(-1).mean()


def cross_entropy(learner, theta, w, every=1, **options):
    """Nats a token of text w [B, T + 1], or of each `every`-th token of it: the outer loss, and the real arms'."""
    logits = functional_call(learner, theta, (w[:, :-1],), options)
    return F.cross_entropy(logits[:, ::every].flatten(0, 1), w[:, 1::every].flatten())


def dot(a, b):
    return sum((a[n] * b[n]).sum() for n in a)


def add(a, b, scale=1.0):
    return {n: a[n] + scale * b[n] for n in a}


def inner_gradient(nets, theta, phi, batch, u, average, every=1):
    """(what the learner says, a, g = ∇_θ L averaged over ranks, L). batch: (w, seen); u: see `write`.

    L is of each `every`-th own token, and g with it; what is said, and a, are of all.
    """
    y = write(nets[0], theta, batch[0][:, :-1], u)
    g, (loss, (p, a)) = signal_gradient(nets, theta, phi, batch, y, every)
    average(list(g.values()))
    return (y, p), a, g, loss


def signal_gradient(nets, theta, phi, batch, y, every):
    """(∇_θ L on this rank, (L, (p, a))), of own texts y."""
    (learner, critic), (w, seen) = nets, batch

    def loss(th):
        logp = log_p(learner, th, w[:, :-1], y)
        p = logp.detach().exp()
        a = signal(critic, phi, w, seen, (y, p))
        return inner_loss(a[..., ::every, :], logp[..., ::every, :]), (p, a)
    return grad_and_value(loss, has_aux=True)(theta)


def text_gradient(learner, theta, w, every=1):
    """(∇_θ of the cross entropy of text w on this rank, nats a token)."""
    return grad_and_value(lambda th: cross_entropy(learner, th, w, every))(theta)


def inner_step(theta, g):
    """θ′ = θ − length · u, with u = g/‖g‖; proportional: length · ‖θ‖; sgd: length · ‖g‖. g is averaged by now."""
    if rule == "sgd":
        return add(theta, g, -length)
    far = length * dot(theta, theta).sqrt() if rule == "proportional" else length
    return add(theta, g, -far / dot(g, g).sqrt().clamp_min(1e-30))


def pull_back(theta, g, lam):
    """(w, λ) before an inner step: w = −(length/‖g‖)(λ − u⟨u, λ⟩), by which L enters; and λ, with what ‖θ‖ adds."""
    if rule == "sgd":
        return {n: -length * lam[n] for n in lam}, lam
    norm = dot(g, g).sqrt().clamp_min(1e-30)
    along = dot(g, lam) / norm                                   # ⟨u, λ⟩
    size = dot(theta, theta).sqrt() if rule == "proportional" else 1.0
    w = {n: -length * size / norm * (lam[n] - g[n] * along / norm) for n in lam}
    return w, add(lam, theta, -length * along / size) if rule == "proportional" else lam


def mixed_product(nets, theta, phi, batch, y, w, by_theta):
    """(∂ ⟨∇_θ L(θ, φ), w⟩ by θ, or None unless by_theta; by φ), each by name.

    ⟨∇_θ L, w⟩ = −Σ_v a(v) ℓ̇(v), with ℓ = log p and ℓ̇ how it moves along w. By φ it is the derivative of a alone, to
    first order. By θ it is that of ℓ̇, and of a, for the critic reads p: one pull-back of both slopes through (ℓ, ℓ̇).
    Forward mode is exact; the difference needs first order only, so it runs with any attention kernel. The tokens y
    are data.
    """
    (learner, critic), (text, seen) = nets, batch
    eps = torch.finfo(dot(w, w).dtype).eps ** (1 / 3) * (dot(theta, theta) / dot(w, w).clamp_min(1e-30)).sqrt()

    def along(th):
        """(ℓ, ℓ̇) at th."""
        f = lambda moved, **options: log_p(learner, moved, text[:, :-1], y, **options)
        if mixed == "forward":
            return jvp(lambda moved: f(moved, fused=False), (th,), (w,))
        ahead, behind = f(add(th, w, eps)), f(add(th, w, -eps))
        return (ahead + behind) / 2, (ahead - behind) / (2 * eps)

    def heard(logp, ph):
        a = signal(critic, ph, text, seen, (y, logp.exp()))
        return inner_loss(a, moves), a
    if not by_theta:
        logp, moves = along(theta)
        return None, grad(heard, 1, has_aux=True)(logp, phi)[0]
    (logp, moves), pull = vjp(along, theta)
    (by_logp, by_phi), a = grad(heard, (0, 1), has_aux=True)(logp, phi)
    return pull((by_logp, -a * vocab / a.numel()))[0], by_phi


def meta_step(nets, theta, phi, batches, chances, outer, average):
    """(dφ, O(θ_S), θ_S, (said, a, g, L) of the first step): how φ should have moved S inner steps, so that O had been lower.

    batches: (w, seen) of each step; chances: its uniform numbers; outer: text w that judges. average: of a list of
    tensors over ranks, in place. g, ∇O and the mixed products are linear in what each rank sees: averaged, N ranks
    compute what one does. The average of each rank's own dφ would be another thing.
    """
    trail = []
    for batch, u in zip(batches, chances):                       # of each step are kept θ_k, g_k and the own tokens
        said, a, g, inner = inner_gradient(nets, theta, phi, batch, u, average)
        heard = heard if trail else (said, a, g, inner)
        trail.append((theta, g, batch, said[0]))
        theta = inner_step(theta, g)
    if mixed == "graph":
        dphi, loss = grad_and_value(unrolled, 2)(nets, trail[0][0], phi, trail, outer)
        return dphi, loss, theta, heard
    lam, loss = text_gradient(nets[0], theta, outer)             # λ = ∇O(θ_S)
    average(list(lam.values()))
    dphi = {n: torch.zeros_like(p) for n, p in phi.items()}
    for k, (before, g, batch, y) in reversed(list(enumerate(trail))):
        w, lam = pull_back(before, g, lam)
        by_theta, by_phi = mixed_product(nets, before, phi, batch, y, w, k > 0)
        average([*by_phi.values(), *(by_theta or {}).values()])
        dphi = add(dphi, by_phi)                                 # dφ += ∂_φ ⟨∇_θ L(θ_k, φ), w⟩
        lam = add(lam, by_theta) if by_theta else lam            # λ  += ∂_θ ⟨∇_θ L(θ_k, φ), w⟩
    return dphi, loss, theta, heard


def unrolled(nets, theta, phi, trail, outer):
    """O(θ_S) as one function of φ, for the textbook's derivative: the whole unroll is kept as a graph. One rank only."""
    learner, critic = nets
    for _, _, (w, seen), y in trail:
        x = w[:, :-1]
        a = signal(critic, phi, w, seen, (y, log_p(learner, theta, x, y, fused=False).exp()))
        g = grad(lambda th: inner_loss(a, log_p(learner, th, x, y, fused=False)))(theta)
        theta = inner_step(theta, g)
    return cross_entropy(learner, theta, outer, fused=False)


# ----------------------------------------------------------------------------------------------
# data

def text(run, tokens, at, stream, rows, follow=0):
    """This rank's rows of a step's text and of what follows, int [rows / ranks, (1 + follow) T + 1]."""
    return get_batch(tokens, seed, at, rows, (1 + follow) * block_size + 1, run.rank, run.ranks, stream).to(run.device)


def train_tokens_of(corpus):
    return corpus.train[:train_tokens] if train_tokens else corpus.train


def train_text(run, corpus, at, stream=TEXT, rows=None, follow=0):
    return text(run, train_tokens_of(corpus), at, stream, rows or batch_size, follow)


def chance(run, at, stream=CHANCE, rows=None):
    """This rank's rows of uniform numbers [B, samples, T] in [0, 1), a pure function of (seed, step)."""
    share = (rows or batch_size) // run.ranks
    shape = (rows or batch_size, samples, block_size)
    numbers = np.random.default_rng([seed, stream, at]).random(shape, dtype=np.float32)
    return torch.from_numpy(numbers[run.rank * share:(run.rank + 1) * share]).to(run.device)


def meta_batch(run, corpus, at, index, tally):
    """([(w, seen)] of each inner step, [its uniform numbers], outer text): what a meta step reads."""
    follow = outer_batch // batch_size if val_chunks == "next" else 0
    last, tokens = (at + 1) * inner_steps - 1, train_tokens_of(corpus)
    w = [train_text(run, corpus, k, INNER, follow=follow) for k in range(at * inner_steps, last + 1)]
    if val_chunks == "next":  # what follows the last step's text
        outer = w[-1][:, block_size:].unfold(1, block_size + 1, block_size).flatten(0, 1)
    elif val_chunks == "similar":
        starts = batch_starts(tokens, seed, last, batch_size, block_size + 1, run.rank, run.ranks, INNER)
        found = nearest(index, torch.from_numpy(starts), outer_batch // batch_size, len(tokens))
        near = (found - torch.from_numpy(starts)[:, None]).abs() < NEAR
        tally["picks_near"] = tally.get("picks_near", 0) + near.float().mean().to(run.device)
        outer = windows(tokens, found.flatten().numpy(), block_size + 1).to(run.device)
    else:
        outer = train_text(run, corpus, at, OUTER, outer_batch)
    inner = [t[:, :block_size + 1] for t in w]
    return [(t, t[:, 1:]) for t in inner], [chance(run, k, INNER) for k in range(at * inner_steps, last + 1)], outer


def make_index(tokens, table):
    """Gists of all pieces of `tokens`, unit vectors [n, C] about their mean; table: the critic's embeddings."""
    n = len(tokens) // PIECE
    pieces = torch.from_numpy(tokens[:n * PIECE].astype(np.int64)).view(n, PIECE)
    means = F.embedding_bag(pieces, table.detach().float().cpu(), mode="mean")
    return F.normalize(means - means.mean(0), dim=-1)


def nearest(index, starts, n, length, block=65536):
    """Starts [B, n] of the texts around the n pieces that are most like any piece of the texts that begin at starts [B].

    Exact: every piece is compared, a block of them at a time. None overlaps the text that asks.
    """
    own_pieces = (starts[:, None] + PIECE - 1) // PIECE + torch.arange(block_size // PIECE)          # wholly inside
    asks = index[own_pieces.clamp(max=len(index) - 1)]                                               # [B, pieces, C]
    around = (PIECE * torch.arange(len(index)) - (block_size - PIECE) // 2).clamp(0, length - block_size - 1)
    best, which = torch.full((len(starts), n), -math.inf), torch.zeros(len(starts), n, dtype=torch.long)
    for i in range(0, len(index), block):
        score = (asks @ index[i:i + block].T).amax(1)
        score[(around[i:i + block] - starts[:, None]).abs() <= block_size] = -math.inf
        best, order = torch.cat((best, score), 1).topk(n)
        which = torch.cat((which, torch.arange(i, i + score.size(1)).expand(len(starts), -1)), 1).gather(1, order)
    return around[which]


# ----------------------------------------------------------------------------------------------
# steps

def weights(module, names=None):
    return {n: p.detach() for n, p in module.named_parameters() if names is None or n in names}


def read_by(critic):
    """Names of the critic's parameters that its gists are made with: φ."""
    used = ("embed.weight", "log_kappa", *(f"blocks.{k}." for k in range(gist_layer)), *["log_eta"] * (own == "rollout"))
    return [n for n, _ in critic.named_parameters() if n.startswith(used)]


def take_step(run, module, optimizer, g, tally=None):
    """Clip, step. g: gradient by name, averaged over ranks."""
    for n, p in module.named_parameters():
        p.grad = g[n].clone() if n in g else None
    norm = torch.nn.utils.clip_grad_norm_([p for p in module.parameters() if p.grad is not None], grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if tally is not None:
        tally["grad_norm"] = tally.get("grad_norm", 0) + norm


def real_gradient(run, learner, theta, w, every=1):
    """(∇ of the cross entropy of text w averaged over ranks, nats a token), of each `every`-th token."""
    g, loss = text_gradient(learner, theta, w, every)
    run.average(list(g.values()))
    return g, loss


def pretrain_step(run, corpus, nets, optimizer, step, tally):
    """The learner learns from real text, as in the arm real."""
    learner, w = nets[0], train_text(run, corpus, step)
    g, loss = real_gradient(run, learner, weights(learner), w)
    note_step(tally, loss, learner(w[:, :-1]).detach(), w[:, 1:], F.one_hot(w[:, 1:], vocab))
    take_step(run, learner, optimizer, g, tally)


def train_critic(run, corpus, nets, optimizers, at, library, tally):
    """A meta step at the learner of the pool whose turn it is; then that learner takes a step, as the arms do.

    at["pool"]: [{"learner", "optimizer", "age", "best"}], empty where a learner starts anew from the pretrained one. A
    critic trained at one learner that never moves memorises one good direction; trained only where real steps lead, it
    does not know where its own signal leads.
    """
    turn, (learner, critic), (mover, moves) = at["critic_step"] % pool, nets, library["mover"]
    member = at["pool"][turn]
    if not member:
        member.update(learner=learner.state_dict(), optimizer=copy.deepcopy(optimizers[0].state_dict()), age=0,
                      best=math.inf)
    mover.load_state_dict(member["learner"])
    moves.load_state_dict(member["optimizer"])
    theta, phi = weights(mover), weights(critic, read_by(critic))
    if val_chunks == "similar" and at["critic_step"] % index_every == 0:
        at["index_from"], library["index"] = phi["embed.weight"][:vocab].clone(), None
    if val_chunks == "similar" and library["index"] is None:  # a resumed run makes it again from what it was made from
        library["index"] = make_index(train_tokens_of(corpus), at["index_from"])
    batches, chances, outer = meta_batch(run, corpus, at["critic_step"], library["index"], tally)
    dphi, judged, _, (said, a, g, loss) = meta_step(nets, theta, phi, batches, chances, outer, run.average)
    w = batches[0][0]
    note_step(tally, loss, speak_true(learner, theta, w, said), w[:, 1:], a)
    take_step(run, critic, optimizers[1], dphi, tally)
    take_step(run, mover, moves, real_gradient(run, learner, theta, w)[0] if turn >= round(pool * pool_self) else g)
    judged = run.mean(judged)
    member.update(learner=copy.deepcopy(mover.state_dict()), optimizer=moves.state_dict(), age=member["age"] + 1,
                  best=min(member["best"], judged))
    if member["age"] >= pool_steps or judged > member["best"] + 2 * hack_margin:
        at["restarts"] += member["age"] < pool_steps
        member.clear()
    at["critic_step"] += 1


def speak_true(learner, theta, w, said):
    """log p [B, T, V] after true prefixes, which is what was said if that is dense."""
    if said[0] is None:
        return said[1].log()
    with torch.no_grad():
        return functional_call(learner, theta, (w[:, :-1],)).log_softmax(-1)


def set_critic_rate(optimizer, at):
    """Rates of the critic's matrices and scalars at a step of the meta phase."""
    for group, rate in zip(optimizer.param_groups, (critic_rate, scalar_rate)):
        group["lr"] = rate * (meta_steps - at) / max(1, meta_steps - pretrain)


def set_rate(optimizer, at, share=1.0):
    """The learner's rate at a step, counted from the start of the meta phase."""
    for group in optimizer.param_groups:
        group["lr"] = share * learning_rate * min(1.0, (at + 1) / max(1, warmup))


def observed(run, corpus, arm, nets, theta, w, at, u):
    """What the critic reads as the observation: the truth, another text's (shuffled), or the learner's own (sharpen)."""
    if arm == "shuffled":
        return train_text(run, corpus, at, FOREIGN)[:, 1:]
    if arm != "sharpen":
        return w[:, 1:]
    y, p = speak(nets[0], theta, w[:, :-1], u)
    return sample_tokens(p.log(), u[:, 0]) if y is None else y[:, 0]


def arm_step(run, corpus, arm, nets, optimizer, step, tally):
    """One step of the learner in an arm: the gradient of the signal (or of real cross entropy), then the step."""
    learner, critic = nets
    at, theta = meta_steps + step, weights(learner)
    w, u = train_text(run, corpus, at), chance(run, at)
    with run.autocast():
        seen = observed(run, corpus, arm, nets, theta, w, at, u)
        said, a, g, loss = signal_or_real(run, arm, nets, theta, (w, seen), u)
        note_step(tally, loss, speak_true(learner, theta, w, said), w[:, 1:], a)
    take_step(run, learner, optimizer, g, tally)


def signal_or_real(run, arm, nets, theta, batch, u):
    """As `inner_gradient`; for the real arms the gradient is the cross entropy's, and a names the truth."""
    every = chunk if arm in FIRST else 1
    if arm not in REAL:
        return inner_gradient(nets, theta, weights(nets[1], read_by(nets[1])), batch, u, run.average, every)
    w, seen = batch
    g, loss = real_gradient(run, nets[0], theta, w, every)
    said = None, log_p(nets[0], theta, w[:, :-1], None).exp()
    return said, F.one_hot(seen, vocab), g, loss


def follow(arm, nets, snapshot):
    """The critic of the arms self and ema is the learner plus what the meta phase made it differ by, now or on average:
    φ moves as far as the learner has moved from the snapshot, at once (self) or by 1 − ema_decay of the way a step."""
    decay = ema_decay if arm == "ema" else 0.0
    theta = dict(nets[0].named_parameters())
    with torch.no_grad():
        for n, p in nets[1].named_parameters():
            if n in read_by(nets[1]) and n not in SCALARS:
                rows = slice(vocab) if n == "embed.weight" else slice(None)
                goal = snapshot["critic"][n][rows] + theta[n][rows] - snapshot["learner"][n][rows]
                p[rows].lerp_(goal, 1 - decay)


def start_arm(snapshot, nets, optimizer, watch):
    """Puts everything back to the end of the meta phase; the optimizer too, for a fresh one would hack by itself."""
    nets[0].load_state_dict(snapshot["learner"])
    nets[1].load_state_dict(snapshot["critic"])
    optimizer.load_state_dict(copy.deepcopy(snapshot["optimizer"]))
    watch.load_state_dict(snapshot["watch"])


# ----------------------------------------------------------------------------------------------
# the report

@torch.no_grad()
def note_step(tally, loss, logits, obs, a):
    """Adds a step to the tally: see `note`.

    logits [B, T, V]: the learner's after true prefixes. a: what the critic said, [B, T, V] or [B, R, T, V].
    """
    logp, told = logits.log_softmax(-1), a.argmax(-1).view(obs.size(0), -1, obs.size(1))
    agreement, echo = (told == obs[:, None]).float().mean(), (told == logp.argmax(-1)[:, None]).float().mean()
    note(tally, loss, logp, obs, agreement, told, echo=echo)


def measure(run, corpus, nets, theta, phi, at):
    """One inner step on held-out text, of outer_batch texts, so that the signal is seen and not a batch's noise.

    gain: nats a token that it takes off other held-out text; gain_shuffled: with another text's observation; gain_real:
    with real targets; all equally long. cosine_real: of the signal's gradient with the real one; cos_bb, cos_bb_real: of
    each with its like on other text: a critic that has memorised one good direction is caught by it.
    """
    w, again, foreign, other = (text(run, corpus.val, at, MEASURE + k, outer_batch) for k in range(4))
    u = chance(run, at, MEASURE, outer_batch)
    own_g, shuffled, own_again = (inner_gradient(nets, theta, phi, batch, u, run.average)[2]
                                  for batch in ((w, w[:, 1:]), (w, foreign[:, 1:]), (again, again[:, 1:])))
    real, real_again = (real_gradient(run, nets[0], theta, t)[0] for t in (w, again))
    cos = lambda a, b: dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().clamp_min(1e-30)
    before, found = cross_entropy(nets[0], theta, other), {}
    for name, g in dict(gain=own_g, gain_shuffled=shuffled, gain_real=real).items():
        as_long = (dot(own_g, own_g) / dot(g, g).clamp_min(1e-30)).sqrt()
        moved = inner_step(theta, {n: t * as_long for n, t in g.items()})
        found[name] = before - cross_entropy(nets[0], moved, other)
    found.update(cosine_real=cos(own_g, real), cos_bb=cos(own_g, own_again), cos_bb_real=cos(real, real_again))
    run.average(list(found.values()))
    return {name: value.item() for name, value in found.items()}


def precision(phi, corpus):
    """Where each token is known to have m − 1 others of its meaning: their share among its m − 1 nearest, by cosine.

    Mean over the tokens of the training text, of all tokens that occur there.
    """
    m = getattr(corpus.encoding, "spellings", 1)
    if m == 1:
        return {}
    unit = F.normalize(phi["embed.weight"][:vocab], dim=-1)
    often = torch.from_numpy(np.bincount(train_tokens_of(corpus), minlength=vocab)).to(unit)
    alike = (unit @ unit.T).fill_diagonal_(-2).masked_fill(often == 0, -2)
    meaning = torch.arange(vocab, device=unit.device) // m
    hits = (meaning[alike.topk(m - 1).indices] == meaning[:, None]).to(unit).mean(-1)
    return dict(precision=(hits @ often / often.sum()).item())


def stored_probe(run, corpus):
    """(own, obs), int [4, T] both: random strings beside held-out text, on which a critic can be asked at any time."""
    w = val_windows(corpus.val, 4, block_size + 1)
    said = np.random.default_rng([seed, PROBE]).integers(0, vocab, (4, samples, block_size))
    return torch.from_numpy(said).to(run.device), w.to(run.device)


@torch.no_grad()
def praised(nets, phi, theta, w, seen, y=None):
    """argmax a, int [B, R, T]: the token praised most. y: own tokens [B, R, T] in place of what the learner says."""
    if y is None:
        u = torch.full((w.size(0), samples, block_size), 0.5, device=w.device)
        said = speak(nets[0], theta, w[:, :-1], u)
    else:
        p = F.one_hot(y, vocab).to(phi["embed.weight"].dtype)
        said = (None, p[:, 0]) if own == "dense" else (y, p)
    return signal(nets[1], phi, w, seen, said).argmax(-1).view(w.size(0), -1, block_size)


def judge_again(run, corpus, nets, streams):
    """Agreement, the second of the streams [pretrain, 3], as the critic has it in the end, on the last texts."""
    theta, phi = weights(nets[0]), weights(nets[1], read_by(nets[1]))
    for step in range(max(0, len(streams) - MEMORY), len(streams)):
        w = train_text(run, corpus, step)
        told = praised(nets, phi, theta, w, w[:, 1:])
        streams[step, 1] = run.mean((told == w[:, None, 1:]).float().mean())


def questions(run, corpus, most=512):
    """Of planted-facts: int [n, T + 1], training texts that end at the answer to a question, or None of other corpora.

    The fact stands thousands of tokens before, so that the answer must have been learned, and not read.
    """
    if dataset != "planted-facts":
        return None
    tokens = train_tokens_of(corpus)
    ends = planted_answers(tokens, corpus)[:, 0]
    ends = ends[ends >= block_size]
    starts = ends[::max(1, len(ends) // most)][:most] - block_size
    return windows(tokens, starts, block_size + 1).to(run.device)


@torch.no_grad()
def answered(learner, asked):
    """{"answers": share that the learner names right, "answers_nats": cross entropy of the answers}; see `questions`."""
    if asked is None:
        return {}
    logits = learner(asked[:, :-1])[:, -1]
    return dict(answers=(logits.argmax(-1) == asked[:, -1]).float().mean().item(),
                answers_nats=F.cross_entropy(logits, asked[:, -1]).item())


def examine(nets, probe):
    """How the critic stands, {agreement_probe, kappa, eta}, and what the learner `answered`."""
    said, w, asked = probe
    phi = weights(nets[1], read_by(nets[1]))
    told = praised(nets, phi, None, w, w[:, 1:], said)
    return dict(agreement_probe=(told == w[:, None, 1:]).float().mean().item(), kappa=phi["log_kappa"].exp().item(),
                eta=phi["log_eta"].exp().item() if "log_eta" in phi else None, **answered(nets[0], asked))


@torch.no_grad()
def write_samples(run, arm, nets, corpus):
    """samples.txt: what the learner writes after a held-out prompt, what the critic praises, and what it finds alike."""
    w = val_windows(corpus.val, 2, block_size + 1).to(run.device)
    u = torch.from_numpy(np.random.default_rng(seed).random((2, 1, block_size), dtype=np.float32)).to(run.device)
    written = rollout(nets[0], w[:, :-1], [block_size], block_size, u)[:, 0]
    phi = weights(nets[1], read_by(nets[1]))
    own_tokens = nets[0](w[:, :-1]).argmax(-1)
    told = praised(nets, phi, weights(nets[0]), w, w[:, 1:])[:, 0]
    show = lambda ids: repr(decode(corpus.encoding, ids.tolist()))
    frequent = torch.bincount(w.flatten(), minlength=vocab).topk(min(8, vocab)).indices
    near = kernel(phi, phi["embed.weight"][frequent]).topk(min(4, vocab)).indices
    run.sample(f"==== after {arm}\n" + "".join(
        f"prompt       {show(w[i, :-1])}\ngoes on      {show(written[i])}\n"
        f"own output   {show(own_tokens[i])}\nobservation  {show(w[i, 1:])}\ncritic praises {show(told[i])}\n\n"
        for i in range(2)) + "alike to the critic: " + "; ".join(
        " ".join(show(t.view(1)) for t in row) for row in near) + "\n\n")


@torch.no_grad()
def report(run, arm, step, why, watch, nets, snapshot, corpus, row):
    """hacks/NNN.md: cross-examines the critic and the outputs of now and of the snapshot, on the text that comes next.

    Agreement is the share of positions at which the observation is what the critic praises most. Returns what
    `write_report` does.
    """
    w, u = train_text(run, corpus, meta_steps + step), chance(run, meta_steps + step)
    learners = dict(then=snapshot["learner"], now=weights(nets[0]))
    critics = dict(then={n: snapshot["critic"][n] for n in read_by(nets[1])}, now=weights(nets[1], read_by(nets[1])))
    outputs = {k: functional_call(nets[0], theta, (w[:, :-1],)).argmax(-1) for k, theta in learners.items()}
    judged, named = {}, {}
    for c, phi in critics.items():
        for o, theta in learners.items():
            seen = observed(run, corpus, arm, nets, theta, w, meta_steps + step, u)
            named[c, o] = praised(nets, phi, theta, w, seen)
            judged[c, o] = run.mean((named[c, o] == w[:, None, 1:]).float().mean())
    texts = {k: tuple(t[0].tolist() for t in (outputs[k], w[:, 1:], named[k, k][:, 0])) for k in outputs}
    shares = {"praised tokens equal to the observation": row["agreement"],
              "praised tokens equal to the own output": row["echo"],
              "praised tokens that are the most frequent one": row["target_top"],
              "entropy of the praised tokens (nats)": row["target_entropy"],
              "entropy of the output (nats)": row["output_entropy"], "gold (nats)": row["gold_nats"]}
    return write_report(run, arm, step, why, watch.order(), judged, texts, shares, corpus.encoding)


# ----------------------------------------------------------------------------------------------
# the run

def check(ranks):
    """The arms by name. Refuses settings that cannot be."""
    names = chosen_arms(arms, ARMS)
    if pretrain > meta_steps:
        refuse(f"pretrain={pretrain} must be at most meta_steps={meta_steps}, of which it is a part")
    if own == "dense" and (chunk, n_gist, gist_layer) != (1, 1, 0):
        refuse(f"own='dense' is exact for single tokens: chunk={chunk}, n_gist={n_gist}, gist_layer={gist_layer} must be "
               "1, 1, 0; use --own=rollout")
    for arm in set(FIRST) & set(names) if chunk == 1 else ():
        refuse(f"arm {arm!r} needs a chunk of 2 or more: of single tokens all are the first")
    if chunk < 1 or block_size % chunk:
        refuse(f"chunk={chunk} must divide block_size={block_size}")
    if n_gist < 1 or chunk % n_gist:
        refuse(f"n_gist={n_gist} must divide chunk={chunk}: each gist reads an equal part of it")
    if gist_layer >= max(n_layer, 1):
        refuse(f"gist_layer={gist_layer} must be below n_layer={n_layer}: a gist is what enters a block")
    if gist_b == "own+truth" and not gist_layer:
        refuse("gist_b='own+truth' needs gist_layer of 1 or more: without attention a gist reads its own part alone")
    if samples < 1 or own == "dense" and samples > 1:
        refuse(f"samples={samples} must be 1 with own='dense', which takes the mean over all, and above 0 with 'rollout'")
    if not 1 <= inner_steps <= 8:
        refuse(f"inner_steps={inner_steps} must be from 1 to 8")
    if min(kappa, eta, length) <= 0:
        refuse(f"kappa={kappa}, eta={eta} and length={length} must be above 0")
    if pool < 1 or pool_self > 1:
        refuse(f"pool={pool} must be above 0 and pool_self={pool_self} at most 1: it is a share")
    if mixed == "difference" and dtype == "bfloat16":
        refuse("mixed='difference' takes two nearly equal gradients apart, which bfloat16 cannot; use --mixed=forward")
    if mixed == "graph" and ranks > 1:
        refuse(f"mixed='graph' cannot average inside its graph: it takes one rank, not {ranks}")
    if outer_batch < batch_size or outer_batch % batch_size:
        refuse(f"outer_batch={outer_batch} must be a multiple of batch_size={batch_size}")
    if val_chunks == "similar" and block_size % PIECE:
        refuse(f"block_size={block_size} must be a multiple of {PIECE} with val_chunks='similar'")
    if index_every < 1:
        refuse(f"index_every={index_every} must be above 0")
    if ema_decay >= 1:
        refuse(f"ema_decay={ema_decay} must be below 1: it is the share of the old weights that stays")
    return names


def make_nets(run):
    """(learner, critic): the same architecture. The critic starts with random embeddings and blocks that add nothing."""
    torch.manual_seed(seed)
    learner = GPT(GPTConfig(vocab, 1, n_layer, n_head, n_embd))
    critic = GPT(GPTConfig(vocab, n_gist, n_layer, n_head, n_embd))
    critic.embed.weight.data[vocab:] = 0  # a mark on gists, to be learned
    critic.log_kappa = torch.nn.Parameter(torch.tensor(math.log(kappa)))
    critic.log_eta = torch.nn.Parameter(torch.tensor(math.log(eta)))
    return tuple(net.to(run.device, run.weight_dtype) for net in (learner, critic))


def begin_from_bottleneck(run, critic, corpus):
    """Gives the critic the embeddings of a model of stage 2, and the blocks that its gists pass through."""
    theirs = read_bottleneck(critic_from, run.device, corpus_id(corpus), vocab=vocab, n_embd=n_embd, n_head=n_head)
    if theirs["n_layer"] <= gist_layer:
        refuse(f"gist_layer={gist_layer} must be below n_layer={theirs['n_layer']} of critic_from={critic_from!r}")
    critic.embed.weight.data[:vocab] = theirs["weights"]["embed.weight"][:vocab]
    blocks = {n: p for n, p in theirs["weights"].items() if n.startswith(tuple(f"blocks.{k}." for k in range(gist_layer)))}
    critic.load_state_dict(blocks, strict=False)


def main():
    run = configure(globals())
    names = run.arms_to_go(check(run.ranks), ARMS)
    if run.local_rank == 0:
        prepare(dataset, vocab)
    run.barrier()
    corpus = open_corpus(dataset, vocab)
    need = block_size * (1 + (outer_batch // batch_size if val_chunks == "next" else 0))
    for split, tokens in (("train", train_tokens_of(corpus)), ("validation", corpus.val)):
        if len(tokens) <= need:
            refuse(f"block_size={block_size} asks for texts of {need} tokens, and the {split} split has {len(tokens)}")

    nets = learner, critic = make_nets(run)
    if critic_from and not (run.resumed or start):
        begin_from_bottleneck(run, critic, corpus)
    optimizer, watch = adamw(learner, learning_rate), Watch()
    critic_optimizer = torch.optim.Adam([{"params": [p for p in critic.parameters() if p.dim()]},
                                         {"params": [p for p in critic.parameters() if not p.dim()]}])
    parts = dict(learner=learner, critic=critic, optimizer=optimizer, critic_optimizer=critic_optimizer, watch=watch)
    at = dict(arm="meta", step=0, track=new_track(), arms={}, meta=None, snapshot=None, found=[], critic_step=0,
              restarts=0, index_from=None, pool=[{} for _ in range(pool)], real_targets=0,
              streams=torch.zeros(0, 3, device=run.device), corpus=corpus_id(corpus))
    mover = copy.deepcopy(learner)
    library = dict(index=None, mover=(mover, adamw(mover, learning_rate)))  # made again rather than saved
    tally = {}
    if run.resumed:
        if run.resumed["corpus"] != at["corpus"]:
            refuse(f"{corpus.folder} holds another corpus or tokenizer than the one that {run.out_dir} was begun with")
        run.restore(at, tally, **parts)
    elif start:
        at["meta"], at["snapshot"] = read_meta_phase(
            start, run.stage, run.device, run.settings, SELF_PHASE, at["corpus"])
        at["arm"], at["found"] = "start", at["snapshot"]["found"]
    if compile:  # whole functions: a compiled module would run as it is written inside torch.func's transforms
        for function in (text_gradient, signal_gradient, mixed_product):
            globals()[function.__name__] = torch.compile(function)
    gold = Gold(val_windows(corpus.val, eval_windows, block_size + 1), corpus.token_bytes, run, batch_size // run.ranks)
    probe = *stored_probe(run, corpus), questions(run, corpus)
    size = sum(p.numel() * p.element_size() for p in [*learner.parameters(), *critic.parameters()])
    run.open(need_bytes=size * (8 + 2 * pool))

    # ---- meta phase: real tokens are the learner's targets, then the judges of the critic
    if at["arm"] == "meta":
        run.start_clock(at["step"])
        for step in range(at["step"], meta_steps + 1):
            run.checkpoint(step, at, tally, **parts)
            set_rate(optimizer, step)
            if step % eval_interval == 0 or step == meta_steps:
                found = {}
                if step >= pretrain:
                    theta = at["pool"][at["critic_step"] % pool].get("learner") or weights(learner)
                    found = measure(run, corpus, nets, theta, weights(critic, read_by(critic)), at["critic_step"])
                    found.update(restarts=at["restarts"], **precision(weights(critic), corpus))
                    at["found"].append(dict(found, step=step))
                row, stream = write_row(run, "meta", step, meta_steps, tally, gold, learner, optimizer,
                                        real_targets=0, **examine(nets, probe), **found)
                track_gold(at["track"], row, hack_margin)
                if stream is not None and step <= pretrain:
                    at["streams"] = torch.cat((at["streams"], stream))
            if step == meta_steps:
                break
            with run.autocast():
                if step < pretrain:
                    pretrain_step(run, corpus, nets, optimizer, step, tally)
                else:
                    set_critic_rate(critic_optimizer, step)
                    train_critic(run, corpus, nets, (optimizer, critic_optimizer), at, library, tally)
        judge_again(run, corpus, nets, at["streams"])
        watch.calibrate(at["streams"].cpu().numpy(), batch_size * block_size, row["agreement_probe"], probe[1].numel())
        at["meta"] = at["track"]
        at["snapshot"] = copy.deepcopy(dict(learner=learner.state_dict(), critic=critic.state_dict(), found=at["found"],
                                            optimizer=optimizer.state_dict(), watch=watch.state_dict()))
        at.update(streams=at["streams"][:0], pool=[])
        write_samples(run, "the meta phase", nets, corpus)

    # ---- self phase: the critic's signal is all that the learner learns from
    snapshot = at["snapshot"]
    for arm in names:
        if at["arm"] != arm:
            start_arm(snapshot, nets, optimizer, watch)
            at.update(arm=arm, step=0, track=new_track(), real_targets=0)
        track = at["track"]
        run.start_clock(at["step"])
        for step in range(at["step"], self_steps + 1):
            run.checkpoint(step, at, tally, **parts)
            set_rate(optimizer, meta_steps + step, 1.0 if arm in REAL else self_rate)
            if step % eval_interval == 0 or step == self_steps:
                row, stream = write_row(run, arm, step, self_steps, tally, gold, learner, optimizer,
                                        real_targets=at["real_targets"], **examine(nets, probe))
                if track_gold(track, row, hack_margin):
                    run.say(f"{arm}: hacked at step {track['steps_to_hack']}, gold {row['gold_nats']:.3f} after a best "
                            f"of {track['gold_best']:.3f}")
                    track["reports"].append(report(run, arm, step, "gold", watch, nets, snapshot, corpus, row))
                listens = ("surprise", "entropy") if arm in REAL else tuple(STREAMS)  # these have no critic to watch
                alarms = watch.update(step, stream.cpu(), row["agreement_probe"], listens) if stream is not None else []
                if alarms and step - (track["alarms"] or [-MEMORY])[-1] >= MEMORY:
                    track["alarms"].append(step)
                    track["reports"].append(report(run, arm, step, alarms, watch, nets, snapshot, corpus, row))
                if alarms:
                    watch.restart(stream.cpu(), row["agreement_probe"])
            if step == self_steps:
                break
            arm_step(run, corpus, arm, nets, optimizer, step, tally)
            if arm in ("self", "ema"):
                follow(arm, nets, snapshot)
            at["real_targets"] += batch_size * block_size // dict(real=1, first=chunk)[arm] if arm in REAL else 0
        at["arms"][arm] = track
        write_samples(run, f"arm {arm}", nets, corpus)

    at["arm"] = "done"
    run.checkpoint(0, at, tally, **parts)
    last = [f for f in at["found"] if f["step"] > meta_steps - max(1, meta_steps // 10)]
    found = {k: sum(f[k] for f in last) / len(last) for k in last[0] if k not in ("step", "restarts")}
    run.say("one inner step on held-out text, in nats a token: " + "  ".join(f"{k} {v:.4f}" for k, v in found.items()))
    run.finish(summarise(run, at["meta"], meta_steps, at["arms"], self_steps, **found), draw_runs)


if __name__ == "__main__":
    main()
