"""
Stage 1: can a language model learn from tokens that it names itself?

    python self_ce.py                                          # two cores, about 3 minutes
    python self_ce.py --arms=self,real --keep_meta=0.1         # any setting below
    torchrun --standalone --nproc_per_node=2 self_ce.py        # the same numbers on two ranks

The learner p predicts the tokens of x; `own` is its output. The critic, which is the same GPT, reads

    own_0 obs_0 LOSS  own_1 obs_1 LOSS  ...

and its distribution q at each LOSS names the token that the learner should have said:

    meta phase   CE(p, x) + CE(q, obs)      real tokens are targets: the critic learns to judge
    self phase   CE(p, argmax q)            the critic's tokens are targets: no real token is

An arm is one self phase. All arms start from the same snapshot of weights and optimizer, and see the same data.
"""
import copy

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, grad, jvp

from configurator import chosen_arms, configure, read_meta_phase, refuse
from model import GPT, GPTConfig, adamw, rollout, sample_tokens
from plot import draw_runs
from prepare_data import corpus_id, decode, get_batch, open_corpus, prepare, val_windows
from watch import MEMORY, STREAMS, Gold, Watch, new_track, note, summarise, track_gold, write_report, write_row

# --- experiment
arms = "real,self,frozen,ema,shuffled,sharpen"  # any of self, frozen, ema, real, shuffled, sharpen, with commas
meta_steps = 500        # steps with real targets, in which the critic learns to judge
self_steps = 600        # steps of each arm, with the critic's targets
target = "argmax"       # "argmax" | "soft": the critic's likeliest token, or its whole distribution
pred = "argmax"         # "argmax" | "sample": how the learner's output is taken from its distribution
loss_reads = "obs"      # "obs" | "next": LOSS_t names obs_t, or must foresee obs_t+1
order = 1               # 1: the critic learns by imitation; 2: also by how much a step on its targets helps
inner_length = 0.05     # order 2: length of the inner step, in the norm of all weights
outer_weight = 10.0     # order 2: weight of the second-order update beside the first-order gradient
hack_margin = 0.1       # nats above the best gold, three evaluations running, that count as hacked
# --- levers of the meta phase
adversarial = 0.0       # share of the learner's output that the critic reads replaced
adversary = "random"    # "random" | "corrupted" | "flips": by any token, by one from elsewhere in the text, by the worst
critic_part = "none"    # "none" | "head" | "block": what the critic has for itself: its head, or its last block and head
n_critic = 1            # frozen critics: snapshots over the last fifth of the meta phase, which name targets together
critics = "mean"        # "mean" | "weights": together by their mean distribution, or by the mean of their weights
# --- levers of the self phase
self_rate = 1.0         # learning rate of the self phase, as a share of learning_rate
ema_decay = 0.999       # arm ema: the critic's weights are this share old, the rest the learner's, each step
keep_meta = 0.0         # weight of the critic's own loss in the self phase, where the critic is made of the learner
keep = "random"         # "random" | "recorded": on random strings (no leak), or on pairs of the meta phase (leaks)
anchor = 0.0            # weight of a leash: KL(learner ‖ snapshot), nats a token
trust = 0.0             # largest KL(before ‖ after) of one step, nats a token; 0 is no bound
rescue_steps = 0        # steps back in the meta phase after an alarm, from the last good weights; 0 is no rescue
rescue_reads = "hacked" # "hacked" | "own": whether the critic is then trained on the hacked outputs too
# --- model
n_layer = 2             # blocks
n_head = 4              # heads in each
n_embd = 128            # width
block_size = 64         # text tokens in a sequence; the critic reads three times as many
# --- data
dataset = "plays"       # plays, tinyshakespeare, fineweb-edu, or a text file or folder of your own
vocab = 512             # tokens: 256 is plain bytes, 50257 is GPT-2's, any other a BPE trained on the corpus
train_tokens = 0        # use only the first so many training tokens, repeated; 0 is all
# --- optimisation
batch_size = 8          # sequences a step, over all ranks
learning_rate = 1e-3    # AdamW, constant after the warm-up
warmup = 50             # steps from 0 to learning_rate, at the start of the meta phase
grad_clip = 1.0         # largest gradient norm
# --- run
seed = 1                # of weights and data
eval_interval = 10      # steps between two lines of the log
eval_windows = 64       # held-out sequences that gold is measured on
save_interval = 200     # steps between two checkpoints
device = "auto"         # "auto" | "cuda" | "mps" | "cpu": auto takes the first that is there
dtype = "float32"       # "float32" | "bfloat16" | "float64": bfloat16 is autocast over float32 weights
compile = False         # torch.compile; about a minute before the first step, then faster
out_dir = "out/self_ce" # the run's folder; an earlier run there is moved aside
resume = ""             # the folder of a run to go on with
start = ""              # the folder of a run whose finished meta phase to start from, instead of one's own
wandb_log = "no"        # "no" | "online" | "offline": also log to Weights & Biases

ARMS = ("self", "frozen", "ema", "real", "shuffled", "sharpen")
MOVING = ("self", "ema")  # the arms whose critic is made of the learner as it changes
# Settings that the meta phase does not read: with `start`, the others must be those of the run started from.
SELF_PHASE = ("arms", "self_steps", "target", "hack_margin", "critics", "self_rate", "ema_decay", "keep_meta", "keep",
              "anchor", "trust", "rescue_steps", "rescue_reads", "eval_interval", "eval_windows",
              "save_interval", "device", "compile", "out_dir", "resume", "start", "wandb_log")
# Independent streams of data and of random numbers.
TEXT, FOREIGN, CHANCE, OUTER, KEPT, PROBE, ADVERSARY, RESCUE = range(8)


# ----------------------------------------------------------------------------------------------
# the signal

def triples(own, obs):
    """own and obs, int [B, T] both, interleaved with LOSS, the one special token: int [B, 3T]."""
    return torch.stack((own, obs, torch.full_like(obs, vocab)), dim=2).flatten(1)


def critic_logits(critic, own, obs):
    """[B, T, V]: what the critic names at each LOSS, having read own output and observation, int [B, T] both."""
    return critic(triples(own, obs), read=slice(2, None, 3))


def align(logits, named):
    """Rows that speak of the same token: with loss_reads = "next", LOSS_t speaks of position t + 1."""
    return (logits, named) if loss_reads == "obs" else (logits[:, 1:], named[:, :-1])


def imitation(named, obs):
    """Cross entropy of the critic's logits at LOSS [B, T, V] against the observation [B, T], nats a token."""
    observed, named = align(obs, named)
    return F.cross_entropy(named.flatten(0, 1), observed.flatten())


@torch.no_grad()  # the target is data to the learner: no gradient may flow into the critic through it
def critic_target(judges, own, obs):
    """(target, disagreement): the judges' mean distribution [B, T, V] if soft, else its likeliest tokens [B, T].

    disagreement: share of tokens at which the judges' own likeliest tokens are not all the same.
    """
    named = [critic_logits(judge, own, obs) for judge in judges]
    if len(judges) == 1:
        mean, disagreement = named[0].softmax(-1) if target == "soft" else named[0], torch.zeros((), device=obs.device)
    else:
        mean = sum(logits.softmax(-1) for logits in named) / len(named)
        picks = torch.stack([logits.argmax(-1) for logits in named])
        disagreement = (picks != picks[0]).any(0).float().mean()
    return (mean if target == "soft" else mean.argmax(-1)), disagreement


def own_output(logits, u):
    """The learner's own tokens [B, T] from its logits, greedy or sampled with the uniform numbers u [B, T]."""
    logits = logits.detach()
    return logits.argmax(-1) if pred == "argmax" else sample_tokens(logits, u)


def corrupted(critic, own, obs, u):
    """own [B, T] with a share `adversarial` of its tokens replaced; u: uniform numbers [B, T, 2].

    "flips": the token v that to first order raises the critic's loss most, argmax_v ⟨e_v, ∂loss/∂e_own⟩, where e are
    the embeddings (HotFlip, arXiv 1712.06751).
    """
    if adversary == "random":
        other = (u[..., 1] * vocab).long()
    elif adversary == "corrupted":
        other = obs.gather(1, (u[..., 1] * obs.size(1)).long())
    else:
        vectors = critic.embed(triples(own, obs)).detach().requires_grad_()
        loss = imitation(critic(vectors, read=slice(2, None, 3)), obs)
        slope = torch.autograd.grad(loss, vectors)[0][:, 0::3]
        other = (slope @ critic.embed.weight[:vocab].detach().T).argmax(-1)
    return torch.where(u[..., 0] < adversarial, other, own)


def second_order(model, critic, x, obs, own, outer_x, average):
    """How the critic should have moved the learner's step: (dφ by name of the critic's parameters, gain in nats).

    One inner step on the critic's soft targets T_φ, judged by the cross entropy O of other text:

        L(θ, φ) = −Σ_v T_φ(v) log p_θ(v)        u = g/‖g‖,  g = ∇_θ L        θ' = θ − a u
        λ = ∇O(θ')                               w = −(a/‖g‖)(λ − u⟨u, λ⟩)
        dφ = ∂_φ ⟨∇_θ L, w⟩ = ∂_φ [−Σ_v T_φ(v) d/dε log p_{θ+εw}(v)]

    θ and φ are the same numbers in two roles; dφ is the derivative through the critic's role. The last form needs
    one forward-mode derivative and no double backward. g and λ are averaged over ranks, so that N ranks take the one
    step of the whole batch; dφ is linear in what remains and is averaged with the other gradients.
    """
    theta = {n: p.detach() for n, p in model.named_parameters()}
    phi = {n: p.detach().requires_grad_() for n, p in critic.named_parameters()}

    def log_p(th, fused=True):
        return functional_call(model, th, (x,), dict(fused=fused)).log_softmax(-1)

    def inner(th):
        logp, soft = align(log_p(th), teacher.detach())
        return -(soft * logp).sum(-1).mean()

    def outer(th):
        return F.cross_entropy(functional_call(model, th, (outer_x[:, :-1],)).flatten(0, 1), outer_x[:, 1:].flatten())

    teacher = critic_logits(lambda t, **options: functional_call(critic, phi, (t,), options), own, obs).softmax(-1)
    g = grad(inner)(theta)
    average(list(g.values()))
    norm = torch.sqrt(sum(t.square().sum() for t in g.values()))
    per_norm = (norm > 0) / norm.clamp_min(1e-30)  # where nothing is to be learned no step is taken
    u = {n: t * per_norm for n, t in g.items()}
    moved = {n: theta[n] - inner_length * u[n] for n in theta}
    lam, after = torch.func.grad_and_value(outer)(moved)
    average(list(lam.values()))
    along = sum((u[n] * lam[n]).sum() for n in u)
    w = {n: -inner_length * per_norm * (lam[n] - u[n] * along) for n in u}
    _, rate = jvp(lambda th: log_p(th, fused=False), (theta,), (w,))  # d/dε log p at θ along w
    rate, teacher = align(rate, teacher)
    dphi = torch.autograd.grad(-(teacher * rate).sum(-1).mean(), list(phi.values()))
    with torch.no_grad():
        gain = outer(theta) - after
    return dict(zip(phi, dphi)), gain


# ----------------------------------------------------------------------------------------------
# data

def text(run, corpus, step, stream=TEXT):
    """This rank's rows of a step's text, int [B / ranks, T + 1]: x is all but the last token, obs all but the first."""
    tokens = corpus.train[:train_tokens] if train_tokens else corpus.train
    return get_batch(tokens, seed, step, batch_size, block_size + 1, run.rank, run.ranks, stream).to(run.device)


def chance(run, step, shape, stream=CHANCE):
    """This rank's rows of uniform numbers [B, ...] in [0, 1), a pure function of (seed, step)."""
    share = batch_size // run.ranks
    numbers = np.random.default_rng([seed, stream, step]).random((batch_size, *shape), dtype=np.float32)
    return torch.from_numpy(numbers[run.rank * share:(run.rank + 1) * share]).to(run.device)


def kept_pairs(run, corpus, learner, snapshot, step):
    """(own, obs) that keep a critic's skill while it learns from itself.

    "random": unrelated random strings; to copy them teaches nothing about text. "recorded": what the snapshot says
    to the meta phase's text, and that text; through the shared weights real tokens are then targets again.
    """
    if keep == "random":
        return (chance(run, step, (2, block_size), KEPT) * vocab).long().unbind(1)
    w = text(run, corpus, step % meta_steps)
    with torch.no_grad():
        return functional_call(learner, snapshot, (w[:, :-1],)).argmax(-1), w[:, 1:]


def stored_probe(run, corpus):
    """(own, obs), int [4, T] both: random strings beside held-out text, on which a critic can be asked at any time."""
    obs = val_windows(corpus.val, 4, block_size + 1)[:, 1:]
    own = np.random.default_rng([seed, PROBE]).integers(0, vocab, tuple(obs.shape))
    return torch.from_numpy(own).to(run.device), obs.to(run.device)


# ----------------------------------------------------------------------------------------------
# steps

def meta_loss(run, learner, role, w, step, tally, hacked=None):
    """(CE(p, x) + CE(q, obs), own): real tokens are targets, the learner's and the critic's. Nats a token.

    hacked: weights of a learner that was hacked, whose outputs the critic is then to judge too.
    """
    x, obs = w[:, :-1], w[:, 1:]
    logits = learner(x)
    own = own_output(logits, chance(run, step, (block_size,)) if pred == "sample" else None)
    read = corrupted(role, own, obs, chance(run, step, (block_size, 2), ADVERSARY)) if adversarial else own
    named = critic_logits(role, read, obs)
    loss = F.cross_entropy(logits.flatten(0, 1), obs.flatten())
    if tally is not None:
        note_step(tally, loss, logits, obs, own, *align(obs, named.detach().argmax(-1)))
    loss = loss + imitation(named, obs)
    if hacked is not None:
        with torch.no_grad():
            fooled = functional_call(learner, hacked, (x,)).argmax(-1)
        loss = loss + imitation(critic_logits(role, fooled, obs), obs)
    return loss, own


def self_loss(run, arm, learner, judges, w, seen, step, tally):
    """(CE(p, target), logits): the target is what the critic names, having read own output and observation.

    seen: the observation [B, T] that the critic reads; that of w, but for the arm shuffled. Nats a token.
    """
    x, obs = w[:, :-1], w[:, 1:]
    logits = learner(x)
    own = own_output(logits, chance(run, step, (block_size,)) if pred == "sample" else None)
    if arm == "real":
        loss = F.cross_entropy(logits.flatten(0, 1), obs.flatten())
        note_step(tally, loss, logits, obs, own, obs, obs)
        return loss, logits
    named, disagreement = critic_target(judges, own, own if arm == "sharpen" else seen)
    said, told = align(logits, named)
    loss = F.cross_entropy(said.flatten(0, 1), told.flatten(0, 1))
    tokens = named.argmax(-1) if target == "soft" else named
    note_step(tally, loss, logits, obs, own, *align(obs, tokens), disagreement=disagreement)
    return loss, logits


@torch.no_grad()
def note_step(tally, loss, logits, obs, own, seen, told, **more):
    """Adds a step to the tally: see `note`.

    seen, told: the observed tokens and what the critic names for them, int [B, T] or, if LOSS reads ahead, [B, T − 1].
    """
    agreement, echo = (seen == told).float().mean(), (own[:, -told.size(1):] == told).float().mean()
    note(tally, loss, logits.log_softmax(-1), obs, agreement, told, echo=echo, **more)


def set_rate(optimizer, step, share=1.0):
    """The learning rate of a step, counted from the start of the meta phase."""
    for group in optimizer.param_groups:
        group["lr"] = share * learning_rate * min(1.0, (step + 1) / max(1, warmup))


def take_step(run, pair, optimizer, loss, tally=None, extra=None):
    """Backward, average over ranks, clip, step. extra: [(parameter, gradient)] to add (second order)."""
    loss.backward()
    for p, g in extra or ():
        p.grad += outer_weight * g
    params = [p for p in pair.parameters() if p.grad is not None]
    run.average([p.grad for p in params])
    norm = torch.nn.utils.clip_grad_norm_(params, grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if tally is not None:
        tally["grad_norm"] = tally.get("grad_norm", 0) + norm


@torch.no_grad()
def follow(critic, role):
    """The moving average: critic ← ema_decay · critic + (1 − ema_decay) · the learner in the critic's role."""
    torch._foreach_lerp_(list(critic.parameters()), list(role.parameters()), 1 - ema_decay)


@torch.no_grad()
def hold_back(run, learner, before, x, logits):
    """Shortens the step just taken from the weights `before` until KL(before ‖ after) on x is at most `trust`.

    The divergence grows as the square of a short step's length, so one measurement tells by how much.
    """
    logp, now = logits.detach().log_softmax(-1), learner(x).log_softmax(-1)
    kl = (logp.exp() * (logp - now)).sum(-1).mean()
    run.average([kl.view(1)])
    share = (trust / kl.clamp_min(1e-12)).sqrt().clamp(max=1.0)
    for p, old in zip(learner.parameters(), before):
        p.copy_(old + share * (p - old))


def in_critics_role(learner):
    """The critic as a module: the learner itself, or one that shares all of it but the part `critic_part` names."""
    if critic_part == "none":
        return learner
    role = copy.deepcopy(learner)
    role.embed = learner.embed
    shared = n_layer if critic_part == "head" else n_layer - 1
    role.blocks = nn.ModuleList([*learner.blocks[:shared], *role.blocks[shared:]])
    return role


def rescue(run, corpus, at, parts, learner, role, step):
    """Back to the last good weights, then `rescue_steps` of the meta phase with the hacked outputs among its inputs.

    The critics become copies of what comes out of it, and the watch forgets what it saw since.
    """
    hacked = {n: p.detach().clone() for n, p in learner.named_parameters()} if rescue_reads == "hacked" else None
    for name in ("pair", "optimizer", "watch"):
        parts[name].load_state_dict(copy.deepcopy(at["good"][name]))
    for i in range(rescue_steps):
        w = text(run, corpus, step * rescue_steps + i, RESCUE)
        with run.autocast():
            loss, _ = meta_loss(run, learner, role, w, step + i, None, hacked)
        take_step(run, parts["pair"], parts["optimizer"], loss)
    for judge in parts["judges"]:
        judge.load_state_dict(role.state_dict())
    parts["watch"].restart()
    at["track"]["rescues"].append(step)
    at["real_targets"] += (2 if hacked is None else 3) * rescue_steps * batch_size * block_size


def leash(learner, snapshot, x, logits):
    """KL(learner ‖ snapshot), nats a token, of the learner's logits on x."""
    with torch.no_grad():
        reference = functional_call(learner, snapshot, (x,)).log_softmax(-1)
    logp = logits.log_softmax(-1)
    return (logp.exp() * (logp - reference)).sum(-1).mean()


def arm_loss(run, corpus, arm, learner, role, asked, snapshot, step, tally):
    """(loss of an arm's step with its levers, the text x that it read, the learner's logits there). Nats a token."""
    w = text(run, corpus, meta_steps + step)
    seen = text(run, corpus, meta_steps + step, FOREIGN) if arm == "shuffled" else w
    loss, logits = self_loss(run, arm, learner, asked, w, seen[:, 1:], meta_steps + step, tally)
    if keep_meta and arm in MOVING:
        own, obs = kept_pairs(run, corpus, learner, snapshot["learner"], step)
        loss = loss + keep_meta * imitation(critic_logits(role, own, obs), obs)
    if anchor and arm != "real":
        loss = loss + anchor * leash(learner, snapshot["learner"], w[:, :-1], logits)
    return loss, w[:, :-1], logits


def start_arm(snapshot, pair, judges, optimizer, watch):
    """Puts everything back to the end of the meta phase; the optimizer too, for a fresh one would hack by itself."""
    pair.load_state_dict(snapshot["pair"])
    optimizer.load_state_dict(copy.deepcopy(snapshot["optimizer"]))
    watch.load_state_dict(snapshot["watch"])
    if critics == "weights":
        mean = {n: sum(s[n] for s in snapshot["judges"]) / n_critic for n in snapshot["role"]}
        judges[0].load_state_dict(mean)
    else:
        for judge, state in zip(judges, reversed(snapshot["judges"])):  # the first judge is the last snapshot
            judge.load_state_dict(state)


# ----------------------------------------------------------------------------------------------
# the report

@torch.no_grad()
def examine(run, critic, probe):
    """How the critic stands on the stored probe: {agreement_probe: share of tokens named that are the observation}."""
    own, obs = probe
    with run.autocast():
        seen, named = align(obs, critic_logits(critic, own, obs).argmax(-1))
    return dict(agreement_probe=(seen == named).float().mean().item())


@torch.no_grad()
def write_samples(run, arm, learner, judge, corpus):
    """samples.txt: what the learner writes after a held-out prompt, and what the critic makes of its predictions."""
    w = val_windows(corpus.val, 2, block_size + 1).to(run.device)
    u = torch.from_numpy(np.random.default_rng(seed).random((2, 1, block_size), dtype=np.float32)).to(run.device)
    written = rollout(learner, w[:, :-1], [block_size], block_size, u)[:, 0]
    own = learner(w[:, :-1]).argmax(-1)
    named = critic_logits(judge, own, w[:, 1:]).argmax(-1)
    show = lambda ids: repr(decode(corpus.encoding, ids.tolist()))
    run.sample(f"==== after {arm}\n" + "".join(
        f"prompt       {show(w[i, :-1])}\ngoes on      {show(written[i])}\n"
        f"own output   {show(own[i])}\nobservation  {show(w[i, 1:])}\ncritic names {show(named[i])}\n\n"
        for i in range(2)))


@torch.no_grad()
def report(run, arm, step, why, watch, learner, judges, snapshot, corpus, row):
    """hacks/NNN.md: cross-examines the critic and the outputs of now and of the snapshot, on the text that comes next.

    For the real arm, which has no critic, it is the learner in the critic's role that is examined. Agreement is the share
    of targets equal to the observation. Returns what `write_report` does.
    """
    w = text(run, corpus, meta_steps + step)
    foreign = text(run, corpus, meta_steps + step, FOREIGN)
    x, obs = w[:, :-1], w[:, 1:]
    outputs = dict(then=functional_call(learner, snapshot["learner"], (x,)).argmax(-1), now=learner(x).argmax(-1))
    old_critic = lambda t, **options: functional_call(judges[0], snapshot["role"], (t,), options)
    judged, named = {}, {}
    for c, critic in (("then", [old_critic]), ("now", judges)):
        for o, own in outputs.items():
            seen = foreign[:, 1:] if arm == "shuffled" else own if arm == "sharpen" else obs
            tokens, _ = critic_target(critic, own, seen)
            named[c, o] = tokens.argmax(-1) if target == "soft" else tokens
            observed, told = align(obs, named[c, o])
            judged[c, o] = run.mean((observed == told).float().mean())
    texts = {k: tuple(t[0].tolist() for t in (outputs[k], obs, named[k, k])) for k in outputs}
    shares = {"targets equal to the observation": row["agreement"], "targets equal to the own output": row["echo"],
              "targets that are the most frequent one": row["target_top"],
              "entropy of the targets (nats)": row["target_entropy"],
              "entropy of the output (nats)": row["output_entropy"], "gold (nats)": row["gold_nats"]}
    return write_report(run, arm, step, why, watch.order(), judged, texts, shares, corpus.encoding)


# ----------------------------------------------------------------------------------------------
# the run

def check():
    """The arms by name. Refuses settings that cannot be."""
    names = chosen_arms(arms, ARMS)
    if order not in (1, 2):
        refuse(f"order={order} must be 1 (imitation) or 2 (imitation and second order)")
    if ema_decay >= 1:
        refuse(f"ema_decay={ema_decay} must be below 1: it is the share of the old weights that stays")
    if adversarial > 1:
        refuse(f"adversarial={adversarial} must be at most 1: it is a share")
    if loss_reads == "next" and block_size < 2:
        refuse(f"block_size={block_size} must be at least 2 with loss_reads='next'")
    if keep_meta and keep == "recorded" and meta_steps == 0:
        refuse("keep='recorded' needs a meta phase to record from; meta_steps is 0")
    if rescue_steps and meta_steps < 100:
        refuse(f"rescue_steps={rescue_steps} waits for an alarm, and the watch needs meta_steps of 100 or more to be "
               f"calibrated; they are {meta_steps}")
    if not 1 <= n_critic <= max(1, meta_steps // 5):
        refuse(f"n_critic={n_critic} must be from 1 to {max(1, meta_steps // 5)}, the steps of the last fifth of the "
               "meta phase, of which they are snapshots")
    return names


def main():
    run = configure(globals())
    names = run.arms_to_go(check(), ARMS)
    if run.local_rank == 0:
        prepare(dataset, vocab)
    run.barrier()
    corpus = open_corpus(dataset, vocab)
    for split, tokens in (("train", corpus.train[:train_tokens or None]), ("validation", corpus.val)):
        if len(tokens) <= block_size:
            refuse(f"block_size={block_size} must be below the {len(tokens)} tokens of the {split} split")

    torch.manual_seed(seed)
    learner = GPT(GPTConfig(vocab, 1, n_layer, n_head, n_embd)).to(run.device, run.weight_dtype)
    role = in_critics_role(learner)
    pair = learner if role is learner else nn.ModuleList([learner, role])  # all that is trained
    judges = nn.ModuleList(copy.deepcopy(role) for _ in range(n_critic if critics == "mean" else 1))
    optimizer, watch = adamw(pair, learning_rate), Watch()
    parts = dict(pair=pair, judges=judges, optimizer=optimizer, watch=watch)
    at = dict(arm="meta", step=0, track=new_track(), arms={}, meta=None, snapshot=None, earlier=[], good=None,
              real_targets=0, streams=torch.zeros(0, 3, device=run.device), corpus=corpus_id(corpus))
    tally = {}
    if run.resumed:
        if run.resumed["corpus"] != at["corpus"]:
            refuse(f"{corpus.folder} holds another corpus or tokenizer than the one that {run.out_dir} was begun with")
        run.restore(at, tally, **parts)
    elif start:
        at["meta"], at["snapshot"] = read_meta_phase(
            start, run.stage, run.device, run.settings, SELF_PHASE, at["corpus"])
        at["arm"] = "start"
    if compile:
        for module in {learner, role, *judges}:
            module.compile()
    gold = Gold(val_windows(corpus.val, eval_windows, block_size + 1), corpus.token_bytes, run, batch_size // run.ranks)
    probe = stored_probe(run, corpus)
    size = sum(p.numel() * p.element_size() for p in pair.parameters())
    run.open(need_bytes=2 * (10 + 2 * n_critic) * size)

    # ---- meta phase: real tokens are targets
    if at["arm"] == "meta":
        run.start_clock(at["step"])
        gap = max(1, meta_steps // (5 * n_critic))
        for step in range(at["step"], meta_steps + 1):
            run.checkpoint(step, at, tally, **parts)
            set_rate(optimizer, step)
            if step % eval_interval == 0 or step == meta_steps:
                row, stream = write_row(run, "meta", step, meta_steps, tally, gold, learner, optimizer,
                                        real_targets=0, **examine(run, role, probe))
                track_gold(at["track"], row, hack_margin)
                if stream is not None:
                    at["streams"] = torch.cat((at["streams"], stream))
            if step in range(meta_steps - gap * (n_critic - 1), meta_steps + 1, gap):
                at["earlier"].append(copy.deepcopy(role.state_dict()))
            if step == meta_steps:
                break
            w = text(run, corpus, step)
            with run.autocast():
                loss, own = meta_loss(run, learner, role, w, step, tally)
                extra = None
                if order == 2 and step >= warmup:  # before it both roles are noise, and so is what would be learned
                    outer_x = text(run, corpus, step, OUTER)
                    dphi, gain = second_order(learner, role, w[:, :-1], w[:, 1:], own, outer_x, run.average)
                    extra = list(zip(role.parameters(), dphi.values()))
                    tally["gain"] = tally.get("gain", 0) + gain
            take_step(run, pair, optimizer, loss, tally, extra)
        watch.calibrate(at["streams"].cpu().numpy(), batch_size * block_size, row["agreement_probe"], probe[1].numel())
        at["meta"] = at["track"]
        at["snapshot"] = copy.deepcopy(dict(
            learner=learner.state_dict(), role=role.state_dict(), pair=pair.state_dict(), judges=at["earlier"],
            optimizer=optimizer.state_dict(), watch=watch.state_dict()))
        at.update(earlier=[], streams=at["streams"][:0])
        write_samples(run, "the meta phase", learner, role, corpus)

    # ---- self phase: the critic's tokens are targets
    snapshot = at["snapshot"]
    for arm in names:
        if at["arm"] != arm:
            start_arm(snapshot, pair, judges, optimizer, watch)
            at.update(arm=arm, step=0, track=new_track(), real_targets=0,
                      good={k: snapshot[k] for k in ("pair", "optimizer", "watch")})
        track, asked = at["track"], [role] if arm in ("self", "real") else list(judges)
        run.start_clock(at["step"])
        for step in range(at["step"], self_steps + 1):
            run.checkpoint(step, at, tally, **parts)
            set_rate(optimizer, meta_steps + step, 1.0 if arm == "real" else self_rate)
            if step % eval_interval == 0 or step == self_steps:
                row, stream = write_row(run, arm, step, self_steps, tally, gold, learner, optimizer,
                                        real_targets=at["real_targets"], **examine(run, asked[0], probe))
                if track_gold(track, row, hack_margin):
                    run.say(f"{arm}: hacked at step {track['steps_to_hack']}, gold {row['gold_nats']:.3f} after a best "
                            f"of {track['gold_best']:.3f}")
                    track["reports"].append(
                        report(run, arm, step, "gold", watch, learner, asked, snapshot, corpus, row))
                listens = ("surprise", "entropy") if arm == "real" else tuple(STREAMS)  # real has no critic to watch
                alarms = watch.update(step, stream.cpu(), row["agreement_probe"], listens) if stream is not None else []
                if alarms and (rescue_steps or step - (track["alarms"] or [-MEMORY])[-1] >= MEMORY):
                    track["alarms"].append(step)
                    track["reports"].append(
                        report(run, arm, step, alarms, watch, learner, asked, snapshot, corpus, row))
                if alarms and rescue_steps and arm != "real":
                    run.say(f"{arm}: alarm at step {step} ({', '.join(alarms)}): back to the last good weights")
                    rescue(run, corpus, at, parts, learner, role, step)
                elif alarms:
                    watch.restart(stream.cpu(), row["agreement_probe"])
                elif rescue_steps and watch.settled():
                    at["good"] = copy.deepcopy({k: parts[k].state_dict() for k in ("pair", "optimizer", "watch")})
            if step == self_steps:
                break
            before = [p.detach().clone() for p in learner.parameters()] if trust and arm != "real" else None
            with run.autocast():
                loss, x, logits = arm_loss(run, corpus, arm, learner, role, asked, snapshot, step, tally)
            take_step(run, pair, optimizer, loss, tally)
            if before:
                hold_back(run, learner, before, x, logits)
            if arm == "ema":
                follow(judges[0], role)
            if arm == "real" or keep_meta and keep == "recorded" and arm in MOVING:
                at["real_targets"] += batch_size * block_size
        at["arms"][arm] = track
        write_samples(run, f"arm {arm}", learner, asked[0], corpus)

    at["arm"] = "done"
    run.checkpoint(0, at, tally, **parts)
    run.finish(summarise(run, at["meta"], meta_steps, at["arms"], self_steps), draw_runs)


if __name__ == "__main__":
    main()
