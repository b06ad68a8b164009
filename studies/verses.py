"""
One figure of a run on kjv-asv: how far each arm came, and verses as the critic hears them.

    python studies/verses.py out/words     # writes out/words/verses.png

Above, gold of each arm: cross entropy on the King James text of the verses that were observed in the American
Standard Version. Below, for verses that no one has trained on yet: what is observed, what the learner would
have said there at the end of the meta phase, and which other word the critic praises, if it does so by .05
or more; green is praised, red is blamed: A(v), full at .5.
"""
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's modules
from configurator import refuse
from corpus import decode
from equations import praise
from plot import COLOUR, read_run as read_log
from sample import model_of, read_run
from wordings import NAME, ends, twins

ASKED = ("Jehovah ", "show ", "who ", "; ")  # a verse is shown for each of these words of ASV
COLUMNS = 118                                # characters in a line of the figure
ROWS = "observed", "own", "praised"
GREEN, RED = (0.55, 0.85, 0.6), (1.0, 0.6, 0.55)


def heard(state, corpus, start, length):
    """{row: [(word, A of it)]} of the `length` tokens from `start` on in corpus.val_other, each after the
    true tokens before it."""
    learner = model_of(state["config"], state["snapshot"]["learner"])
    critic, before = state["snapshot"]["critic"], min(start, 16)
    text = torch.from_numpy(corpus.val_other[start - before:start + length].astype(np.int64))
    with torch.no_grad():
        p = learner(text[None, :-1])[0, before - 1:].softmax(-1)
    unit, x = F.normalize(critic["E"], dim=-1), text[before:]
    table = (critic["log_kappa"].exp() * unit @ unit.T).softmax(-1)
    a = praise(table[x], p, table)
    other = a.scatter(-1, x[:, None], -1.0).argmax(-1)
    ids = dict(observed=x, own=p.argmax(-1), praised=other)
    word = lambda i: decode(corpus, [i]).strip() or "¶"
    found = {row: [(word(i), a[t, i].item()) for t, i in enumerate(ids[row].tolist())] for row in ROWS}
    found["praised"] = [(word if value >= 0.05 else "", value) for word, value in found["praised"]]
    return found


def verses(corpus):
    """[(start, length)] in corpus.val_other: for each word of ASKED a verse of 10 to 24 tokens that has it
    where KJV has not, with few words that are not kept."""
    stops, found = ends(corpus.val_other, corpus.encoding), []
    rare = corpus.encoding.encode_single_token("_ ")
    for word in ASKED:
        try:
            token = corpus.encoding.encode_single_token(word)
        except KeyError:  # in a small vocabulary it is not kept
            continue
        for start, stop in zip(stops[:-1] + 1, stops[1:]):
            verse, at = corpus.val_other[start:stop + 1], np.array([start])
            twin = twins(at, corpus.val, corpus.val_other, corpus.encoding, 33)[0]
            lacks = token not in corpus.val[twin:twin + len(verse)]
            if 10 <= len(verse) <= 24 and token in verse and lacks and (verse == rare).sum() <= 1:
                found.append((int(start), len(verse)))
                break
    return found


def draw(folder, state, corpus, out):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    _, rows = read_log(folder)
    shown = [heard(state, corpus, *verse) for verse in verses(corpus)]
    figure, (curves, words) = plt.subplots(2, 1, figsize=(11, 8), height_ratios=(3, 4))
    for arm in state["arms"]:
        line = [(row["step"], row["gold_nats"]) for row in rows if row["arm"] == arm]
        curves.plot(*zip(*line), label=arm, color=COLOUR.get(arm, "tab:cyan"))
    start = next(row["gold_nats"] for row in rows if row["arm"] != "meta" and row["step"] == 0)
    curves.set(xlabel="self steps", ylabel="gold: nats a token of KJV", ylim=(None, start + 0.15))
    curves.legend()
    words.set(xlim=(0, COLUMNS), ylim=(4.2 * len(shown), -0.5))
    words.axis("off")
    style = dict(family="monospace", fontsize=7.5, va="center")
    for n, verse in enumerate(shown):
        at = 10
        for row, name in enumerate(ROWS):
            words.text(0, 4.2 * n + row, name, color="0.5", **style)
        for column in zip(*verse.values()):
            width = max(len(word) for word, _ in column) + 1
            if at + width > COLUMNS:
                break
            for row, (word, value) in enumerate(column):
                full = np.array(GREEN if value > 0 else RED)
                colour = 1 - min(1.0, abs(value) / 0.5) * (1 - full)
                words.text(at, 4.2 * n + row, word, **style,
                           bbox=dict(facecolor=colour, edgecolor="none", pad=1.2))
            at += width
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main():
    if len(sys.argv) != 2 or {"-h", "--help"} & set(sys.argv):
        print(__doc__.strip())
        raise SystemExit(0 if len(sys.argv) == 2 else 2)
    folder = Path(sys.argv[1])
    state, corpus = read_run(folder)
    if state["config"]["dataset"] != NAME or state["stage"] != "meta_gist":
        refuse(f"{folder} is a run on {state['config']['dataset']}; one of meta_gist.py on {NAME} is needed")
    if state["config"]["chunk"] != 1:
        refuse(f"{folder} is a run with chunk={state['config']['chunk']}; what is drawn is that of chunk=1")
    draw(folder, state, corpus, folder / "verses.png")
    print(f"drawn in {folder / 'verses.png'}")


if __name__ == "__main__":
    main()
