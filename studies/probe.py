"""
What learning from gists changes in a learner, and what its gists know.

    python probe.py out/gist_bottleneck                 # one run
    python probe.py out/study-2/base/?                  # several seeds: means and 95 % intervals
    python probe.py out/study-2-meaning/critic/?        # on text full of synonyms: who knows them

Tables, markdown:
1. Where tokens have synonyms, what share of a token's nearest they are, by gists, forecasts and embeddings.
2. On the plays, where cross entropy fell, by quintile of a reference model's entropy and by class of token, in the arms
   `frozen`, `forecast` and `random` and in training on real tokens *at equal total gain*: real training is gone through
   until it has gained as much.
3. On the plays, how well a linear map reads play, speaker and place in the line off a chunk's gists, beside a bag of its
   tokens.
"""
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import gist_bottleneck as gb
from configurator import read_checkpoint, refuse
from model import GPT, GPTConfig, adamw
from plot import interval
from prepare_data import corpus_id, decode, get_batch, open_corpus, val_windows

WINDOWS = 256
FUNCTION_WORDS = frozenset("""the and to of i you a my in that is not me it with for be his your this but he have as thou
him so will what her thy all by do no shall if are we thee our on at or from was they she o who an them their""".split())
CLASSES = ("function words", "other words", "names", "punctuation", "spaces", "line breaks")


def set_up(folder):
    """(checkpoint, corpus, layout) of a finished run, whose settings become those of gist_bottleneck."""
    state = read_checkpoint(folder, "gist_bottleneck")
    if state["arm"] != "done":
        refuse(f"{folder} is not finished; go on with it by python gist_bottleneck.py --resume={folder}")
    for name, value in state["config"].items():
        setattr(gb, name, value)
    corpus = open_corpus(gb.dataset, gb.vocab)
    if corpus_id(corpus) != state["corpus"]:
        refuse(f"{corpus.folder} holds another corpus or tokenizer than the one of {folder}")
    return state, corpus, gb.layout(gb.block_size, torch.device("cpu"))


def model_of(weights):
    model = GPT(GPTConfig(gb.vocab, gb.n_gist + 1, gb.n_layer, gb.n_head, gb.n_embd))
    model.load_state_dict(weights)
    return model


# ----------------------------------------------------------------------------------------------
# where cross entropy fell

@torch.no_grad()
def token_nats(model, lay, windows, how="gist"):
    """(cross entropy, entropy of the prediction), float [n, T] each, nats."""
    nats, spread = [], []
    for w in windows.split(32):
        logp = gb.read(model, lay, w[:, :-1], how).log_softmax(-1)
        nats.append(-logp.gather(-1, w[:, 1:, None])[..., 0])
        spread.append(-(logp.exp() * logp).sum(-1))
    return torch.cat(nats), torch.cat(spread)


def real_at_equal_gain(state, corpus, lay, windows, start, gain, step_limit=2000):
    """The token nats of real training from the snapshot where its total gain is `gain`, between two evaluations."""
    learner = model_of(state["snapshot"]["learner"])
    optimizer = adamw(learner, gb.self_learning_rate)
    optimizer.load_state_dict(state["snapshot"]["optimizer"])
    for group in optimizer.param_groups:
        group["lr"] = gb.self_learning_rate
    before = start
    for step in range(step_limit):
        w = get_batch(corpus.train[:gb.train_tokens or None], gb.seed, gb.meta_steps + step, gb.batch_size, gb.block_size + 1)
        loss = F.cross_entropy(gb.read(learner, lay, w[:, :-1]).flatten(0, 1), w[:, 1:].flatten())
        gb.take_step(Alone(), learner, optimizer, loss)
        if step % 5 == 4:
            after = token_nats(learner, lay, windows)[0]
            if start.mean() - after.mean() >= gain:
                share = (before.mean() - (start.mean() - gain)) / (before.mean() - after.mean())
                return before + share * (after - before)
            before = after
    refuse(f"real training did not gain {gain:.4f} nats in {step_limit} steps")


def classes_of(corpus, ids):
    """int [n]: the class of each token, by the word or mark in which its first byte stands."""
    text = decode(corpus.encoding, ids.tolist())
    starts = np.cumsum([0] + [len(decode(corpus.encoding, [i])) for i in ids.tolist()])[:-1]
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
    return torch.from_numpy(found[np.minimum(starts, len(text) - 1)])


def texture(folder, name_of_arm):
    """{row: (change of the arm, change of real at equal gain, share of tokens)}, nats a token, for quintiles and classes
    of one run."""
    state, corpus, lay = set_up(folder)
    windows = val_windows(corpus.val, WINDOWS, gb.block_size + 1)
    start = token_nats(model_of(state["snapshot"]["learner"]), lay, windows)[0]
    arm = token_nats(model_of(state["ends"][name_of_arm]), lay, windows)[0]
    real = real_at_equal_gain(state, corpus, lay, windows, start, start.mean() - arm.mean())
    full = state["snapshot"]["controls"].get("full")
    spread = token_nats(model_of(full), lay, windows, "full")[1] if full else \
        token_nats(model_of(state["snapshot"]["learner"]), lay, windows)[1]
    rows = {"all": (arm - start).mean()}
    fifth = (spread.flatten().argsort().argsort() * 5 // spread.numel()).view_as(spread)
    kinds = torch.stack([classes_of(corpus, w[1:]) for w in windows])
    for name, where in [(f"entropy, quintile {q + 1}", fifth == q) for q in range(5)] + \
                       [(name, kinds == i) for i, name in enumerate(CLASSES)]:
        rows[name] = ((arm - start)[where].mean().item(), (real - start)[where].mean().item(), where.float().mean().item())
    rows["all"] = ((arm - start).mean().item(), (real - start).mean().item(), 1.0)
    return rows


# ----------------------------------------------------------------------------------------------
# what gists know

def labels(corpus, tokens):
    """(play, speaker, place in the line) of each token, int [n] each, of a text of the plays."""
    text = decode(corpus.encoding, tokens.tolist())
    sizes = np.array([len(decode(corpus.encoding, [i])) for i in range(corpus.vocab_size)])
    starts = np.minimum(np.cumsum(sizes[tokens]) - sizes[tokens], len(text) - 1)
    play, speaker, line = np.zeros((3, len(text)), dtype=np.int64)
    names, now = {}, 0
    for m in re.finditer(r"\n\n([A-Z][A-Z ]+)\n", text):
        now = names.setdefault(m[1], len(names) + 1)
        speaker[m.end():] = now
    for m in re.finditer(r"\n\n\nACT I\n|\n\nACT I\n\nSCENE I", text):
        play[m.start():] += 1
    last = 0
    for i, c in enumerate(text):
        line[i] = i - last
        last = i + 1 if c == "\n" else last
    return play[starts], speaker[starts], np.minimum(line[starts] // 8, 5)


def readable(features, label, top=20):
    """(share of held-out chunks whose label a ridge regression onto one-hot labels reads right, share of the commonest).

    features float [n, D], label int [n]; the `top` most frequent labels; the last fifth is held out, in order.
    """
    common = [k for k, _ in sorted(((k, (label == k).sum()) for k in np.unique(label)), key=lambda p: -p[1])[:top]]
    keep = np.isin(label, common)
    x, y = features[torch.from_numpy(keep)], torch.from_numpy(np.searchsorted(np.sort(common), label[keep]))
    x = torch.cat((x, torch.ones(len(x), 1)), 1).double()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(x) // 50))  # held out in stretches of 50 chunks
    block = torch.arange(len(x)) // 50
    held = torch.isin(block, order[:len(order) // 5])
    a = x[~held]
    weights = torch.linalg.solve(a.T @ a + 1e-2 * len(a) * torch.eye(x.size(1)), a.T @ F.one_hot(y[~held]).double())
    right = ((x[held] @ weights).argmax(1) == y[held]).double().mean().item()
    return right, (y[held] == y[~held].mode()[0]).double().mean().item()


@torch.no_grad()
def knowledge(folder, tokens=400_000):
    """{what: (read off the gists, off a bag of the chunk's tokens, commonest label)}, shares."""
    state, corpus, lay = set_up(folder)
    ids = corpus.train[:tokens].astype(np.int64)
    g, chunks = gb.chunk_gists(model_of(state["snapshot"]["learner"]), lay, torch.from_numpy(ids))
    bag = torch.zeros(len(chunks), gb.vocab).scatter_add_(1, chunks, torch.ones_like(chunks, dtype=torch.float32))
    g = (g - g.mean(0)) / g.std(0)
    return {what: (*readable(g, label[:len(chunks) * gb.chunk:gb.chunk]),
                   readable(bag, label[:len(chunks) * gb.chunk:gb.chunk])[0])
            for what, label in zip(("play", "speaker", "place in the line"), labels(corpus, ids))}


class Alone:
    def average(self, tensors):
        pass


@torch.no_grad()
def alike(folder, texts=4):
    """{kind of gist: share of a token's m - 1 nearest that are its synonyms}, where each meaning has m tokens.

    All tokens are read after each prefix of held-out text by the run's own model, and compared as its arms compare them.
    """
    state, corpus, lay = set_up(folder)
    m, tokens = corpus.encoding.spellings, torch.arange(gb.vocab)
    model, found = model_of(state["snapshot"]["learner"]), {}
    x, starts = val_windows(corpus.val, texts, gb.block_size), gb.starts_of("cpu")
    for kind, critic in dict(gists=gb.Critic(model, None, None), forecasts=gb.Critic(model, None, None, forecast=True),
                             embeddings=gb.Critic(None, F.normalize(model.embed.weight[:gb.vocab], dim=-1), None)).items():
        g = gb.gists(critic, lay, gb.past_of(critic, lay, x), starts, tokens.expand(len(x), len(starts), -1)[..., None])
        whiten, _ = gb.whitening(Alone(), g, gb.rank, level=not critic.forecast)
        d2 = gb.squared_distances(g @ whiten) + 1e9 * torch.eye(gb.vocab)
        near = d2.topk(m - 1, largest=False).indices
        found[kind] = (near // m == tokens[:, None] // m).float().mean().item()
    return found


def pm(values, digits):
    mean, half = interval(values)
    return f"{mean:+.{digits}f} ± {half:.{digits}f}" if len(values) > 1 else f"{mean:+.{digits}f}"


def main():
    folders = [f for f in sys.argv[1:] if Path(f).is_dir()]
    if not folders:
        print(__doc__.strip())
        raise SystemExit(2)
    if set_up(folders[0])[1].encoding.spellings > 1:
        found = [alike(f) for f in folders]
        print("| of a token's nearest, synonyms | share | seeds |\n|---|---|---|")
        for kind in found[0]:
            print(f"| by {kind} | {pm([f[kind] for f in found], 3)} | {len(folders)} |")
    if gb.dataset not in ("plays", "plays-synonyms"):
        return  # classes of words, plays and speakers are read off the plays as they were written
    arms = [a for a in ("frozen", "forecast", "random") if all(a in set_up(f)[0]["ends"] for f in folders)]
    for arm in arms:  # random: what random numbers favour too is not meaning
        changed = [texture(f, arm) for f in folders]
        print(f"| tokens | share | `{arm}`, change in nats | `real` at equal total gain | difference | seeds |\n"
              "|---|---|---|---|---|---|")
        for name in changed[0]:
            own, real, share = (np.array(v) for v in zip(*(c[name] for c in changed)))
            print(f"| {name} | {share.mean():.2f} | {pm(own, 4)} | {pm(real, 4)} | {pm(own - real, 4)} | {len(folders)} |")
        print()
    known = [knowledge(f) for f in folders]
    print("| read off a chunk | its gists | a bag of its tokens | the commonest label | seeds |\n|---|---|---|---|---|")
    for name in known[0]:
        gist, common, bag = zip(*(k[name] for k in known))
        print(f"| {name} | {pm(gist, 3)} | {pm(bag, 3)} | {np.mean(common):.3f} | {len(folders)} |")


if __name__ == "__main__":
    main()
