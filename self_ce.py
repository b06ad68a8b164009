"""
Stage 1: can a language model learn from tokens that it names itself?

    python self_ce.py                                          # two cores, about 2 minutes
    python self_ce.py --arms=self,real --keep_meta=0.1         # any setting below
    torchrun --standalone --nproc_per_node=2 self_ce.py        # the same run on two ranks

The learner p predicts the tokens of x; `own` is its output. The critic, which is the same GPT, reads

    own_0 obs_0 LOSS  own_1 obs_1 LOSS  ...

and its distribution q at each LOSS names the token that the learner should have said:

    meta phase   CE(p, x) + CE(q, obs)      real tokens are targets: the critic learns to judge
    self phase   CE(p, argmax q)            the critic's tokens are targets: no real token is

The critic still reads real tokens, and could copy them: the question is how long that lasts. An arm is one
self phase; all start from the same weights and optimizer, and see the same data:

    real                 true tokens as targets: the ceiling, and the control of every hack
    frozen, self, ema    the critic is the learner at the end of the meta phase, now, or its moving average
    shuffled, sharpen    as frozen, but it reads another text's observation, or the own output in its place

Gold is cross entropy on held-out text, by which arms are compared; a hack is when it rises, see watch.py.
"""
import copy

import numpy as np
import torch
import torch.nn.functional as F

from configurator import chosen, refuse_if
from corpus import val_windows
from equations import (add_up, bound, by_name, dot, follow, gradient, inner_step, leaves, log_softmax,
                       pull_back)
from model import GPT, GPTConfig, adamw
from phases import Phases
from prepare_data import read_corpus
from run import open_run
from watch import note

# --- experiment
arms = "real,self,frozen,ema,shuffled,sharpen"  # any of these, with commas
meta_steps = 500        # steps with real targets, in which the critic learns to judge
self_steps = 600        # steps of each arm, with the critic's targets
target = "argmax"       # "argmax" | "soft": the critic's likeliest token, or its whole distribution
order = 1               # 1: the critic learns by imitation; 2: also by how much a step on its targets helps
inner_length = 0.05     # order 2: length of the inner step, the norm over all weights
# --- levers of the meta phase
adversarial = 0.0       # share of the learner's output that the critic reads replaced
adversary = "random"    # "random" | "flips": by any token, or by the one that misleads the critic most
# --- levers of the self phase
self_rate = 1.0         # learning rate of the self phase, as a share of learning_rate
ema_decay = 0.999       # arm ema: the critic's weights are this share old, the rest the learner's, each step
keep_meta = 0.0         # weight of practice on random strings, where the critic is made of the learner
rescue_steps = 0        # steps back in the meta phase after an alarm, from the last good weights; 0: none
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
grad_accum = 1          # pieces of a rank's batch, one after the other: the same step in less memory
decay = 1.0             # the share of its learning rate that an arm ends with; it falls in a line
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

ARMS = ("real", "self", "frozen", "ema", "shuffled", "sharpen")
# Settings that the meta phase does not read, beside those of configurator.SELF_PHASE.
UNREAD_BY_META = ("target", "self_rate", "keep_meta", "rescue_steps")
# Independent streams of data and of random numbers.
TEXT, FOREIGN, _, OUTER, KEPT, PROBE, ADVERSARY, RESCUE = range(8)
ORDER_2 = 10.0  # weight of the second-order update beside the first-order gradient


# ---- the signal

def triples(own, obs):
    """own and obs, int [B, T] both, interleaved with LOSS, the one special token: int [B, 3T]."""
    return torch.stack((own, obs, torch.full_like(obs, vocab)), dim=2).flatten(1)


def critic_logits(critic, own, obs):
    """[B, T, V]: what the critic names at each LOSS, having read own and obs, int [B, T] both."""
    return critic(triples(own, obs), read=slice(2, None, 3))


def cross_entropy(logits, tokens):
    """Nats a token, of logits [B, T, V] against tokens [B, T], or against distributions [B, T, V]."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(0, 1))


@torch.no_grad()  # the target is data to the learner: no gradient may flow into the critic through it
def critic_target(critic, own, obs):
    """What the critic names: its likeliest tokens [B, T], or, soft, its distribution [B, T, V]."""
    named = critic_logits(critic, own, obs)
    return named.softmax(-1) if target == "soft" else named.argmax(-1)


def replaced(critic, own, obs, u):
    """own [B, T] with a share `adversarial` of its tokens replaced; u: uniform numbers [B, T, 2].

    "flips": the token v that to first order raises the critic's loss most, argmax_v ⟨e_v, ∂loss/∂e_own⟩,
    where e are the embeddings (HotFlip, arXiv 1712.06751).
    """
    other = (u[..., 1] * vocab).long()
    if adversary == "flips":
        vectors = critic.embed(triples(own, obs)).detach().requires_grad_()
        loss = cross_entropy(critic(vectors, read=slice(2, None, 3)), obs)
        slope = torch.autograd.grad(loss, vectors)[0][:, 0::3]
        other = (slope @ critic.embed.weight[:vocab].detach().T).argmax(-1)
    return torch.where(u[..., 0] < adversarial, other, own)


def meta_loss(phases, learner, text, step, tally, hacked=None):
    """(CE(p, x) + CE(q, obs), own): real tokens are targets, the learner's and the critic's. Nats a token.

    hacked: a learner that was hacked, whose outputs the critic is then to judge too.
    """
    x, obs = text[:, :-1], text[:, 1:]
    logits = learner(x)
    own = logits.detach().argmax(-1)
    read = own
    if adversarial:
        read = replaced(learner, own, obs, phases.chance(step, (block_size, 2), ADVERSARY))
    named = critic_logits(learner, read, obs)
    loss = cross_entropy(logits, obs)
    note(tally, loss, log_softmax(logits.detach()), obs, named.detach().argmax(-1))
    loss = loss + cross_entropy(named, obs)
    if hacked is not None:
        with torch.no_grad():
            fooled = hacked(x).argmax(-1)
        loss = loss + cross_entropy(critic_logits(learner, fooled, obs), obs)
    return loss, own


def observed(phases, arm, text, step):
    """What the critic reads as the observation [B, T] of a text; None: the own output."""
    if arm == "sharpen":
        return None
    return phases.text(step, FOREIGN)[:, 1:] if arm == "shuffled" else text[:, 1:]


def self_loss(arm, learner, critic, text, seen, tally):
    """CE(p, target), nats a token: the target is what the critic names, having read own output and `seen`."""
    x, obs = text[:, :-1], text[:, 1:]
    logits = learner(x)
    own = logits.detach().argmax(-1)
    named = obs if arm == "real" else critic_target(critic, own, own if seen is None else seen)
    loss = cross_entropy(logits, named)
    told = named if named.dim() == 2 else named.argmax(-1)
    note(tally, loss, log_softmax(logits.detach()), obs, told)
    return loss


def practice(phases, learner, step):
    """The critic's own loss on unrelated random strings: to copy them teaches nothing about text."""
    own, obs = (phases.chance(step, (2, block_size), KEPT) * vocab).long().unbind(1)
    return cross_entropy(critic_logits(learner, own, obs), obs)


# ---- second order: see equations.py for θ′, w, what is averaged. θ and φ are the same numbers in two roles

def log_p(learner, theta, x, **options):
    """log p_θ(v), [B, T, V], on text x."""
    return log_softmax(bound(learner, theta)(x, **options))


def outer_loss(learner, theta, text):
    """O(θ): cross entropy of other text, nats a token."""
    return cross_entropy(log_p(learner, theta, text[:, :-1]), text[:, 1:])


def second_order(learner, critic, text, own, outer_text, average):
    """How the critic should have moved the learner's step: (dφ = ∂O(θ′)/∂φ by name, gain of the step, nats).

    θ′ is one step on L(θ, φ) = −Σ_v T_φ(v) log p_θ(v), T the critic's distribution; O the cross entropy of
    other text. dφ is linear in what each rank sees and is averaged with the other gradients.
    """
    theta, phi = leaves(by_name(learner)), leaves(by_name(critic))
    pieces = list(zip(text.chunk(grad_accum), own.chunk(grad_accum)))
    g, lam, dphi, gain, share = {}, {}, {}, 0.0, 1 / grad_accum

    def inner_gradient(text, own):                                                          # ∇_θ L
        teacher = critic_logits(bound(critic, phi), own, text[:, 1:]).softmax(-1)
        logp = log_p(learner, theta, text[:, :-1], fused=False)
        return gradient(logp, theta, -teacher * vocab / teacher.numel(), graph=True)

    for piece in pieces:
        mine = inner_gradient(*piece)
        g = add_up(g, mine, share)
    average(list(g.values()))
    step = lambda g: inner_step(by_name(learner), g, inner_length)
    moved = leaves(step(g))
    for piece in outer_text.chunk(grad_accum):
        after = outer_loss(learner, moved, piece)
        lam = add_up(lam, gradient(after, moved), share)
        with torch.no_grad():
            gain = gain + share * (outer_loss(learner, theta, piece) - after)
    average(list(lam.values()))
    w, = pull_back(step, lam, g)
    for piece in pieces:
        mine = mine if len(pieces) == 1 else inner_gradient(*piece)  # of several, no graph is kept
        dphi = add_up(dphi, gradient(dot(mine, w), phi), share)                             # ∂_φ ⟨∇_θ L, w⟩
    return dphi, gain


# ---- the rescue

def keep_good(phases, step):
    """Keeps the weights that a rescue goes back to, unless the watch is on its way to an alarm."""
    parts = ("learner", "optimizer", "watch")
    if step == 0 or phases.watch.settled():
        phases.kept["good"] = copy.deepcopy({name: phases.parts[name].state_dict() for name in parts})


def rescue(phases, step):
    """Back to the last good weights, then `rescue_steps` of the meta phase, on the hacked outputs too.

    The critic becomes a copy of what comes out of it, and the watch forgets what it saw since.
    """
    learner, optimizer = phases.parts["learner"], phases.parts["optimizer"]
    hacked = copy.deepcopy(learner)
    for name, state in phases.kept["good"].items():
        phases.parts[name].load_state_dict(copy.deepcopy(state))
    for i in range(rescue_steps):
        for _ in phases.pieces():
            text = phases.text(step * rescue_steps + i, RESCUE)
            with phases.run.autocast():
                loss, _ = meta_loss(phases, learner, text, step + i, {}, hacked)
            (loss / grad_accum).backward()
        phases.take_step(learner, optimizer, noted=False)
    phases.parts["critic"].load_state_dict(learner.state_dict())
    phases.watch.restart(step)
    phases.at["track"]["rescues"].append(step)
    phases.at["real_targets"] += 3 * rescue_steps * batch_size * block_size
    phases.run.say(f"{phases.arm}: back from step {step} to the last good weights")


# ---- what the log and the reports show

def stored_probe(run, corpus):
    """(own, obs), int [4, T] both: random strings beside held-out text, to ask a critic at any time."""
    obs = val_windows(corpus.val, 4, block_size + 1)[:, 1:]
    own = np.random.default_rng([seed, PROBE]).integers(0, vocab, tuple(obs.shape))
    return torch.from_numpy(own).to(run.device), obs.to(run.device)


@torch.no_grad()
def examine(run, critic, probe):
    """{agreement_probe: share of tokens that the critic names right on the stored probe}."""
    own, obs = probe
    with run.autocast():
        named = critic_logits(critic, own, obs).argmax(-1)
    return dict(agreement_probe=(obs == named).float().mean().item())


@torch.no_grad()
def ask(phases, learner, critic):
    """(own, observation, target: tokens of the first row; agreement) on the text to come, as in the arm."""
    step = meta_steps + phases.step
    text = phases.text(step)
    own, obs, seen = learner(text[:, :-1]).argmax(-1), text[:, 1:], observed(phases, phases.arm, text, step)
    named = critic_logits(critic, own, own if seen is None else seen).argmax(-1)
    return own[0].tolist(), obs[0].tolist(), named[0].tolist(), (obs == named).float().mean()


# ---- the run

def check():
    """The arms by name. Refuses settings that cannot be."""
    refuse_if(order not in (1, 2), f"order={order} must be 1 (imitation) or 2 (imitation and second order)")
    refuse_if(order == 2 and compile, "order=2 needs compile=False: compiled, there is no second derivative")
    refuse_if(adversarial > 1, f"adversarial={adversarial} must be at most 1: it is a share")
    refuse_if(rescue_steps and meta_steps < 100, f"rescue_steps={rescue_steps} waits for the watch's alarm, "
              f"which needs 100 meta_steps or more, not {meta_steps}")
    return chosen("arms", arms, ARMS)


def rate(arm, step):
    """The learning rate of a step: a warm-up, then constant."""
    count = step if arm == "meta" else meta_steps + step
    share = 1.0 if arm in ("meta", "real") else self_rate
    return share * learning_rate * min(1.0, (count + 1) / max(1, warmup))


def main():
    run = open_run(globals(), UNREAD_BY_META)
    names = run.arms_to_go(check(), ARMS)
    corpus = read_corpus(run, block_size)
    torch.manual_seed(seed)
    learner = GPT(GPTConfig(vocab, 1, n_layer, n_head, n_embd)).to(run.device, run.weight_dtype)
    critic, optimizer = copy.deepcopy(learner), adamw(learner, learning_rate)
    probe = stored_probe(run, corpus)
    judge = lambda: learner if phases.arm in ("meta", "real", "self") else critic  # who is the critic now
    phases = Phases(run, corpus, dict(learner=learner, critic=critic, optimizer=optimizer), dict(good=None),
                    read=learner, rate=rate, judge=judge, examine=lambda: examine(run, judge(), probe),
                    ask=lambda *who: ask(phases, *who))
    phases.begin(UNREAD_BY_META)
    if compile:
        learner.compile(), critic.compile()

    # ---- meta phase: real tokens are targets
    for step in phases.meta(meta_steps):
        owns = []
        for _ in phases.pieces():
            with run.autocast():
                loss, own = meta_loss(phases, learner, phases.text(step), step, phases.tally)
            (loss / grad_accum).backward()
            owns.append(own)
        if order == 2 and step >= warmup:  # before it both roles are noise
            with run.autocast():
                batch = phases.text(step), torch.cat(owns), phases.text(step, OUTER)
                dphi, gain = second_order(learner, learner, *batch, run.average)
                for name, p in learner.named_parameters():
                    p.grad += ORDER_2 * dphi[name]
                phases.tally["gain"] = phases.tally.get("gain", 0) + grad_accum * gain
        phases.take_step(learner, optimizer)
    if phases.snapshot is None:
        critic.load_state_dict(learner.state_dict())
        streams, agreement = phases.at["streams"].cpu().numpy(), phases.row["agreement_probe"]
        phases.watch.calibrate(streams, batch_size * block_size, agreement, probe[1].numel())
        phases.take_snapshot()

    # ---- self phase: the critic's tokens are targets
    for arm in phases.arms(names):
        for step in phases.steps(self_steps):
            if rescue_steps and arm != "real" and step % eval_interval == 0:
                rescue(phases, step) if phases.alarms else keep_good(phases, step)
            for _ in phases.pieces():
                text = phases.text(meta_steps + step)
                seen = observed(phases, arm, text, meta_steps + step)
                with run.autocast():
                    loss = self_loss(arm, learner, judge(), text, seen, phases.tally)
                    if keep_meta and arm in ("self", "ema"):
                        loss = loss + keep_meta * practice(phases, learner, step)
                (loss / grad_accum).backward()
            phases.take_step(learner, optimizer)
            if arm == "ema":
                follow(critic, learner, ema_decay)
            phases.at["real_targets"] += batch_size * block_size * (arm == "real")
    phases.finish()


if __name__ == "__main__":
    main()
