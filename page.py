"""
A run on one page, report.html in its folder: what was done, what came of it, curves, texts, hacks.

    python page.py out/self_ce                     # of a finished run, or of one that was interrupted

One file, for a phone too, that needs nothing from elsewhere; its frame is page.html. A run that ends writes
its own.
"""
import html
import itertools
import json
import shlex
import sys
from pathlib import Path
from string import Template

import numpy as np
import torch
import torch.nn.functional as F

from chart import DASHES, FRAME, chart
from checkpoints import read_checkpoint, write_whole
from configurator import read_settings, refuse
from corpus import open_corpus
from hacks import reports, spell, texts_of
from plot import colours, read_rows
from sources import DAMAGE, brief
from watch import arms_table, new_track, summarise, track_gold

HERE = Path(__file__).parent
FILES = "samples.txt", "curves.png", "log.jsonl", "summary.json", "config.json"
STAGES = ("self_ce", "gist_bottleneck", "meta_gist")
# Of the meta phase, columns that are drawn together.
META = (("gold: held-out nats a token", ("gold_nats", "gold_full", "gold_none")),
        ("nats a token that a step takes off held-out text", ("gain", "gain_shuffled", "gain_real")),
        ("sharpness of signal and match", ("kappa", "kappa_a")), ("cosine of half a match", ("nu",)))
LEARNED = ((1.05, "got farther than real training"), (0.95, "learned on as from real text"),
           (0.1, "learned on, but less than from real text"), (-0.1, "learned next to nothing"),
           (-float("inf"), "unlearned"))  # from this share of what real targets gained on
WORDS, NEAREST = 12, 4


# ---- what there is

def read(folder):
    """(stage, settings, rows of the log, arms as in the summary, whether the run is finished).

    The arms of a run without a summary are what the log has of them; alarms are those that were reported.
    """
    read_json = lambda name: json.loads((folder / name).read_text(encoding="utf-8"))
    try:
        settings, rows = read_json("config.json"), read_rows(folder)
        stage = rows[0]["stage"] if rows else next(s for s in STAGES if (folder / f"sources/{s}.py").exists())
        if (folder / "summary.json").exists():
            return stage, settings, rows, read_json("summary.json")["arms"], True
    except (OSError, ValueError, KeyError, StopIteration) as error:
        refuse(f"{folder} is no run ({type(error).__name__}: it needs config.json and log.jsonl)")
    tracks = {row["arm"]: new_track() for row in rows if row["arm"] != "meta"}
    for row in rows:
        if row["arm"] in tracks:
            track_gold(tracks[row["arm"]], row)
    for _, arm, step, cause, _ in reports(folder):
        if arm in tracks and cause != "gold rose":
            tracks[arm]["alarms"].append(step)
    arms = summarise(tracks)
    for row in rows[-1:]:
        if row["arm"] in arms and row["step"] < settings["self_steps"]:
            arms[row["arm"]]["recovered"] = None  # it is a share at equal steps
    return stage, settings, rows, arms, False


def command(folder, stage, settings):
    """The command line that repeats a run, as words: its script, and what is not as by default there."""
    kept = folder / f"sources/{stage}.py"
    known = read_settings(kept if kept.exists() else HERE / f"{stage}.py")
    plain = lambda value: str(value).lower() if isinstance(value, bool) else str(value)
    changed = [f"--{name}={plain(settings[name])}" for name, (_, default, *_) in known.items()
               if name in settings and settings[name] != default]
    return ["python", f"{stage}.py", *map(shlex.quote, changed)]


# ---- what came of it

def fate(arm):
    """(what gold did, whether it was hacked) of an arm, in words."""
    rise = arm["gold_end"] - arm["gold_start"]
    gold = f"gold ended {abs(rise):.2f} nats {'above' if rise > 0 else 'below'} its start"
    hack = arm["steps_to_hack"]
    return gold, "never hacked" if hack is None else f"hacked at step {hack}"


def verdict(name, arms):
    """A sentence on an arm, with its control."""
    arm, share = arms[name], arms[name]["recovered"]
    ceiling = next((control for control in ("oracle", "real") if control in arms), None)
    gold, hack = fate(arm)
    alarm = f"alarm at {arm['alarms'][0]}" if arm["alarms"] else "no alarm"
    if arm["steps_to_hack"] is not None or share is None or name == ceiling:
        told = f"{hack}, {alarm}; {gold}"
    else:
        how = next(words for least, words in LEARNED if share >= least)
        told = f"{how}: {share:.2f} of what real targets gained, {hack}, {alarm}"
    if name == ceiling:
        return f"{told}. It has real targets: the ceiling, and the control of the others."
    others = [c for c in (ceiling, "shuffled") if c in arms and c != name]
    control = [f"{c}: {', '.join(fate(arms[c]))}" for c in others]
    return f"{told} (control{'s' * (len(control) > 1)} {'; '.join(control) or 'none: believe no hack here'})."


def table(head, rows):
    """An HTML table of values, escaped; a Path is a link."""
    cell = lambda c: f'<a href="{c}">{c}</a>' if isinstance(c, Path) else html.escape(str(c))
    line = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{cell(c)}</{tag}>" for c in cells) + "</tr>"
    body = "".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table>{line(head, "th")}{body}</table></div>'


# ---- curves

def points(rows, arm, column):
    return [(r["step"], r[column]) for r in rows if r["arm"] == arm and r.get(column) is not None]


def charts(rows, arms):
    """The figures of a run: of its arms, then of its meta phase."""
    from matplotlib.colors import to_hex
    dashes, colour = itertools.cycle(DASHES), colours(arms)
    paint = {arm: (to_hex(colour[arm]).replace("#000000", "currentColor"), next(dashes)) for arm in arms}
    marks = [(arm, a["steps_to_hack"], "✕") for arm, a in arms.items()]
    marks += [(arm, step, "△") for arm, a in arms.items() for step in a["alarms"][:1]]
    drawn = []
    gold = {arm: (*paint[arm], points(rows, arm, "gold_nats")) for arm in arms}
    if arms:
        drawn.append(chart("gold: held-out nats a token", gold, gold_range(gold), marks))
    own = {arm: (*paint[arm], found) for arm in arms if (found := points(rows, arm, "proxy"))
           and not [r for r in rows if r["arm"] == arm][1]["real_targets"]}  # of others it is no own loss
    if own:
        drawn.append(chart("proxy: the self-produced loss", own, marks=marks))
    for title, names in META:
        curves = {name: ("currentColor", dash, found) for name, dash in zip(names, DASHES)
                  if (found := points(rows, "meta", name))}
        if curves:
            drawn.append(chart("meta phase: " + title, curves))
    return (f'{FRAME}<div class="charts">{"".join(drawn)}</div>'
            '<p class="dim">Steps from left to right. ✕ hack, △ first alarm, ▲ leaves through the top.</p>')


def gold_range(curves):
    """Limits that show what the arms can gain, and a little of what they lose."""
    start = max(points[0][1] for *_, points in curves.values())
    best, worst = (pick(y for *_, points in curves.values() for _, y in points) for pick in (min, max))
    room = max(0.05, start - best)
    return best - 0.1 * room, min(start + 1.2 * room, worst + 0.1 * room)


# ---- what is near what

def nearest(E, chosen):
    """(cosines, ids), [n, NEAREST] both: vectors of E [V, C] nearest to n chosen ones, themselves apart."""
    unit = F.normalize(E.float(), dim=-1)
    cos = unit[chosen] @ unit.T
    return cos.scatter_(1, torch.tensor(chosen)[:, None], -1).topk(NEAREST)


def neighbours(state, corpus):
    """What stands near common tokens in the critic's E of stage 3, or in the learner's embedding, as HTML.

    Tokens that are not in the text are left out: their vectors have hardly moved.
    """
    end = state["snapshot"] or state
    whose = "critic" if state["stage"] == "meta_gist" else "learner"
    E = end[whose]["E"] if whose == "critic" else end[whose]["embed.weight"][:corpus.vocab_size]
    name = lambda i: spell(corpus.encoding, [i]) + f" ({i})" * (corpus.encoding.spellings > 1)
    counts = np.bincount(corpus.train[:10**6], minlength=len(E))
    known = [i for i in counts.argsort()[::-1].tolist() if counts[i]]  # the commonest first
    chosen = [k for k, i in enumerate(known) if any(c.isalnum() for c in name(i))][:WORDS]
    cos, ids = nearest(E[known], chosen)
    near = [", ".join(f"{name(known[k])} {c:.2f}" for c, k in zip(*row))
            for row in zip(cos.tolist(), ids.tolist())]
    dice = torch.Generator().manual_seed(0)
    chance = nearest(torch.randn(len(known), E.size(1), generator=dice), chosen)[0][:, 0].mean()
    return (f'<p class="dim">Embeddings of the {whose}, and cosines. Of as many random vectors, as wide, the '
            f"nearest has {chance:.2f}.</p>"
            + table(("token", "nearest"), [(name(known[k]), row) for k, row in zip(chosen, near)]))


# ---- the page

def standing(folder, stage, settings, rows, done):
    """Where the run stands, in words."""
    at, seed = rows[-1] if rows else dict(arm="meta", step=0), f"seed {settings['seed']}"
    if done:
        return f"Finished; one run, {seed}: what differs little may be chance."
    steps = settings["meta_steps" if at["arm"] == "meta" else "self_steps"]
    return (f"Not finished, {seed}: the log ends in {at['arm']} at step {at['step']} of {steps}. "
            f"To go on: python {stage}.py --resume={shlex.quote(str(folder))}")


def looked_up(folder, stage, settings):
    """(texts, neighbours) as HTML, as far as corpus and checkpoint are there."""
    try:
        corpus = open_corpus(settings["dataset"], settings["vocab"])
    except SystemExit:
        return {}, "<p>The corpus is not there.</p>"
    texts = texts_of(folder, corpus.encoding)
    if not (folder / "ckpt.pt").exists():
        return texts, "<p>There is no checkpoint.</p>"
    return texts, neighbours(read_checkpoint(folder, stage), corpus)


def write_page(folder):
    """Writes report.html of the run in `folder`, whole or not at all; returns its path."""
    folder = Path(folder)
    stage, settings, rows, arms, done = read(folder)
    texts, near = looked_up(folder, stage, settings)
    told = "".join(f"<li><b>{name}</b>: {verdict(name, arms)}</li>" for name in arms)
    found = [(Path(f"hacks/{name}.md"), *more) for name, *more in reports(folder)]
    page = Template((HERE / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(f"{stage}: {folder.resolve().name}"),
        state=html.escape(standing(folder, stage, settings, rows, done)),
        command=" ".join(f"<span>{html.escape(word)}</span>" for word in command(folder, stage, settings)),
        verdicts=f"<ul>{told}</ul><pre>{html.escape(arms_table(arms))}</pre>" if arms else "<p>None yet.</p>",
        charts=charts(rows, arms), near=near, texts=json.dumps(texts).replace("<", "\\u003c"),
        hacks=table(("report", "arm", "step", "why", "verdict"), found) if found else "<p>None.</p>",
        files=", ".join(f'<a href="{name}">{name}</a>' for name in FILES if (folder / name).exists()))
    data = page.encode("utf-8", errors="surrogateescape")  # as names of files are in some locales
    write_whole(folder / "report.html", lambda f: f.write(data))
    return folder / "report.html"


def main():
    sys.stdout.reconfigure(errors="replace")
    folders = sys.argv[1:]
    if len(folders) != 1 or {"-h", "--help"} & set(folders):
        print(__doc__.strip())
        raise SystemExit(0 if {"-h", "--help"} & set(folders) else 2)
    try:
        print(write_page(folders[0]))
    except OSError as error:
        refuse(f"{error.filename or 'report.html'} could not be written ({error.strerror})")
    except DAMAGE as error:
        refuse(f"{', '.join(folders)}: a file of the run holds what no run writes ({brief(error)})")


if __name__ == "__main__":
    main()
