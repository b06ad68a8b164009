"""
What a run's networks know, and what learning from a signal changed in the learner. Tables, markdown.

    python studies/probe.py out/gist_bottleneck             # one run
    python studies/probe.py out/study-2-meaning/critic/?    # several seeds: means and 95 % intervals

Stage 2, where tokens have synonyms: what share of a token's nearest they are, by gists, forecasts and
embeddings. On the plays: where cross entropy fell, by quintile of a reference model's entropy and by class of
token, in the arms frozen, forecast and random and in training on real tokens at equal total gain: real
training is gone through until it has gained as much; and how well a linear map reads play, speaker and place
in the line off a chunk's gists, beside a bag of its tokens.

Stage 3, where tokens have synonyms: the precision of the critic's embeddings. On planted-facts: how many of
the questions each arm's learner answers. On kjv-asv: the cross entropy of each arm on the King James text of
what was observed, by class of word, and on further books; and how many of the words that stand for others the
critic finds.
"""
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's modules
from checkpoints import read_end
from configurator import refuse, refuse_if
from corpus import decode, get_batch, val_windows, windows
from gists import Space, layout, past_of, read, squared_distances, starts_of, vectors, whitening
from model import adamw
from planted import LAGS, planted_answers, true_classes
from plot import interval
from sample import model_of, read_run
from wordings import NAME, classes, pairs

WINDOWS = 256       # held-out texts on which cross entropy is compared
KNOWN = 400_000     # tokens of the training text whose chunks are read
QUESTIONS = 512     # of planted-facts, at most
VERSES = 1024       # texts of kjv-asv on which cross entropy is compared
FUNCTION_WORDS = frozenset("""the and to of i you a my in that is not me it with for be his your this but he
have as thou him so will what her thy all by do no shall if are we thee our on at or from was they she o who
an them their""".split())
CLASSES = ("function words", "other words", "names", "punctuation", "spaces", "line breaks")


def set_up(folder):
    """(checkpoint, corpus, layout or None) of a run of stage 2 or 3."""
    state, corpus = read_run(folder)
    c = state["config"]
    if state["stage"] == "gist_bottleneck":
        return state, corpus, layout(c["block_size"], c["chunk"], c["n_gist"], c["vocab"], "cpu")
    if state["stage"] != "meta_gist":
        refuse(f"{folder} is of {state['stage']}.py; a run of gist_bottleneck.py or meta_gist.py is needed")
    return state, corpus, None


def learner_of(state):
    """The learner at the end of the meta phase."""
    return model_of(state["config"], state["snapshot"]["learner"])


def learners_of(folder, state):
    """{arm: the learner at its end}, and as "meta" that of the end of the meta phase, of a run of stage 3."""
    ends = {arm: read_end(folder, arm, "meta_gist")["weights"] for arm in state["arms"]}
    return dict(meta=learner_of(state), **{arm: model_of(state["config"], end) for arm, end in ends.items()})


def train_tokens_of(state, corpus):
    return corpus.train[:state["config"]["train_tokens"] or None]


# ---- classes that are known

@torch.no_grad()
def alike(folder, texts=4):
    """{kind of gist: share of a token's m − 1 nearest that are its synonyms}, of m tokens for each meaning.

    All are read after each prefix of held-out text by the run's own model, and compared as its arms do.
    """
    state, corpus, lay = set_up(folder)
    c, m, model, found = state["config"], corpus.encoding.spellings, learner_of(state), {}
    x = val_windows(corpus.val, texts, c["block_size"])
    starts = starts_of(c["block_size"], c["chunk"], 1, "cpu")
    spans = torch.arange(c["vocab"]).expand(texts, len(starts), -1)[..., None]
    classes = torch.from_numpy(true_classes(corpus))
    table = F.normalize(model.embed.weight[:c["vocab"]], dim=-1)
    for kind, space in dict(gists=Space("gist"), forecasts=Space("forecast"),
                            embeddings=Space("random", table=table)).items():
        g = vectors(space, model, lay, past_of(space, model, lay, x), starts, spans)
        whiten, _ = whitening(g, lambda tensors: None, level=kind != "forecasts")
        d2 = squared_distances(g @ whiten) + 1e9 * torch.eye(c["vocab"])
        near = d2.topk(m - 1, largest=False).indices
        found[kind] = (classes[near] == classes[:, None]).float().mean().item()
    return found


def precision(folder):
    """Of the tokens nearest to each by the critic's embeddings, the share of its class: `share_alike`."""
    state, corpus, _ = set_up(folder)
    often = np.bincount(train_tokens_of(state, corpus), minlength=corpus.vocab_size)
    return share_alike(state["snapshot"]["critic"]["E"], true_classes(corpus), often)


def share_alike(E, classes, often):
    """The share of a token's m − 1 nearest by cosine, of those that occur, that are of its class of m.

    E: embeddings [V, C]. classes, often: int [V], of each token, and how often it occurs, by which it counts.
    """
    unit, classes, often = F.normalize(E, dim=-1), torch.from_numpy(classes), torch.from_numpy(often)
    m = int(torch.bincount(classes).max())
    cosines = (unit @ unit.T).fill_diagonal_(-2).masked_fill(often == 0, -2)
    hits = (classes[cosines.topk(m - 1).indices] == classes[:, None]).float().mean(-1)
    return (hits @ often.float() / often.sum()).item()


# ---- facts told long before

def questions(tokens, corpus, length):
    """int [n, length + 1]: texts among `tokens`, of planted-facts, that end at the answer to a question.

    The fact was last told thousands of tokens before: the answer must have been learned, and not read.
    """
    ends, told = planted_answers(tokens, corpus).T
    ends = ends[(ends >= length) & (ends - told >= LAGS[0])]
    return windows(tokens, ends[::max(1, len(ends) // QUESTIONS)][:QUESTIONS] - length, length + 1)


@torch.no_grad()
def answered(learner, asked):
    """(share of the answers that the learner names, their cross entropy in nats); asked: see `questions`."""
    logits = learner(asked[:, :-1])[:, -1]
    right = (logits.argmax(-1) == asked[:, -1]).float().mean()
    return right.item(), F.cross_entropy(logits, asked[:, -1]).item()


def answers(folder):
    """{arm: what `answered` says of its end, and of the end of the meta phase}."""
    state, corpus, _ = set_up(folder)
    asked = questions(corpus.val, corpus, state["config"]["block_size"])
    return {arm: answered(learner, asked) for arm, learner in learners_of(folder, state).items()}


# ---- two wordings

@torch.no_grad()
def worded(folder):
    """{arm: nats a token on the observed books in KJV, of names of God, punctuation, other words; on further
    books}, and of the end of the meta phase."""
    state, corpus, _ = set_up(folder)
    kinds, found = torch.from_numpy(classes(corpus)), {}
    for arm, learner in learners_of(folder, state).items():
        row = []
        for tokens in (corpus.val, corpus.further):
            text = val_windows(tokens, VERSES, state["config"]["block_size"] + 1)
            logp = torch.cat([learner(part[:, :-1]).log_softmax(-1) for part in text.split(64)])
            nats, kind = -logp.gather(-1, text[:, 1:, None])[..., 0], kinds[text[:, 1:]]
            row += [nats, *(nats[kind == k] for k in range(3) if tokens is corpus.val)]
        found[arm] = [x.mean().item() for x in row]
    return found


def words_found(folder, often=20, share=0.25):
    """Of the words of ASV for which another stands in KJV at least so often, and so large a share of times:
    {how many: (share for which the critic's first other word is that one; one of its first ten)}."""
    state, corpus, _ = set_up(folder)
    table = pairs(corpus.train, corpus.train_other, corpus.encoding, corpus.vocab_size)
    other = table * (1 - np.eye(len(table), dtype=np.int64))
    x = np.flatnonzero((other.max(1) >= often) & (other.max(1) >= share * table.sum(1)))
    unit = F.normalize(state["snapshot"]["critic"]["E"], dim=-1).numpy()
    cosines = unit[x] @ unit.T
    cosines[np.arange(len(x)), x] = -2
    rank = (cosines > cosines[np.arange(len(x)), other[x].argmax(1)][:, None]).sum(1)
    return {f"{len(x)} words": ((rank == 0).mean(), (rank < 10).mean())}


# ---- where cross entropy fell

@torch.no_grad()
def token_nats(model, lay, texts, how="gist"):
    """(cross entropy, entropy of the prediction), float [n, T] each, nats."""
    nats, spread = [], []
    for text in texts.split(32):
        logp = read(model, lay, text[:, :-1], how).log_softmax(-1)
        nats.append(-logp.gather(-1, text[:, 1:, None])[..., 0])
        spread.append(-(logp.exp() * logp).sum(-1))
    return torch.cat(nats), torch.cat(spread)


def real_at_equal_gain(state, corpus, lay, texts, start, gain, most=2000):
    """The token nats of real training from the snapshot where it has gained so much, interpolated."""
    c, learner, before = state["config"], learner_of(state), start
    optimizer = adamw(learner, c["self_learning_rate"])
    optimizer.load_state_dict(state["snapshot"]["optimizer"])
    for group in optimizer.param_groups:
        group["lr"] = c["self_learning_rate"]
    for step in range(most):
        text = get_batch(train_tokens_of(state, corpus), c["seed"], c["meta_steps"] + step, c["batch_size"],
                         c["block_size"] + 1)
        F.cross_entropy(read(learner, lay, text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), c["grad_clip"])
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 4:
            after = token_nats(learner, lay, texts)[0]
            if start.mean() - after.mean() >= gain:
                share = (before.mean() - (start.mean() - gain)) / (before.mean() - after.mean())
                return before + share * (after - before)
            before = after
    refuse(f"real training did not gain {gain:.4f} nats in {most} steps")


def starts_in_text(corpus, ids):
    """(the text of ids, int [n], where in it each token starts)."""
    text = decode(corpus, ids)
    sizes = np.array([len(decode(corpus, [i])) for i in range(corpus.vocab_size)])[ids]
    return text, np.minimum(np.cumsum(sizes) - sizes, len(text) - 1)


def classes_of(corpus, ids):
    """int [n]: the class of each token, by the word or mark in which its first byte stands."""
    text, starts = starts_in_text(corpus, ids)
    found = np.full(len(text), CLASSES.index("punctuation"))
    for m in re.finditer(r"[A-Za-z']+| +|\n+", text):
        word = m[0]
        if word[0] == "\n":
            kind = "line breaks"
        elif word[0] == " ":
            kind = "spaces"
        elif word.lower() in FUNCTION_WORDS:
            kind = "function words"
        elif word.isupper() or word[0].isupper() and not re.search(r"(\n|[.!?] )$", text[:m.start()]):
            kind = "names"
        else:
            kind = "other words"
        found[m.start():m.end()] = CLASSES.index(kind)
    return torch.from_numpy(found[starts])


def texture(folder, arm):
    """{row: (change of the arm, of real at equal gain, the difference, share of tokens)}, nats a token."""
    state, corpus, lay = set_up(folder)
    texts, end = val_windows(corpus.val, WINDOWS, lay.text.numel() + 1), read_end(folder, arm, state["stage"])
    start, spread = token_nats(learner_of(state), lay, texts)
    after = token_nats(model_of(state["config"], end["weights"]), lay, texts)[0]
    real = real_at_equal_gain(state, corpus, lay, texts, start, start.mean() - after.mean())
    if "full" in state["snapshot"]:
        full = model_of(state["config"], state["snapshot"]["full"])
        spread = token_nats(full, lay, texts, "full")[1]
    fifth = (spread.flatten().argsort().argsort() * 5 // spread.numel()).view_as(spread)
    kinds = torch.stack([classes_of(corpus, text[1:].numpy()) for text in texts])
    rows = {"all": fifth >= 0, **{f"entropy, quintile {q + 1}": fifth == q for q in range(5)},
            **{name: kinds == i for i, name in enumerate(CLASSES)}}
    changes = after - start, real - start, after - real
    return {name: (*(change[where].mean().item() for change in changes), where.float().mean().item())
            for name, where in rows.items()}


# ---- what gists know

def labels(corpus, ids):
    """(play, speaker, place in the line) of each token, int [n] each, of a text of the plays."""
    text, starts = starts_in_text(corpus, ids)
    play, speaker, line = np.zeros((3, len(text)), dtype=np.int64)
    names, last = {}, 0
    for m in re.finditer(r"\n\n([A-Z][A-Z ]+)\n", text):
        speaker[m.end():] = names.setdefault(m[1], len(names) + 1)
    for m in re.finditer(r"\n\n\nACT I\n|\n\nACT I\n\nSCENE I", text):
        play[m.start():] += 1
    for i, character in enumerate(text):
        line[i] = i - last
        last = i + 1 if character == "\n" else last
    return play[starts], speaker[starts], np.minimum(line[starts] // 8, 5)


def readable(features, label, top=20):
    """(share of held-out chunks whose label ridge regression onto one-hot ones reads, that of the commonest).

    features: float [n, D]. label: int [n]; the `top` commonest count. Stretches of 50 chunks are held out.
    """
    values, counts = np.unique(label, return_counts=True)
    common = np.sort(values[np.argsort(-counts, kind="stable")[:top]])
    keep = np.isin(label, common)
    x, y = features[torch.from_numpy(keep)], torch.from_numpy(np.searchsorted(common, label[keep]))
    x = torch.cat((x, torch.ones(len(x), 1)), 1).double()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(x) // 50))
    held = torch.isin(torch.arange(len(x)) // 50, order[:len(order) // 5])
    a = x[~held]
    ridge = 1e-2 * len(a) * torch.eye(x.size(1))
    weights = torch.linalg.solve(a.T @ a + ridge, a.T @ F.one_hot(y[~held]).double())
    right = ((x[held] @ weights).argmax(1) == y[held]).double().mean().item()
    return right, (y[held] == y[~held].mode()[0]).double().mean().item()


@torch.no_grad()
def knowledge(folder):
    """{what: (read off the gists, off a bag of the chunk's tokens, commonest label)}, shares."""
    state, corpus, lay = set_up(folder)
    c, model = state["config"], learner_of(state)
    ids = corpus.train[:KNOWN].astype(np.int64)
    x = torch.from_numpy(ids[:len(ids) // c["block_size"] * c["block_size"]]).view(-1, c["block_size"])
    gists = [read(model, lay, part, until=c["n_layer"] - 1, read=lay.gists.flatten()) for part in x.split(32)]
    g, chunks = torch.cat(gists).reshape(-1, c["n_gist"] * c["n_embd"]), x.reshape(-1, c["chunk"])
    bag = torch.zeros(len(chunks), c["vocab"]).scatter_add_(1, chunks, torch.ones_like(chunks).float())
    g, found = (g - g.mean(0)) / g.std(0), {}
    for what, label in zip(("play", "speaker", "place in the line"), labels(corpus, ids)):
        label = label[:chunks.numel():c["chunk"]]
        right, common = readable(g, label)
        found[what] = right, readable(bag, label)[0], common
    return found


# ---- tables

def pm(values, digits=3):
    mean, half = interval(values)
    return f"{mean:+.{digits}f} ± {half:.{digits}f}" if len(values) > 1 else f"{mean:+.{digits}f}"


def show(head, found, digits=3):
    """Prints a table of found, for each run {row: values, one or several a column}; the mean over runs."""
    print(f"| {head} | seeds |\n" + "|---" * (head.count("|") + 2) + "|")
    for name in found[0]:
        columns = np.array([np.atleast_1d(one[name]) for one in found]).T
        print(f"| {name} | " + " | ".join(pm(column, digits) for column in columns) + f" | {len(found)} |")
    print()


def main():
    names = sys.argv[1:]
    if not names or {"-h", "--help"} & set(names):
        print(__doc__.strip())
        raise SystemExit(0 if names else 2)
    states = [set_up(name) for name in names]
    state, corpus, lay = states[0]
    dataset, spelled = state["config"]["dataset"], corpus.encoding.spellings > 1
    if any((s["stage"], s["config"]["dataset"]) != (state["stage"], dataset) for s, _, _ in states):
        refuse("the runs of one call must be of one stage and one dataset: they are averaged")
    refuse_if(not spelled and dataset not in (NAME, "plays" if lay else "planted-facts"),
              f"{names[0]} is a run of {state['stage']}.py on {dataset}, of which nothing is asked")
    if lay and spelled:
        show("of a token's nearest, synonyms | share", [alike(name) for name in names])
    if lay and dataset == "plays":  # words, plays and speakers are told by the text as it was written
        for arm in ("frozen", "forecast", "random"):  # what random numbers favour too is not meaning
            if all(arm in s["arms"] for s, _, _ in states):
                show(f"tokens | `{arm}`, change in nats | `real` at equal gain | difference | share",
                     [texture(name, arm) for name in names], 4)
        show("read off a chunk | its gists | a bag of its tokens | the commonest label",
             [knowledge(name) for name in names])
    if not lay and spelled:
        show("of a token's nearest, of its class | share", [{"critic": precision(name)} for name in names])
    if dataset == NAME:
        show("nats a token after | observed books | names of God | punctuation | other words | further books",
             [worded(name) for name in names])
        show("words that stand for others | found first | among the first ten",
             [words_found(name) for name in names])
    if not lay and dataset == "planted-facts":
        show("answers of | right | nats", [answers(name) for name in names])


if __name__ == "__main__":
    main()
