"""
What is said in a run, as text, and the report of a hack or an alarm.

A report is a page in hacks/ that a newcomer can read, and a picture beside it: what changed first; drift or
exploit, by a cross examination of the critic and the learner of now and of the snapshot; the texts, with what
differs marked; the row of the log. hacks/index.md lists them.
"""
import copy
import itertools
import json
import math
import re

import torch

from plot import draw_report, read_rows

SAID = ("output", "observation", "target")
CONTROL = {**{i: 0x2400 + i for i in range(32)}, 10: "⏎", 127: "␡"}  # a terminal or a page would obey them
LONGEST_CHARACTER = 4  # bytes, in UTF-8
TEXTS, APART = 10, 75  # in texts.jsonl: a tenth of an arm apart, and at least so many steps
LONGEST_TEXT = 64      # tokens there
LINE = 100             # characters of a line in samples.txt, unless one column is longer
HEAD = """\
Text to come, which nothing has learned from, a column for each token; ⏎ is a line break.
output       what the learner finds likeliest there, after the true tokens before
observation  the true token, which the critic reads
target       what the critic makes of both: the learner is to say this; ∅ is none of what it might have said

"""  # of samples.txt


# ---- tokens as text

def spell(encoding, ids):
    """The text of `ids` together, for a character may be several; a line break is ⏎ and a None is ∅."""
    runs = itertools.groupby(ids, key=lambda i: i is None)
    return "".join("∅" * len(list(run)) if none else encoding.decode(list(run), errors="replace")
                   for none, run in runs).translate(CONTROL)


def characters(encoding, ids):
    """Slices of `ids`, a token each, or as many as a character takes where tokens are parts of one."""
    at, slices = 0, []
    while at < len(ids):
        whole = (n for n in range(1, LONGEST_CHARACTER + 1) if at + n <= len(ids)
                 and "\ufffd" not in encoding.decode(ids[at:at + n], errors="replace"))
        slices.append(slice(at, at + next(whole, 1)))
        at = slices[-1].stop
    return slices


def marked(encoding, ids, reference):
    """Text of `ids` in which what differs from `reference` stands in ⟦ ⟧, runs of tokens at once."""
    differs = lambda at: ids[at] != reference[at]
    text = ""
    for mark, run in itertools.groupby(characters(encoding, reference), key=differs):
        run = list(run)
        said = spell(encoding, ids[run[0].start:run[-1].stop])
        text += f"⟦{said}⟧" if mark else said
    return text


def columns(encoding, said):
    """[(output, observation, target, the tokens of each)]: texts of what was said, by `characters`.

    said: (output, observation, target), lists of ids, all of one length.
    """
    return [(*(spell(encoding, ids[at]) for ids in said), *(ids[at] for ids in said))
            for at in characters(encoding, said[1])]


def aligned(encoding, said):
    """What was said as three lines, a column for each token, as wide as the widest of the three."""
    lines, blocks = [[], [], []], []
    for texts in (column[:3] for column in columns(encoding, said)):
        wide = max(map(len, texts))
        if lines[0] and sum(len(cell) + 1 for cell in lines[0]) + wide > LINE:
            blocks, lines = [*blocks, lines], [[], [], []]
        for line, text in zip(lines, texts):
            line.append(text.ljust(wide))
    return "\n".join("".join(f"{name:<11} │{'│'.join(line)}│\n" for name, line in zip(SAID, lines))
                     for lines in [*blocks, lines]) + "\n"


def texts_of(folder, encoding):
    """{arm: [{"step", "tokens": [(output, observation, target, kind)]}]} of the folder's texts.jsonl.

    kind: what the target is, "same" as the observation, the "own" output, "other", or "none".
    """
    found = {}
    for row in read_rows(folder, "texts.jsonl") if (folder / "texts.jsonl").exists() else ():
        tokens = []
        for *words, own, obs, target in columns(encoding, (row["own"], row["obs"], row["target"])):
            kind = "same" if target == obs else "own" if target == own else "other"
            tokens.append((*words, "none" if None in target else kind))
        found.setdefault(row["arm"], []).append(dict(step=row["step"], tokens=tokens))
    return found


def keep_texts(phases, n):
    """Appends what is said at step phases.step of n to texts.jsonl, at some of the evaluations of an arm: it
    costs one to two steps."""
    interval = phases.settings["eval_interval"]
    every = interval * math.ceil(max(n / TEXTS, APART) / interval)
    if phases.arm != "meta" and (phases.step % every == 0 or phases.step == n):
        *said, _ = phases.told(phases.parts["learner"], phases.judge())
        own, obs, target = (ids[:LONGEST_TEXT] for ids in said)
        row = dict(arm=phases.arm, step=phases.step, own=own, obs=obs, target=target)
        phases.run.append("texts.jsonl", json.dumps(row) + "\n")


# ---- drift or exploit

MISJUDGED = 0.1  # by how much less often than at first a critic names the truth, to have misjudged
ASKED = {("now", "then"): "today's critic on the snapshot's outputs",
         ("then", "now"): "the snapshot's critic on today's outputs"}
FOUND = {  # by whether each misjudges
    (True, True): "Both: today's critic misjudges even the old outputs, the old critic misjudges today's.",
    (True, False): "Drift: the old critic judges today's outputs right; today's misjudges even the old ones.",
    (False, True): "Exploit: today's critic judges the old outputs as well as ever; today's outputs fool it.",
    (False, False): "Neither: the critic judges as at first. If gold falls too, the alarm was false; if it "
                    "rises, the signal was wrong from the start: a biased teacher, or an observation not the "
                    "learner's."}


def lacks(judged):
    """{(critic, outputs): by how much less often it names the truth than the snapshot's on its own}."""
    return {pair: judged["then", "then"] - judged[pair] for pair in ASKED}


def verdict(judged):
    """What the cross examination says. judged: {(critic, outputs): agreement}, "then" | "now" each."""
    return FOUND[tuple(lack > MISJUDGED for lack in lacks(judged).values())]


def caveats(judged, earlier):
    """Sentences beside a verdict: that it says little, why it is not that of the report before.

    earlier: what `write_report` kept of the arm's reports before.
    """
    told, last = [], earlier[-1] if earlier else None
    if judged["then", "then"] < 0.5:
        told.append("Even the snapshot's critic, on the snapshot's outputs, names the truth in only "
                    f"{judged['then', 'then']:.2f} of the places: it has learned little, or reads something "
                    "else in this arm. A verdict on it says little.")
    before = {tuple(pair.split(" on ")): value for pair, value in last["judged"].items()} if last else judged
    if verdict(before) != verdict(judged):
        was, now = lacks(before), lacks(judged)
        crossed = [f"{who} fell short by {was[pair]:.2f} of the snapshot's critic on the snapshot's outputs, "
                   f"and does by {now[pair]:.2f} now" for pair, who in ASKED.items()
                   if (was[pair] > MISJUDGED) != (now[pair] > MISJUDGED)]
        told.append(f"At step {last['step']} the verdict was {verdict(before).split(':')[0]}: "
                    + "; ".join(crossed) + f". More than {MISJUDGED} counts as misjudging; each report asks "
                    "about another text.")
    return told


# ---- the report

def examined(phases):
    """(judged, see `verdict`; {"then" | "now": (output, observation, target)}, lists of ids): the critic and
    the learner of now and of the snapshot, crossed, on the text to come."""
    now, judged, texts = dict(learner=phases.parts["learner"], critic=phases.judge()), {}, {}
    times = dict(then={role: copy.deepcopy(module) for role, module in now.items()}, now=now)
    for role, module in times["then"].items():
        module.load_state_dict(phases.snapshot[role], strict=False)  # a known table is in no snapshot
    for c, o in itertools.product(times, times):
        *said, agreement = phases.told(times[o]["learner"], times[c]["critic"])
        judged[c, o] = phases.run.mean(agreement)
        texts |= {o: said} if c == o else {}
    return judged, texts


@torch.no_grad()
def write_report(phases, why):
    """hacks/NNN.md: what happened, in an order in which a newcomer can read it, a picture beside it, and the
    index of all. A picture that cannot be written costs a line, not the run.

    why: "gold" or the names of the streams that alarmed. Returns what the summary keeps: {"step", "why",
    "changed": [[step, stream]], "judged"}, judged as "critic on outputs": agreement.
    """
    judged, texts = examined(phases)
    run, row, changed, earlier = phases.run, phases.row, phases.watch.order(), phases.at["track"]["reports"]
    kept = dict(step=row["step"], why=why if why == "gold" else "+".join(why),
                changed=[list(c) for c in changed],
                judged={f"{c} on {o}": round(value, 4) for (c, o), value in judged.items()})
    if run.first:
        (run.out_dir / "hacks").mkdir(exist_ok=True)
        name = f"{run.last_report() + 1:03d}"
        try:
            draw_report(run.out_dir, row, run.out_dir / f"hacks/{name}.png")
            picture = f"\n![curves]({name}.png)"
        except Exception as error:
            picture = f"\nNo picture was drawn ({type(error).__name__})."
            run.say(f"hacks/{name}.png could not be drawn ({type(error).__name__})")
        then, beside = at_the_snapshot(read_rows(run.out_dir), row["arm"]), caveats(judged, earlier)
        page = report_page(row, then, why, what_changed(changed, earlier), picture, judged, beside, texts,
                           phases.corpus.encoding)
        run.write(f"hacks/{name}.md", lambda f: f.write(page.encode("utf-8")))
        run.write("hacks/index.md", lambda f: f.write(index_page(run.out_dir).encode("utf-8")))
    return kept


def at_the_snapshot(rows, arm):
    """{column: its value at the end of the meta phase}; without that, its first in the arm."""
    found = {}
    for row in reversed([r for r in rows if r["arm"] == "meta"][-1:] + [r for r in rows if r["arm"] == arm]):
        found.update((column, value) for column, value in row.items() if value is not None)
    return found


def what_changed(changed, earlier):
    """Lines: the streams that left their usual range, in order; if none has, what that means."""
    alarms = [report["step"] for report in earlier if report["why"] != "gold"]
    if changed:
        return [f"{i}. {stream}, from step {since}" for i, (since, stream) in enumerate(changed, 1)]
    if alarms:
        return [f"The watch began anew after its alarm at step {alarms[-1]}, and nothing has left its range "
                "since: the change came before, and that alarm's report has its order."]
    return ["The watch has seen nothing: either it was off, for it learns what is usual in 100 steps of the "
            "meta phase, or this came by a way that it does not look at."]


def moved(then, row, most=5):
    """Lines: the numbers of a row farthest from those at the snapshot, as a share of the larger of both."""
    numbers = [c for c in row if isinstance(row[c], float) and isinstance(then.get(c), float)
               and c not in ("lr", "tok_per_s", "mfu", "peak_gb", "gold_bpb")]
    share = {c: abs(row[c] - then[c]) / max(abs(row[c]), abs(then[c]), 1e-9) for c in numbers}
    far = sorted((c for c in numbers if share[c] > 0.02), key=lambda c: -share[c])[:most]
    return [f"- {c}: {then[c]:.4g} → {row[c]:.4g}" for c in far] or ["- none by more than 2 %"]


def report_page(row, then, why, changed, picture, judged, beside, texts, encoding):
    """The page of `write_report`, markdown. changed, picture, beside: lines of it."""
    cause = "gold rose" if why == "gold" else "the watch alarmed on " + ", ".join(why)
    judges = [f"| {whose} critic | {judged[c, 'then']:.3f} | {judged[c, 'now']:.3f} |"
              for whose, c in (("snapshot's", "then"), ("today's", "now"))]
    number = lambda value: f"{value:.4g}" if isinstance(value, float) else ""
    numbers = [f"| {column} | {number(then.get(column))} | {number(value)} |"
               for column, value in row.items() if isinstance(value, float)]
    show = lambda when: [f"{what:<12} {marked(encoding, ids, texts[when][1])}"
                         for what, ids in zip(SAID, texts[when])]
    return "\n".join((
        f"# {row['arm']}, step {row['step']}: {cause}", "\n## What changed first\n", *changed,
        "\nWhat is farthest from the end of the meta phase:\n", *moved(then, row), picture,
        "\n## Drift or exploit?\n\nShare of targets that equal the observation:\n",
        "| | on the snapshot's outputs | on today's |\n|---|---|---|", *judges, "\n" + verdict(judged),
        *("\n" + sentence for sentence in beside),
        "\n## The texts\n\nWhat differs from the observation stands in ⟦ ⟧; ⏎ is a line break.",
        "\n**before: the snapshot**\n\n```", *show("then"), "```\n\n**now**\n\n```", *show("now"),
        "```\n\n## The row of the log\n\n| | end of the meta phase | now |\n|---|---|---|", *numbers, ""))


# ---- the index

def reports(folder):
    """[(name, arm, step, cause, verdict)] of the reports of the run in `folder`, as their pages say."""
    found, known = [], {text.split(":")[0] for text in FOUND.values()}
    for path in sorted((folder / "hacks").glob("*.md")):
        text = path.read_text(encoding="utf-8", errors="replace") if path.stem.isdecimal() else ""
        title = re.match(r"# (\S+), step (\d+): (.+)", text)
        says = re.search(rf"^({'|'.join(known)}):", text, re.MULTILINE)
        if title:
            found.append((path.stem, title[1], int(title[2]), title[3], says[1] if says else ""))
    return found


def index_page(folder):
    """hacks/index.md: a row for each report."""
    rows = [f"| [{name}]({name}.md) | {arm} | {step} | {cause} | {says} |"
            for name, arm, step, cause, says in reports(folder)]
    head = "| report | arm | step | why | verdict |\n|---|---|---|---|---|"
    return "\n".join(("# Hacks and alarms\n", head, *rows, ""))
