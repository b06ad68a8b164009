"""
Stage 2: can a language model learn from how far the gist of its own text is from the gist of the truth?

    python gist_bottleneck.py                                      # two cores, about 2 minutes
    python gist_bottleneck.py --chunk=8 --n_gist=2                 # any setting below
    torchrun --standalone --nproc_per_node=2 gist_bottleneck.py    # the same run on two ranks

Meta phase: cross entropy, on text cut into chunks, each with gist tokens G. Later chunks see an earlier one
through its gists alone, so what they need of it must pass through; full and none are the controls:

                    gist                        full                    none
                x0 x1 G0 x2 x3 G1        x0 x1 G0 x2 x3 G1       x0 x1 G0 x2 x3 G1
        x2       .  .  1  1  .  .         1  1  1  1  .  .        .  .  .  1  .  .
        x3       .  .  1  1  1  .         1  1  1  1  1  .        .  .  .  1  1  .

    gist share = (none − gist) / (none − full), cross entropies of the chunks that have earlier ones

Self phase: after every true prefix the learner p has its own tokens v, the likeliest; the critic reads each,
and the true token x, in that prefix, and gives their gists. With d the distance of two gists:

    K(v, v′) = softmax_v′(−d²(v, v′) / τ)    over own tokens; K(x, ·): the row of the one whose gist is x's
    praise    −Σ_v a(v) log p_v,  a(v) = K(x, v) − Σ_v′ p_v′ K(v′, v), held fixed   zero at the truth, in mean
    energy    E d(y, x) − ½ E d(y, y′)                                             proper, and weak
    plain     E d(y, x)                                     lowest on the most typical text: it destroys

If no own token has the gist of x, the truth is "none of these", an outcome of its own. Spans of several own
tokens are sampled, and learned from by the score function.

An arm is one self phase. real: cross entropy. frozen, self, ema: the critic is the learner of the end of the
meta phase, now, or its moving average. shuffled, sharpen: as frozen, but x is another text's, or what the
learner is likeliest to say. forecast, random: what the critic expects next, or random numbers, for gists.
oracle: cross entropy on the wording that judges, where there are two (wordings.py).
"""
import copy

import numpy as np
import torch
import torch.nn.functional as F

from checkpoints import read_bottleneck
from configurator import chosen, refuse_if
from corpus import corpus_id, val_windows
from equations import follow, log_softmax, praise
from gists import (LARGEST_FORECAST, Space, carried, layout, make_spaces, past_of, read, score_function,
                   spans_at, squared_distances, starts_of, steadiness, vectors, write_spans)
from model import GPT, GPTConfig, adamw
from phases import REAL, Phases
from prepare_data import read_corpus
from run import open_run
from watch import note, streams
from wordings import NAME, world

# --- experiment
arms = "real,frozen,shuffled,random"  # any of these, and self, ema, sharpen, forecast, oracle
controls = "full,none"  # masks that the meta phase trains beside gist: any of full, none, with commas
meta_steps = 500        # steps of cross entropy, for each mask
self_steps = 250        # steps of each arm, on the distance of gists
# --- gists
chunk = 4               # text tokens in a chunk
n_gist = 1              # gist tokens at its end
# --- signal
span = 1                # own tokens after each true prefix; with span = chunk every chunk is written anew
every = 2               # own spans begin after every so many prefixes, others at each step
candidates = 8          # own spans at each prefix: the likeliest tokens, or samples of longer spans
distance = "praise"     # "praise" | "energy" | "plain": the loss over distances, see above
tau = 0.1               # what counts as alike, where two own spans at one prefix are at d² = 1 on average
critic_from = ""        # the folder of another run, of any size, whose model is the critic; "": the learner's
ema_decay = 0.999       # arm ema: the critic's weights are this share old, the rest the learner's, each step
# --- model
n_layer = 3             # blocks; the gist is what enters the last one
n_head = 4              # heads in each
n_embd = 96             # width
block_size = 128        # text tokens in a sequence
# --- data
dataset = "plays"       # plays, kjv-asv, tinyshakespeare, fineweb-edu, or a text file or folder of your own
vocab = 256             # tokens: 256 is plain bytes, 50257 is GPT-2's, any other a BPE trained on the corpus
train_tokens = 0        # use only the first so many training tokens, repeated; 0 is all
both_wordings = False   # of kjv-asv, a text in two wordings: the meta phase reads them by turns
# --- optimisation
batch_size = 8          # sequences a step, over all ranks
learning_rate = 6e-3    # AdamW, in the meta phase, the last 30 % of which it falls to that of the self phase
self_learning_rate = 2e-4  # a learner at its peak rate would gain from any signal that slows it
warmup = 50             # steps from 0 to learning_rate, at the start of the meta phase
grad_clip = 1.0         # largest gradient norm
grad_accum = 1          # pieces of a rank's batch, one after the other: the same step in less memory
decay = 1.0             # the share of its learning rate that an arm ends with; it falls in a line
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
wandb_log = "no"        # "no" | "online" | "offline": also log to Weights & Biases

ARMS = ("real", "oracle", "self", "frozen", "ema", "shuffled", "sharpen", "forecast", "random")
# Settings that the meta phase does not read, beside those of configurator.SELF_PHASE.
UNREAD_BY_META = ("span", "every", "candidates", "distance", "tau", "critic_from")
# Independent streams of data and of random numbers.
_, FOREIGN, CHANCE, RULER, PROBE, TABLE = range(6)
RULER_STEPS = 100        # on which the watch is calibrated, the fewest that it takes


# ---- what the learner says, and would say itself

def real_loss(model, lay, text, how="gist", tally=None):
    """Cross entropy of text [B, T + 1] read under a mask, nats a token: the loss of real targets."""
    logits = read(model, lay, text[:, :-1], how)
    loss = F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
    if tally is not None:
        note(tally, loss, log_softmax(logits.detach()), text[:, 1:-1], agreement=torch.ones_like(loss))
    return loss


def own_starts(where, step=None):
    """int [N]: where own spans begin; at a step, at every `every`-th of these places."""
    starts = starts_of(block_size, chunk, span, where)
    return starts if step is None else starts[step % every::every]


def with_none(logp):
    """Log probabilities [..., M] of own tokens and, last, that of none of them."""
    return torch.cat((logp, torch.log1p(-logp.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))), -1)


def own_spans(phases, learner, lay, x, starts, step):
    """(own spans, int [B, N, M, span]; their log probabilities; the learner's logits on x, [B, T, V]): the
    likeliest tokens, with log probabilities [B, N, M + 1], "none" last; or samples of longer spans."""
    past = {}
    logits = read(learner, lay, x, cache=past)
    before = log_softmax(logits[:, starts - 1])
    if span == 1:
        logp, own = before.topk(candidates)
        return own.unsqueeze(-1), with_none(logp), logits
    u = phases.chance(step, (block_size, candidates, span), CHANCE)[:, starts]
    return *write_spans(learner, lay, past, before, starts, u), logits


# ---- the signal. d2: squared distances [..., M + 1, M + 1] of M own spans and, last, the truth

def kernel(d2):
    """K [..., M, M]: K(v, v′) = softmax_v′(−d²(v, v′) / τ)."""
    return (-d2 / tau).softmax(-1)


def target_of(d2):
    """What the critic takes the truth for: float [..., M + 1] over M own spans and none of them.

    The row of the kernel of the own span whose gist is the truth's; if there is none, "none".
    """
    nearest, which = d2[..., -1, :-1].min(-1)
    rows = kernel(d2[..., :-1, :-1])
    row = rows.gather(-2, which[..., None, None].expand(*which.shape, 1, rows.size(-1)))[..., 0, :]
    met = (nearest < max(0.01 * tau, 1e-5)).unsqueeze(-1)  # neither kernel nor float32 can tell them apart
    return torch.cat((row * met, (~met).to(row.dtype)), -1)


def praise_loss(logp, d2, target):
    """−Σ_v a(v) log p_v; "none" is like itself alone."""
    M = d2.size(-1) - 1
    alike = F.pad(kernel(d2[..., :-1, :-1]), (0, 1, 0, 1)) + F.pad(d2.new_ones(1, 1), (M, 0, M, 0))
    return -(praise(target, logp.detach().exp(), alike) * logp).sum(-1)


def plain_loss(logp, d2, target):
    """E d(y, x); "none" is as far from everything as two own spans are on average."""
    p, d = logp.exp(), (d2 + 1e-12).sqrt()
    return (p[..., :-1] * d[..., -1, :-1]).sum(-1) + p[..., -1]


def energy_loss(logp, d2, target):
    """E d(y, x) − ½ E d(y, y′)."""
    p, apart = logp.exp(), F.pad((d2[..., :-1, :-1] + 1e-12).sqrt(), (0, 1, 0, 1), value=1.0)
    return plain_loss(logp, d2, target) - 0.5 * ((p.unsqueeze(-2) @ apart).squeeze(-2) * p).sum(-1)


LOSS = dict(praise=praise_loss, energy=energy_loss, plain=plain_loss)  # logp, target: [..., M + 1]


def hear(phases, arm, learner, critic, space, lay, text, starts, step):
    """(own spans, log probabilities, d2, target, agreement, logits): own spans beside those of the text, int
    [B, T + 1]; in the arm shuffled another's. agreement: of target and truth, if that is among own spans."""
    x, truth = text[:, :-1], spans_at(text, starts, span)
    own, logp, logits = own_spans(phases, learner, lay, x, starts, step)
    seen = own[:, :, 0] if arm == "sharpen" else truth
    if arm == "shuffled":
        seen = spans_at(world(phases, meta_steps + step, FOREIGN), starts, span)
    with torch.no_grad():  # gists are data to the learner
        past = past_of(space, critic, lay, x)
        g = vectors(space, critic, lay, past, starts, torch.cat((own, seen.unsqueeze(2)), 2))
    d2, among = squared_distances(g), (own == truth.unsqueeze(2)).all(-1)
    target = target_of(d2)
    counts = torch.stack(((target[..., :-1] * among).sum(), among.any(-1).sum()))
    phases.run.average([counts])  # a ratio of means, so that ranks agree
    agreement = counts[0] / counts[1].clamp_min(1e-6)
    return own, logp, d2, target, agreement, logits


def self_loss(phases, arm, learner, critic, space, lay, text, step, tally):
    """Distance of own and true gists, in mean over prefixes: what an arm trains on."""
    starts = own_starts(text.device, step)
    _, logp, d2, target, agreed, logits = hear(phases, arm, learner, critic, space, lay, text, starts, step)
    if span == 1:
        loss = LOSS[distance](logp, d2, target).mean()
    else:
        far = 1 - (-d2 / tau).exp() if distance == "praise" else (d2 + 1e-12).sqrt()
        value, weight = score_function(far, proper=distance != "plain")
        loss = (weight * logp).mean()
        loss = loss + (value.mean() - loss).detach()
    note(tally, loss, log_softmax(logits.detach()), text[:, 1:-1], agreement=agreed,
         echo=target[..., 0].mean(), outside=target[..., -1].mean(),  # the likeliest own token comes first
         target_entropy=torch.special.entr(target).sum(-1).mean())
    return loss


# ---- the critic: how its gists are compared, how it stands, what the reports show

@torch.no_grad()
def examine(run, corpus, critic, space, lay):
    """How the critic stands on stored text: see `steadiness`."""
    x, rng = val_windows(corpus.val, 4, block_size).to(run.device), np.random.default_rng([seed, PROBE])
    with run.autocast():
        return steadiness(space, critic, lay, x, own_starts(run.device), span, rng)


@torch.no_grad()
def calibrate(phases, learner, critic, space, lay):
    """Shows the watch what is healthy: the streams on fresh text after the meta phase; nothing moves."""
    watches, tally = phases.kept["watches"], {}
    if space.kind not in watches:
        for step in range(1, RULER_STEPS + 1):
            for _ in phases.pieces():
                with phases.run.autocast():
                    text = phases.text(step, RULER)
                    self_loss(phases, "frozen", learner, critic, space, lay, text, step, tally)
        healthy = streams(tally, grad_accum)
        phases.run.average([healthy])
        agreement = examine(phases.run, phases.corpus, critic, space, lay)["agreement_probe"]
        phases.watch.calibrate(healthy.cpu(), batch_size * block_size, agreement, 4 * block_size)
        watches[space.kind] = phases.watch.state_dict()
    phases.watch.load_state_dict(watches[space.kind])


@torch.no_grad()
def ask(phases, learner, critic, space, lay):
    """(own, observation, target, agreement) on the text to come as the arm reads it: first tokens of spans,
    of its first row. target: of the critic's heaviest, None where that is none of the own spans."""
    text, starts, arm = world(phases, meta_steps + phases.step), own_starts(phases.run.device), phases.arm
    own, *_, target, agreement, _ = hear(phases, arm, learner, critic, space, lay, text, starts, phases.step)
    said = own[0, ..., 0].tolist()
    named = [(spans + [None])[heaviest] for spans, heaviest in zip(said, target[0].argmax(-1).tolist())]
    return [spans[0] for spans in said], text[0, starts].tolist(), named, agreement


# ---- the run

def check():
    """(arms, masks by name). Refuses settings that cannot be."""
    names, masks = chosen("arms", arms, ARMS), chosen("controls", controls, ("full", "none"))
    refuse_if(chunk < 1 or block_size % chunk or block_size < 2 * chunk,
              f"chunk={chunk} must cut block_size={block_size} into two whole chunks or more")
    refuse_if(not 1 <= n_gist <= chunk, f"n_gist={n_gist} must be from 1 to chunk={chunk}")
    refuse_if(not 1 <= span <= chunk, f"span={span} must be from 1 to chunk={chunk}")
    refuse_if(n_layer < 2, f"n_layer={n_layer} must be 2 or more: the gist is what enters the last block")
    starts, most = len(own_starts("cpu")), vocab - 1 if span == 1 else 10**6
    refuse_if(not 1 <= every <= starts, f"every={every} must be from 1 to {starts}, the prefixes there are")
    refuse_if(not 2 <= candidates <= most, f"candidates={candidates} must be from 2 to {most}")
    refuse_if(not meta_steps, f"meta_steps={meta_steps} must be above 0")
    refuse_if(not tau > 0, f"tau={tau} must be above 0")
    refuse_if(span > 1 and "sharpen" in names, f"span={span} must be 1 for the arm sharpen")
    refuse_if("forecast" in names and vocab > LARGEST_FORECAST,
              f"arms={arms!r}: vocab={vocab} must be at most {LARGEST_FORECAST} for the arm forecast")
    refuse_if(dataset != NAME and (both_wordings or "oracle" in names),
              f"dataset={dataset!r}: both_wordings and the arm oracle need {NAME!r}")
    refuse_if(critic_from and {"self", "ema"} & set(names),
              "arms 'self' and 'ema' have the learner for a critic: leave them out with critic_from")
    return names, ["gist", *masks]


def rate(arm, step):
    """The learning rate: warm-up, plateau, in the last 30 % of the meta phase a fall to the self phase's."""
    if arm != "meta":
        return self_learning_rate
    left = min(1.0, (meta_steps - step) / (0.3 * meta_steps))
    top = self_learning_rate + (learning_rate - self_learning_rate) * left
    return top * min(1.0, (step + 1) / max(1, warmup))


def set_up(run, corpus, masks, lay):
    """(the models by mask, their optimizers, the critic, its weights or None, the Phases)."""
    models, optimizers, theirs = {}, {}, run.resumed["kept"]["sizes"] if run.resumed else run.settings
    if critic_from and not run.resumed:
        theirs = read_bottleneck(critic_from, run.device, corpus_id(corpus),
                                 vocab=vocab, chunk=chunk, n_gist=n_gist)
    sizes = {k: theirs[k] for k in ("n_layer", "n_head", "n_embd")}  # of the critic
    n_special = n_gist + 1  # a row more than is used, as in the runs behind results/
    new = lambda *sizes: GPT(GPTConfig(vocab, n_special, *sizes)).to(run.device, run.weight_dtype)
    for how in masks:
        torch.manual_seed(seed)
        models[how] = new(n_layer, n_head, n_embd)
        optimizers[how] = adamw(models[how], learning_rate)
    learner, critic = models["gist"], new(*sizes.values()).requires_grad_(False)
    critic.load_state_dict(theirs.get("weights", critic.state_dict()))  # kept, for a resumed meta phase
    parts = dict(learner=learner, critic=critic, optimizer=optimizers["gist"],
                 **{how: models[how] for how in masks[1:]},
                 **{f"optimizer_{how}": optimizers[how] for how in masks[1:]})
    judge = lambda: learner if phases.arm == "meta" else critic

    def columns():  # of the log
        found = {} if phases.arm in REAL else examine(run, corpus, judge(), space_of(phases), lay)
        for how in masks[1:] if phases.arm == "meta" else ():
            found[f"gold_{how}"], _ = phases.gold(lambda x: read(models[how], lay, x, how))
        return dict(outside=None, **found)
    phases = Phases(run, corpus, parts, dict(sizes=sizes, spaces={}, watches={}, found={}),
                    read=lambda x: read(learner, lay, x), rate=rate, judge=judge, examine=columns,
                    ask=lambda learner, critic: ask(phases, learner, critic, space_of(phases), lay))
    return models, optimizers, critic, theirs.get("weights"), phases


def space_of(phases):
    """What stands for a span in the arm."""
    spaces = phases.kept["spaces"]
    return Space(**spaces.get(phases.arm, spaces["gist"])) if spaces else Space("gist")


def begin_arms(phases, learner, critic, theirs, lay):
    """What the arms start from: the critic, and how its gists are compared."""
    kept, c = phases.kept, critic.config
    learner.load_state_dict(phases.snapshot["learner"])
    critic.load_state_dict(theirs or phases.snapshot["critic" if critic_from else "learner"])
    x, starts = phases.text(0, RULER)[:, :-1], own_starts(phases.run.device)
    with torch.no_grad():
        own, _, _ = own_spans(phases, learner, lay, x, starts, 0)
    rng = np.random.default_rng([seed, TABLE])
    spaces, filled = make_spaces(critic, lay, x, starts, own, rng, phases.run.average)
    kept["found"].update(directions=spaces["gist"].whiten.size(1), directions_filled=filled)
    kept.update(sizes=dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd), watches={},
                spaces={kind: space._asdict() for kind, space in spaces.items()})
    phases.snapshot["critic"] = copy.deepcopy(critic.state_dict())


def main():
    run = open_run(globals(), UNREAD_BY_META)
    names, masks = check()
    names = run.arms_to_go(names, ARMS)
    corpus, lay = read_corpus(run, block_size), layout(block_size, chunk, n_gist, vocab, run.device)
    models, optimizers, critic, theirs, phases = set_up(run, corpus, masks, lay)
    learner = models["gist"]
    phases.begin(UNREAD_BY_META)
    for model in models.values() if compile else ():
        model.compile()

    # ---- meta phase: cross entropy through the bottleneck, and through the masks of the controls
    for step in phases.meta(meta_steps):
        for how in masks:
            for group in optimizers[how].param_groups:
                group["lr"] = rate("meta", step)
            for _ in phases.pieces():
                with run.autocast():
                    tally = phases.tally if how == "gist" else None
                    loss = real_loss(models[how], lay, world(phases, step), how, tally)
                (loss / grad_accum).backward()
            phases.take_step(models[how], optimizers[how], noted=how == "gist")
    phases.drop(*(f"optimizer_{how}" for how in masks[1:]))
    if phases.snapshot is None:
        texts = val_windows(corpus.val, eval_windows, block_size + 1).to(run.device)
        phases.kept["found"] = carried(models, lay, texts, chunk, batch_size // grad_accum, run.autocast)
        run.say(f"cross entropy of later chunks, and what gists carry: {phases.kept['found']}")
        phases.take_snapshot()
    phases.drop(*masks[1:])
    if phases.arm == "start":
        begin_arms(phases, learner, critic, theirs, lay)

    # ---- self phase: the distance of own and true gists; no real token is a target
    for arm in phases.arms(names):
        space = space_of(phases)
        if phases.at["step"] == 0:
            calibrate(phases, learner, critic, space, lay)
        for step in phases.steps(self_steps):
            for _ in phases.pieces():
                text = world(phases, meta_steps + step)
                with run.autocast():
                    if arm in REAL:
                        loss = real_loss(learner, lay, text, "gist", phases.tally)
                    else:
                        loss = self_loss(phases, arm, learner, critic, space, lay, text, step, phases.tally)
                (loss / grad_accum).backward()
            phases.take_step(learner, optimizers["gist"])
            if arm in ("self", "ema"):
                follow(critic, learner, ema_decay if arm == "ema" else 0.0)
            phases.at["real_targets"] += batch_size * block_size * (arm in REAL)
    phases.finish(**phases.kept["found"])


if __name__ == "__main__":
    main()
