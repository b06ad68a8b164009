"""
Stage 1: can a language model learn from tokens that it names itself?

    python self_ce.py                                          # two cores, about 3 minutes
    python self_ce.py --arms=self,real --meta_steps=1000       # any setting below
    torchrun --standalone --nproc_per_node=2 self_ce.py        # the same numbers on two ranks

The learner p predicts the tokens of x; `pred` is its own output. The critic, which is the same GPT, reads

    pred_0 obs_0 LOSS  pred_1 obs_1 LOSS  ...

and its distribution q at each LOSS names the token that the learner should have said:

    meta phase   CE(p, x) + CE(q, obs)      real tokens are targets: the critic learns to judge
    self phase   CE(p, argmax q)            the critic's tokens are targets: no real token is

An arm is one self phase. All arms start from the same snapshot of weights and optimizer, and see the same data.
"""
import copy
import difflib

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, jvp

from configurator import configure, refuse
from model import GPT, GPTConfig, adamw, rollout, sample_tokens
from prepare_data import decode, get_batch, open_corpus, prepare, val_windows
from watch import Gold, new_track, summarise, track_gold

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
# --- levers
ema_decay = 0.999       # arm ema: the critic's weights are this share old, the rest the learner's, each step
keep_meta = 0.0         # weight of the critic's own loss in the self phase, where the critic is made of the learner
keep = "random"         # "random" | "recorded": on random strings (no leak), or on pairs of the meta phase (leaks)
hack_margin = 0.1       # nats above the best gold, three evaluations running, that count as hacked
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
wandb_log = "no"        # "no" | "online" | "offline": also log to Weights & Biases

ARMS = ("self", "frozen", "ema", "real", "shuffled", "sharpen")
TEXT, FOREIGN, CHANCE, OUTER, KEPT, PROBE = range(6)  # independent streams of data and of random numbers


# ----------------------------------------------------------------------------------------------
# the signal

def critic_logits(critic, own, obs):
    """[B, T, V]: what the critic names at each LOSS, having read own output and observation, int [B, T] both."""
    loss = torch.full_like(obs, vocab)  # LOSS, the one special token, follows the vocabulary
    triples = torch.stack((own, obs, loss), dim=2).flatten(1)  # [B, 3T]
    return critic(triples, read=slice(2, None, 3))


def align(logits, target):
    """Pairs of rows that speak of the same token: with loss_reads = "next", LOSS_t speaks of position t + 1."""
    return (logits, target) if loss_reads == "obs" else (logits[:, 1:], target[:, :-1])


def critic_loss(critic, own, obs):
    """Imitation: cross entropy of the critic at LOSS against the observation, nats a token."""
    named = critic_logits(critic, own, obs)
    observed, named = align(obs, named)
    return F.cross_entropy(named.flatten(0, 1), observed.flatten())


@torch.no_grad()  # the target is data to the learner: no gradient may flow into the critic through it
def critic_target(critic, own, obs):
    """The critic's target: probabilities [B, T, V] if soft, else tokens [B, T]."""
    named = critic_logits(critic, own, obs)
    return named.softmax(-1) if target == "soft" else named.argmax(-1)


def own_output(logits, u):
    """The learner's own tokens [B, T] from its logits, greedy or sampled with the uniform numbers u [B, T]."""
    logits = logits.detach()
    return logits.argmax(-1) if pred == "argmax" else sample_tokens(logits, u)


def second_order(model, x, obs, own, outer_x, average):
    """How the critic should have moved the learner's step: (dφ by name, gain in nats).

    One inner step on the critic's soft targets T_φ, judged by the cross entropy O of other text:

        L(θ, φ) = −Σ_v T_φ(v) log p_θ(v)        u = g/‖g‖,  g = ∇_θ L        θ' = θ − a u
        λ = ∇O(θ')       w = −(a/‖g‖)(λ − u⟨u, λ⟩)       dφ = ∂_φ ⟨∇_θ L, w⟩ = ∂_φ [−Σ_v T_φ(v) d/dε log p_{θ+εw}(v)]

    θ and φ are the same numbers in two roles; dφ is the derivative through the critic's role. The last form needs
    one forward-mode derivative and no double backward. g and λ are averaged over ranks, so that N ranks take the one
    step of the whole batch; dφ is linear in what remains and is averaged with the other gradients.
    """
    theta = {n: p.detach() for n, p in model.named_parameters()}
    phi = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}

    def log_p(th, fused=True):
        return functional_call(model, th, (x,), dict(fused=fused)).log_softmax(-1)

    def inner(th):
        logp, soft = align(log_p(th), teacher.detach())
        return -(soft * logp).sum(-1).mean()

    def outer(th):
        return F.cross_entropy(functional_call(model, th, (outer_x[:, :-1],)).flatten(0, 1), outer_x[:, 1:].flatten())

    def critic(triples, **options):
        return functional_call(model, phi, (triples,), options)

    teacher = critic_logits(critic, own, obs).softmax(-1)
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
    """This rank's rows of uniform numbers [B, ...] in [0, 1), a pure function of (seed, step), float64."""
    share = batch_size // run.ranks
    numbers = np.random.default_rng([seed, stream, step]).random((batch_size, *shape))
    return torch.from_numpy(numbers[run.rank * share:(run.rank + 1) * share]).to(run.device)


def kept_pairs(run, corpus, model, snapshot, step):
    """(own, obs) that keep a critic's skill while it learns from itself.

    "random": unrelated random strings; to copy them teaches nothing about text. "recorded": what the snapshot says
    to the meta phase's text, and that text; through the shared weights real tokens are then targets again.
    """
    if keep == "random":
        own, obs = (chance(run, step, (2, block_size), KEPT) * vocab).long().unbind(1)
        return own, obs
    w = text(run, corpus, step % meta_steps)
    with torch.no_grad():
        return functional_call(model, snapshot, (w[:, :-1],)).argmax(-1), w[:, 1:]


def stored_probe(run, corpus):
    """(own, obs), int [8, T] both: random strings beside held-out text, on which a critic can be asked any time."""
    obs = val_windows(corpus.val, 8, block_size + 1)[:, 1:]
    own = np.random.default_rng([seed, PROBE]).integers(0, vocab, tuple(obs.shape))
    return torch.from_numpy(own).to(run.device), obs.to(run.device)


# ----------------------------------------------------------------------------------------------
# steps

def meta_loss(run, model, x, obs, step, tally):
    """CE(p, x) + CE(q, obs): real tokens are targets, the learner's and the critic's. A scalar, nats."""
    logits = model(x)
    own = own_output(logits, chance(run, step, (block_size,)))
    named = critic_logits(model, own, obs)
    observed, judged = align(obs, named)
    language = F.cross_entropy(logits.flatten(0, 1), obs.flatten())
    imitation = F.cross_entropy(judged.flatten(0, 1), observed.flatten())
    note(tally, language, logits, own, obs, named.detach().argmax(-1))
    return language + imitation, own


def self_loss(run, arm, learner, critic, x, obs, seen, step, tally):
    """CE(p, target), nats a token: the target is what the critic names, having read own output and observation.

    seen: the observation that the critic reads; obs is what it should be, and only counts how often the two agree.
    """
    logits = learner(x)
    own = own_output(logits, chance(run, step, (block_size,)))
    if arm == "real":
        loss = F.cross_entropy(logits.flatten(0, 1), obs.flatten())
        note(tally, loss, logits, own, obs, obs)
        return loss
    named = critic_target(critic, own, own if arm == "sharpen" else seen)
    said, told = align(logits, named)
    loss = F.cross_entropy(said.flatten(0, 1), told.flatten(0, 1))
    note(tally, loss, logits, own, obs, named.argmax(-1) if target == "soft" else named)
    return loss


@torch.no_grad()
def note(tally, loss, logits, own, obs, named):
    """Adds a step to what the next line of the log will average, without waiting for the device."""
    seen, told = align(obs, named)
    said, _ = align(own, named)
    logp = logits.detach().log_softmax(-1)
    for name, value in dict(steps=torch.ones_like(loss), loss=loss.detach(),
                            agreement=(seen == told).float().mean(), echo=(said == told).float().mean(),
                            output_entropy=-(logp.exp() * logp).sum(-1).mean(),
                            targets=torch.bincount(named.flatten(), minlength=vocab).float()).items():
        tally[name] = tally.get(name, 0) + value


def set_rate(optimizer, step):
    """The learning rate of a step, counted from the start of the meta phase."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * min(1.0, (step + 1) / max(1, warmup))


@torch.no_grad()
def follow(critic, learner):
    """The moving average: critic ← ema_decay · critic + (1 − ema_decay) · learner."""
    torch._foreach_lerp_(list(critic.parameters()), list(learner.parameters()), 1 - ema_decay)


def take_step(run, model, optimizer, loss, tally, extra=None):
    """Backward, average over ranks, clip, step. extra: {name: gradient} to add (second order)."""
    loss.backward()
    if extra:
        for name, p in model.named_parameters():
            p.grad += outer_weight * extra[name]
    params = list(model.parameters())
    run.average([p.grad for p in params])
    norm = torch.nn.utils.clip_grad_norm_(params, grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tally["grad_norm"] = tally.get("grad_norm", 0) + norm


# ----------------------------------------------------------------------------------------------
# the report

def write_row(run, arm, step, steps, tally, learner, critic, gold, probe, optimizer):
    """Logs and shows where the arm stands; returns the row. Empties the tally."""
    run.average(list(tally.values()))
    n = tally["steps"].item() if tally else 0
    mean = {k: (v / n).item() for k, v in tally.items() if v.dim() == 0} if n else {}
    counts = tally["targets"] if n else torch.zeros(vocab)
    share = counts / counts.sum().clamp_min(1)
    nats, bpb = gold(learner)
    own, obs = probe
    with torch.no_grad(), run.autocast():
        seen, named = align(obs, critic_logits(critic, own, obs).argmax(-1))
    total = step + (meta_steps if arm != "meta" else 0)
    row = dict(stage="self_ce", arm=arm, step=step, tokens=total * batch_size * block_size,
               proxy=mean.get("loss"), gold_nats=nats, gold_bpb=bpb, lr=optimizer.param_groups[0]["lr"], grad_norm=mean.get("grad_norm"),
               agreement=mean.get("agreement"), agreement_probe=(seen == named).float().mean().item(),
               echo=mean.get("echo"), output_entropy=mean.get("output_entropy"),
               target_top=share.max().item() if n else None,
               target_entropy=torch.special.entr(share).sum().item() if n else None,
               tok_per_s=run.speed(n * batch_size * block_size))
    if "gain" in mean:
        row["gain"] = mean["gain"]
    run.log(row)
    run.show(row, steps)
    tally.clear()
    return row


@torch.no_grad()
def write_samples(run, arm, learner, critic, corpus):
    """samples.txt: what the learner writes after a held-out prompt, and what the critic makes of its predictions."""
    w = val_windows(corpus.val, 2, block_size + 1).to(run.device)
    u = torch.from_numpy(np.random.default_rng(seed).random((2, 1, block_size))).to(run.device)
    written = rollout(learner, w[:, :-1], [block_size], block_size, u)[:, 0]
    own = learner(w[:, :-1]).argmax(-1)
    named = critic_logits(critic, own, w[:, 1:]).argmax(-1)
    show = lambda ids: repr(decode(corpus.encoding, ids.tolist()))
    run.sample(f"==== after {arm}\n" + "".join(
        f"prompt       {show(w[i, :-1])}\ngoes on      {show(written[i])}\n"
        f"own output   {show(own[i])}\nobservation  {show(w[i, 1:])}\ncritic names {show(named[i])}\n\n"
        for i in range(2)))


# ----------------------------------------------------------------------------------------------
# the run

def check(run):
    """The arms by name, real first: no hack is to be believed before it. Refuses settings that cannot be."""
    names = [a for a in arms.replace(" ", "").split(",") if a]
    for name in names:
        if name not in ARMS:
            near = difflib.get_close_matches(name, ARMS, n=1)
            refuse(f"arms={arms!r}: there is no arm {name!r}; "
                   + (f"did you mean {near[0]!r}?" if near else f"the arms are {', '.join(ARMS)}"))
    if len(set(names)) < len(names):
        refuse(f"arms={arms!r} names an arm twice")
    if order not in (1, 2):
        refuse(f"order={order} must be 1 (imitation) or 2 (imitation and second order)")
    if ema_decay >= 1:
        refuse(f"ema_decay={ema_decay} must be below 1: it is the share of the old weights that stays")
    if loss_reads == "next" and block_size < 2:
        refuse(f"block_size={block_size} must be at least 2 with loss_reads='next'")
    if keep_meta and keep == "recorded" and meta_steps == 0:
        refuse("keep='recorded' needs a meta phase to record from; meta_steps is 0")
    return sorted(names, key=lambda a: a != "real")


def main():
    run = configure(globals())
    names = check(run)
    if run.local_rank == 0:
        prepare(dataset, vocab)
    run.barrier()
    corpus = open_corpus(dataset, vocab)
    for split, tokens in (("train", corpus.train[:train_tokens or None]), ("validation", corpus.val)):
        if len(tokens) <= block_size:
            refuse(f"block_size={block_size} must be below the {len(tokens)} tokens of the {split} split")

    torch.manual_seed(seed)
    learner = GPT(GPTConfig(vocab, 1, n_layer, n_head, n_embd)).to(run.device, run.weight_dtype)
    critic = copy.deepcopy(learner)  # for the arms in which the critic is not the learner itself
    optimizer = adamw(learner, learning_rate)
    parts = dict(learner=learner, critic=critic, optimizer=optimizer)
    at = dict(arm="meta", step=0, track=new_track(), arms={}, meta=None, snapshot=None,
              tokenizer=corpus.meta["tokenizer_sha256"])
    tally = {}
    if run.resumed:
        if run.resumed["tokenizer"] != at["tokenizer"]:
            refuse(f"{corpus.folder} holds another tokenizer than the one that {run.out_dir} was begun with")
        run.restore(at, tally, **parts)
    if compile:
        learner.compile(), critic.compile()
    gold = Gold(val_windows(corpus.val, eval_windows, block_size + 1), corpus.token_bytes, run,
                batch_size // run.ranks)
    probe = stored_probe(run, corpus)
    run.open(need_bytes=20 * sum(p.numel() * p.element_size() for p in learner.parameters()))

    # ---- meta phase: real tokens are targets
    if at["arm"] == "meta":
        run.start_clock(at["step"])
        for step in range(at["step"], meta_steps + 1):
            run.checkpoint(step, at, tally, **parts)
            set_rate(optimizer, step)
            if step % eval_interval == 0 or step == meta_steps:
                row = write_row(run, "meta", step, meta_steps, tally, learner, learner, gold, probe, optimizer)
                track_gold(at["track"], row, hack_margin)
            if step == meta_steps:
                break
            w = text(run, corpus, step)
            with run.autocast():
                loss, own = meta_loss(run, learner, w[:, :-1], w[:, 1:], step, tally)
                extra = None
                if order == 2 and step >= warmup:  # before it both roles are noise, and so is what would be learned
                    extra, gain = second_order(learner, w[:, :-1], w[:, 1:], own, text(run, corpus, step, OUTER),
                                               run.average)
                    tally["gain"] = tally.get("gain", 0) + gain
            take_step(run, learner, optimizer, loss, tally, extra)
        at["meta"] = at["track"]
        at["snapshot"] = copy.deepcopy(dict(learner=learner.state_dict(), optimizer=optimizer.state_dict()))
        write_samples(run, "the meta phase", learner, learner, corpus)

    # ---- self phase: the critic's tokens are targets
    for arm in names:
        if arm in at["arms"]:
            continue
        if at["arm"] != arm:
            learner.load_state_dict(at["snapshot"]["learner"])
            critic.load_state_dict(at["snapshot"]["learner"])
            optimizer.load_state_dict(copy.deepcopy(at["snapshot"]["optimizer"]))
            at.update(arm=arm, step=0, track=new_track())
        judge = learner if arm in ("self", "real") else critic
        run.start_clock(at["step"])
        for step in range(at["step"], self_steps + 1):
            run.checkpoint(step, at, tally, **parts)
            set_rate(optimizer, meta_steps + step)
            if step % eval_interval == 0 or step == self_steps:
                row = write_row(run, arm, step, self_steps, tally, learner, judge, gold, probe, optimizer)
                if track_gold(at["track"], row, hack_margin):
                    run.say(f"{arm}: hacked at step {at['track']['steps_to_hack']}, gold {row['gold_nats']:.3f} after a "
                            f"best of {at['track']['gold_best']:.3f}")
            if step == self_steps:
                break
            w = text(run, corpus, meta_steps + step)
            seen = text(run, corpus, meta_steps + step, FOREIGN) if arm == "shuffled" else w
            with run.autocast():
                loss = self_loss(run, arm, learner, judge, w[:, :-1], w[:, 1:], seen[:, 1:], meta_steps + step, tally)
                if keep_meta and arm in ("self", "ema"):
                    pairs = kept_pairs(run, corpus, learner, at["snapshot"]["learner"], step)
                    loss = loss + keep_meta * critic_loss(learner, *pairs)
            take_step(run, learner, optimizer, loss, tally)
            if arm == "ema":
                follow(critic, learner)
        at["arms"][arm] = at["track"]
        write_samples(run, f"arm {arm}", learner, judge, corpus)

    at["arm"] = "done"
    run.checkpoint(0, at, tally, **parts)
    run.write_json("summary.json", summarise(run, at["meta"], meta_steps, at["arms"], self_steps))
    run.close()


if __name__ == "__main__":
    main()
