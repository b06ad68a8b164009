"""
What the studies say: the tables between the marks of README.md, and figures/stage-*-study.png.

    python study_report.py   # after `python study.py 1`, 1-long, 2, 2-meaning or 3; says how many seeds a number rests on

Hacks that have not come by an arm's end are counted as its end, and marked with >.
"""
import math
import re
from collections import defaultdict

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from configurator import refuse
from plot import COLOUR, STUDENT, interval, read_run
from study import OUT, ROOT, STUDIES, finished

README, FIGURES = ROOT / "README.md", ROOT / "figures"


def load(point, study="1"):
    """{seed: (summary, rows)} of the finished runs of a point."""
    folders = {seed: OUT / f"study-{study}" / point / str(seed) for seed in STUDIES[study][2]}
    return {seed: read_run(folder) for seed, folder in folders.items() if finished(folder)}


def at(rows, arm, step, name="gold_nats"):
    """A quantity of an arm's log at a step."""
    return next(r[name] for r in rows if r["arm"] == arm and r["step"] == step)


def pm(values, digits=2):
    """mean ± half of the 95 % interval; nothing where a value is missing, as `recovered` is if real training gained nothing."""
    if not len(values) or any(v is None for v in values):
        return ""
    mean, half = interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def hack_text(summaries, arm):
    """Median [least, most] steps to hack over seeds; > marks arms that ended without."""
    steps = sorted((a["steps_to_hack"] or a["self_steps"], a["steps_to_hack"] is None)
                   for a in (s["arms"][arm] for s in summaries))
    show = lambda pair: f"{'>' * pair[1]}{pair[0]}"
    if all(never for _, never in steps):
        return f"none in {steps[0][0]}"
    return f"{show(steps[len(steps) // 2])} [{show(steps[0])}, {show(steps[-1])}]"


def recovered_at(point, arm, base, step=400):
    """Recovered at `step` of each seed, against the real arm of the base run of that seed at that step."""
    shares = []
    for seed, (summary, rows) in point.items():
        if seed in base:
            real = base[seed][0]["arms"]["real"]["gold_start"] - at(base[seed][1], "real", step)
            shares.append((summary["arms"][arm]["gold_start"] - at(rows, arm, step)) / real)
    return shares


LEVERS = (  # (row, point, arm)
    ("none", "base", "self"), ("none", "base", "ema"), ("none", "base", "frozen"), ("none", "base", "shuffled"),
    ("none", "base", "sharpen"), ("`adversarial=.3` random", "random", "self"),
    ("`adversarial=.3` corrupted", "corrupted", "self"), ("`adversarial=.3` flips", "flips", "self"),
    ("`critic_part=head`", "own-head", "self"), ("`critic_part=block`", "own-block", "self"),
    ("`order=2`", "order-2", "self"), ("`keep_meta=.1` random", "keep-random", "self"),
    ("`keep_meta=.1` random", "keep-random", "ema"), ("`keep_meta=.1` recorded", "keep-recorded", "self"),
    ("`anchor=.3`", "anchor", "self"), ("`trust=.001`", "trust", "self"), ("`ema_decay=.99`", "ema-.99", "ema"),
    ("`ema_decay=.9999`", "ema-.9999", "ema"), ("`target=soft`", "soft", "self"), ("`target=soft`", "soft", "frozen"),
    ("`target=soft`", "soft", "ema"), ("`rescue_steps=20`", "rescue-hacked", "self"),
    ("`rescue_steps=20`", "rescue-hacked", "ema"), ("`rescue_steps=20`, own outputs", "rescue-own", "self"),
    ("`keep_meta=.1` random, `anchor=.3`", "keep-random+anchor", "self"),
    ("`ema_decay=.9999`, `anchor=.3`", "ema-.9999+anchor", "ema"))


def lever_table():
    base = load("base")
    lines = ["| lever | arm | seeds | steps to hack | recovered at 400 | real tokens as targets |",
             "|---|---|---|---|---|---|"]
    for row, name, arm in LEVERS:
        point = {s: run for s, run in load(name).items() if arm in run[0]["arms"]}
        if not point:
            continue
        real = np.mean([at(rows, arm, 400, "real_targets") for _, rows in point.values()])
        lines.append(f"| {row} | `{arm}` | {len(point)} | {hack_text([s for s, _ in point.values()], arm)} | "
                     f"{pm(recovered_at(point, arm, base))} | {real:,.0f} |")
    return "\n".join(lines)


def ensemble_table():
    rows = ["| frozen critics after 300 meta steps | seeds | agreement | steps to hack | gold at 400 |",
            "|---|---|---|---|---|"]
    for text, name in (("one", "biased"), ("mean of three", "biased-mean"), ("weights of three", "biased-weights")):
        point = load(name)
        if point:
            agree = [at(log, "frozen", 10, "agreement") for _, log in point.values()]
            hacks = hack_text([s for s, _ in point.values()], "frozen")
            ends = [at(log, "frozen", 400) for _, log in point.values()]
            rows.append(f"| {text} | {len(point)} | {pm(agree)} | {hacks} | {pm(ends)} |")
    return "\n".join(rows)


def law():
    """The table and the fit log(steps to hack) = c + α log(meta steps) + β log(rate) + γ log(vocabulary)."""
    lines = ["| meta steps | rate | vocabulary | seeds | critic's accuracy | steps to hack |",
             "|---|---|---|---|---|---|"]
    rows = []
    for name in sorted(name for name in STUDIES["1"][1] if name.startswith("law-")):
        point = load(name)
        if not point:
            continue
        config = next(iter(point.values()))[0]["config"]
        rate = config["learning_rate"] * config["self_rate"]
        accuracy = [at(log, "self", 2, "agreement") for _, log in point.values()]
        lines.append(f"| {config['meta_steps']} | {rate:g} | {config['vocab']} | {len(point)} | {pm(accuracy, 3)} | "
                     f"{hack_text([s for s, _ in point.values()], 'self')} |")
        rows += [(np.log(config["meta_steps"]), np.log(rate), np.log(config["vocab"]),
                  np.log(max(1, s["arms"]["self"]["steps_to_hack"] or s["arms"]["self"]["self_steps"])))
                 for s, _ in point.values()]
    data = np.array(rows).reshape(-1, 4)
    taught = data[data[:, 0] > np.log(300)] if rows else data  # after 250 meta steps the critic is a biased teacher
    fits = [text for text in (fit(data, "all points"), fit(taught, "without 250 meta steps")) if text]
    return "\n\n".join(["\n".join(lines), *fits])


def fit(data, which):
    """The power law by least squares on logarithms, or "" where one of the three has not been varied yet.

    The points of one seed that share a snapshot are taken as independent, so the intervals are somewhat too narrow.
    """
    x = np.column_stack((np.ones(len(data)), data[:, :3] - data[:, :3].mean(0))) if len(data) else data
    if len(x) < 8 or np.linalg.matrix_rank(x) < 4:
        return ""
    beta, *_ = np.linalg.lstsq(x, data[:, 3], rcond=None)
    left = data[:, 3] - x @ beta
    error = np.sqrt(np.diag(np.linalg.inv(x.T @ x)) * (left @ left) / (len(x) - 4))
    t = STUDENT.get(len(x) - 3, 1.96 + 2.5 / (len(x) - 4))
    names = ("meta steps", "learning rate", "vocabulary")
    terms = ", ".join(f"{n}^({b:.2f} ± {t * e:.2f})" for n, b, e in zip(names, beta[1:], error[1:]))
    share = 1 - left @ left / ((data[:, 3] - data[:, 3].mean()) ** 2).sum()
    return f"Fitted, {which}: steps to hack ∝ {terms}; R² {share:.2f}, {len(x)} runs."


def breaking_order():
    """When each quantity leaves its place in the unfrozen arm, median step over seeds [least, most]."""
    signs = {"agreement, on own output": lambda r, first: r["agreement"] < first["agreement"] - 0.05,
             "agreement on the stored probe": lambda r, first: r["agreement_probe"] < first["agreement_probe"] - 0.05,
             "the most frequent token is 10 % of targets": lambda r, first: r["target_top"] > 0.1,
             "surprise, + .3 nats": lambda r, first: r["surprise"] > first["surprise"] + 0.3,
             "gold, + .1 nats": lambda r, first: r["gold_nats"] > first["gold_nats"] + 0.1,
             "entropy of the output, − .5 nats": lambda r, first: r["output_entropy"] < first["output_entropy"] - 0.5,
             "half of the targets equal the own output": lambda r, first: r["echo"] > 0.5}
    steps = defaultdict(list)
    for _, rows in load("law-base").values():
        rows = [r for r in rows if r["arm"] == "self" and r["step"]]
        for name, test in signs.items():
            steps[name].append(next((r["step"] for r in rows if test(r, rows[0])), np.inf))
    lines = ["| what | step |", "|---|---|"]
    for name in sorted(steps, key=lambda n: np.median(steps[n])):
        lines.append(f"| {name} | {np.median(steps[name]):.0f} [{min(steps[name]):.0f}, {max(steps[name]):.0f}] |")
    return "\n".join(lines)


def cross_examination():
    """Who changed: agreement of the critic and outputs of then and now at the first report after a hack."""
    lines = ["| arm | seeds | snapshot's critic, snapshot's outputs | snapshot's critic, today's outputs | "
             "today's critic, snapshot's outputs | today's critic, today's outputs |", "|---|---|---|---|---|---|"]
    base = load("base")
    for arm in ("self", "ema", "shuffled", "sharpen"):
        reports = [r for s, _ in base.values() for r in s["arms"][arm]["reports"]]
        found = [r["judged"] for r in reports if r["why"] == "gold"]
        if found:
            lines.append(f"| `{arm}` | {len(found)} | " + " | ".join(
                pm([f[k] for f in found]) for k in ("then on then", "then on now", "now on then", "now on now")) + " |")
    return "\n".join(lines)


def watch_score():
    """Alarms beside gold, over all arms that were neither rescued nor real."""
    lead, missed, hacked, false, healthy_steps = defaultdict(list), 0, 0, 0, 0
    for study, name in [(study, name) for study in ("1", "1-long") for name in STUDIES[study][1]]:
        if name.startswith("rescue"):
            continue
        for summary, rows in load(name, study).values():
            for arm, a in summary["arms"].items():
                if a["steps_to_hack"] is None:
                    false += len(a["alarms"])
                    healthy_steps += a["self_steps"]
                    continue
                hacked += 1
                first = a["alarms"][0] if a["alarms"] else None
                missed += first is None
                if first is not None:
                    lead[arm].append(a["steps_to_hack"] - first)
    if not hacked:
        return ""
    lines = ["| arm | hacks | steps of lead, median [least, most] |", "|---|---|---|"]
    for arm, steps in lead.items():
        lines.append(f"| `{arm}` | {len(steps)} | {np.median(steps):.0f} [{min(steps)}, {max(steps)}] |")
    rate = false / healthy_steps * 10_000 if healthy_steps else float("nan")
    return "\n".join(lines) + (f"\n\n{hacked} hacked arms, {missed} missed. {false} alarms in {healthy_steps:,} steps of "
                               f"arms never hacked: {rate:.2f} for each 10,000.")


def rescues():
    """Steps from one rescue to the next alarm, where the critic read hacked outputs in the rescue and where not."""
    lines = ["| critic refreshed on | arm | seeds | rescues in 400 steps | steps to the first | from first to second | "
             "last interval |", "|---|---|---|---|---|---|---|"]
    for text, name, arm in (("hacked outputs", "rescue-hacked", "self"), ("own outputs", "rescue-own", "self"),
                            ("hacked outputs", "rescue-hacked", "ema")):
        times = [np.diff([0, *s["arms"][arm]["rescues"]]) for s, _ in load(name).values() if arm in s["arms"]]
        times = [t for t in times if len(t)]
        if times:
            cells = [pm([len(t) for t in times], 1), pm([t[0] for t in times], 0),
                     pm([t[1] for t in times if len(t) > 1], 0), pm([t[-1] for t in times], 0)]
            lines.append(f"| {text} | `{arm}` | {len(times)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


LONG = (("frozen", "frozen", "frozen copy"), ("self", "self", "unfrozen, `keep_meta=.1` on random strings"))


def long_run():
    lines = ["| critic | seed | gold at start | at 5,000 | at 10,000 | at 20,000 | the same of `real` | recovered | hack | "
             "alarms | real tokens as targets |", "|---|---|---|---|---|---|---|---|---|---|---|"]
    frozen, closing = load("frozen", "1-long"), []
    for point, arm, text in LONG:
        shares, slopes = [], []
        for seed, (summary, rows) in load(point, "1-long").items():
            a, real = summary["arms"][arm], frozen[seed][0]["arms"]["real"]
            share = (a["gold_start"] - a["gold_end"]) / (real["gold_start"] - real["gold_end"])
            shares.append(share)
            slopes.append(at(rows, arm, 15000) - at(rows, arm, 20000))
            golds = " | ".join(f"{at(rows, arm, s):.3f}" for s in (0, 5000, 10000, 20000))
            lines.append(f"| {text} | {seed} | {golds} | {real['gold_end']:.3f} | {share:.3f} | "
                         f"{a['steps_to_hack'] or 'none'} | {len(a['alarms'])} | {at(rows, arm, 20000, 'real_targets')} |")
        if shares:
            closing.append(f"{text}: recovered {pm(shares, 3)} over {len(shares)} seeds; gold falls by {pm(slopes, 3)} from "
                           "step 15,000 to 20,000.")
    for arm, text in (("sharpen", "`sharpen`, frozen, reading no observation"), ("self", "`self` without any lever")):
        point = load("sharpen", "1-long")
        if point:
            closing.append(f"{text}: hacked at {hack_text([s for s, _ in point.values()], arm)}, {len(point)} seeds.")
    return "\n".join(lines) + "\n\n" + "\n\n".join(closing)


def carried():
    """What the gists carry: cross entropies of later chunks by mask, and the share of full minus none."""
    lines = ["| chunk, gists | meta steps | seeds | full | gists | none | pool | the gists carry | the same at the first four "
             "places of a chunk |",
             "|---|---|---|---|---|---|---|---|---|"]
    for name in ("base", *(n for n in STUDIES["2"][1] if n.startswith("share-"))):
        runs = [s for s, _ in load(name, "2").values()]
        if not runs:
            continue
        config, later = runs[0]["config"], [s["later"] for s in runs]
        cells = [pm([v[k] for v in later], 3) if k in later[0] else "" for k in ("full", "gist", "none", "pool")]
        extra = ", spread" * (config["place"] == "spread") + ", rewriting" * (config["reconstruct"] > 0)
        places = zip(*(s["gist_share_by_place"] for s in runs))
        lines.append(f"| {config['chunk']}, {config['n_gist']}{extra} | {config['meta_steps']} | {len(runs)} | "
                     + " | ".join(cells) + f" | {pm([s['gist_share'] for s in runs])} | "
                     + ", ".join(f"{np.mean(p):.2f}" for p in list(places)[:4]) + " |")
    return "\n".join(lines)


def gist_row(what, arm, runs, shares):
    last = [next(r for r in reversed(rows) if r["arm"] == arm) for _, rows in runs]
    agree = "" if arm == "real" else pm([r["agreement"] for r in last])
    kept = "" if arm in ("forecast", "static") else f"{np.mean([s['directions'] for s, _ in runs]):.0f}"
    return f"| {what} | `{arm}` | {len(runs)} | {hack_text([s for s, _ in runs], arm)} | {pm(shares)} | {agree} | {kept} |"


def gist_arms():
    """What the arms of one setting recover of real training through the distance of gists."""
    base, arms = load("base", "2"), load("arms", "2")
    lines = ["| arm | seeds | steps to hack | recovered at 250 | agreement |", "|---|---|---|---|---|"]
    for point, names in ((base, ("real", "frozen")), (arms, ("self", "ema", "shuffled", "sharpen", "static")),
                         (base, ("random",))):
        for arm in names if point else ():
            row = gist_row("", arm, list(point.values()), recovered_at(point, arm, base, 250))
            lines.append(row.removeprefix("|  ").rsplit("|", 2)[0] + "|")
    return "\n".join(lines) if arms else ""


def forgets():
    """What is recovered as the gists, or the score, tell less apart; and scores that are not proper."""
    base = load("base", "2")
    lines = ["| what differs | arm | seeds | steps to hack | recovered at 250 | agreement | directions |",
             "|---|---|---|---|---|---|---|"]
    for name, settings in STUDIES["2"][1].items():
        point = load(name, "2")
        if name in ("base", "arms") or name.startswith("share") or not point:
            continue
        what = " ".join(w for w in settings.split() if not w.startswith(("--start", "--arms", "--eval_interval")))
        for arm in ("self", "frozen", "ema", "forecast", "random"):
            runs = {seed: run for seed, run in point.items() if arm in run[0]["arms"]}
            if not runs:
                continue
            if all("real" in s["arms"] for s, _ in runs.values()):  # beside its own real arm, at its own end
                shares = [s["arms"][arm]["recovered"] for s, _ in runs.values()]
            else:
                shares = recovered_at(runs, arm, base, 250)
            steps = next(iter(runs.values()))[0]["arms"][arm]["self_steps"]
            note = "" if steps == 250 else f" (recovered at {steps:,})"
            lines.append(gist_row((f"`{what}`" if what else "nothing") + note, arm, list(runs.values()), shares))
    return "\n".join([*lines, "", beside_random()]) if len(lines) > 2 else ""


def beside_random():
    """What contextual gists recover more than random ones, seed by seed, of real training in as many steps."""
    found = []
    for name in STUDIES["2"][1]:
        runs = {seed: run for seed, run in load(name, "2").items() if {"frozen", "random"} <= set(run[0]["arms"])}
        if len(runs) > 2:
            real = runs if all("real" in s["arms"] for s, _ in runs.values()) else load("base", "2")
            steps = next(iter(runs.values()))[0]["arms"]["frozen"]["self_steps"]
            gists, random = (recovered_at(runs, arm, real, steps) for arm in ("frozen", "random"))
            found.append(f"{name} {pm([a - b for a, b in zip(gists, random)])}")
    return "What gists recover more than random numbers, by seed: " + ", ".join(found) + "."


MEANING = (  # (text, critic, score, point of study 2-meaning, arms)
    ("synonyms", "another", "praise", "praise", ("forecast", "frozen", "static", "random")),
    ("synonyms", "a copy of the learner", "praise", "own", ("forecast", "frozen")),
    ("synonyms, 8 directions", "another", "praise", "rank-8", ("forecast", "frozen", "random")),
    ("synonyms", "another", "logscore", "logscore", ("forecast", "frozen", "random")),
    ("plays in spellings", "another", "praise", "spellings", ("forecast", "frozen", "static", "random")),
    ("plays", "another", "praise", "plays", ("forecast", "random")))


def meaning():
    """Little text, much of it noise, and a critic that has read more: who learns faster, and farther."""
    lines = ["| text | critic | score | what stands for a gist | seeds | recovered at 100 | best gold | the same of real | "
             "better by |", "|---|---|---|---|---|---|---|---|---|"]
    for text, critic, score, point, arms in MEANING:
        runs = load(point, "2-meaning")
        real = runs if runs and "real" in next(iter(runs.values()))[0]["arms"] else load("praise", "2-meaning")
        for arm in arms if runs else ():
            best = [s["arms"][arm]["gold_best"] for s, _ in runs.values()]
            goal = [real[seed][0]["arms"]["real"]["gold_best"] for seed in runs]
            lines.append(f"| {text} | {critic} | {score} | {dict(frozen='gists').get(arm, arm)} | {len(runs)} | "
                         f"{pm(recovered_at(runs, arm, real, 100))} | {pm(best, 3)} | {pm(goal, 3)} | "
                         f"{pm([g - b for g, b in zip(goal, best)], 3)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def critic_rows(points, arms=None, what="critic"):
    """Gain of one inner step, in thousandths of a nat, and cosines at the end of the meta phase, and what the open run
    recovers. points: {text: point of study 3, or study/point}; arms: those of interest, None for all."""
    lines = [f"| {what} | gain, shuffled, real | cos with real | cos_bb, real's | arm | seeds | steps to hack | recovered |",
             "|---|---|---|---|---|---|---|---|"]
    for text, name in points.items():
        study, _, point = name.rpartition("/")
        runs = [s for s, _ in load(point, study or "3").values()]
        if not runs:
            continue
        told = lambda *names, by=1, digits=2: ", ".join(pm([by * s[k] for s in runs], digits) for k in names)
        head = (f"| {text} | {told('gain', 'gain_shuffled', 'gain_real', by=1e3, digits=1)} | {told('cosine_real')} | "
                f"{told('cos_bb', 'cos_bb_real')}")
        for arm in (a for a in runs[0]["arms"] if a != "real" and a in (arms or runs[0]["arms"])):
            with_arm = [s for s in runs if arm in s["arms"]]
            lines.append(f"{head} | `{arm}` | {len(with_arm)} | {hack_text(with_arm, arm)} | "
                         f"{pm([s['arms'][arm]['recovered'] for s in with_arm])} |")
            head = "|" + " |" * 3
    return "\n".join(lines) if len(lines) > 2 else ""


def second_order():
    return critic_rows({"200 steps of second order": "base", "κ = 1, left as it starts": "untrained",
                        "κ = 7 by hand, random E": "by-hand", "`zero_mean=false`": "3-forms/no-zero-mean",
                        "a pool that moves by real text": "3-forms/pool-real",
                        "a pool that moves by the signal": "3-forms/pool-self"})


SYNONYMS = {  # text: point of study 3
    "learned by second order": "synonyms", "κ = 7 by hand, random E": "synonyms-by-hand",
    "10,000 tokens of text, learned": "synonyms-10000", "10,000 tokens, by hand": "synonyms-10000-by-hand",
    "a bottleneck's embeddings, κ = 7": "synonyms-bottleneck",
    "a bottleneck's, then second order": "synonyms-bottleneck-meta",
    "the plays in spellings, learned": "spellings", "the plays in spellings, by hand": "spellings-by-hand",
    "20,000 tokens of them, learned": "spellings-20000", "20,000 tokens, by hand": "spellings-20000-by-hand"}


def synonyms():
    """Where many tokens mean one thing: what second order finds, and who learns faster, with the control by hand."""
    lines = ["| critic | seeds | precision | gain / real's | cos_bb, real's | recovered at the end | best gold of the signal, "
             "of real | median steps to real's best gold, signal / real |", "|---|---|---|---|---|---|---|---|"]
    for text, name in SYNONYMS.items():
        runs = list(load(name, "3").values())
        if not runs:
            continue
        found = [s for s, _ in runs]
        best = lambda arm: [s["arms"][arm]["gold_best"] for s in found]
        first = lambda rows, arm, goal: next((r["step"] for r in rows if r["arm"] == arm and r["gold_nats"] <= goal + 1e-5),
                                             None)
        goals = list(zip((rows for _, rows in runs), best("real")))
        middle = lambda steps: sorted(math.inf if s is None else s for s in steps)[len(steps) // 2]
        soon = " / ".join(str(middle([first(rows, arm, goal) for rows, goal in goals])).replace("inf", "never")
                          for arm in ("frozen", "real"))
        lines.append(f"| {text} | {len(runs)} | {pm([s['precision'] for s in found], 3)} | "
                     f"{pm([s['gain'] / s['gain_real'] for s in found])} | {pm([s['cos_bb'] for s in found])}, "
                     f"{pm([s['cos_bb_real'] for s in found])} | "
                     f"{pm([s['arms']['frozen']['recovered'] for s in found], 3)} | "
                     f"{pm(best('frozen'), 3)}, {pm(best('real'), 3)} | {soon} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def chunks():
    return critic_rows({"κ = 1, then second order": "chunk-4", "κ = 7 by hand": "chunk-4-by-hand",
                        "κ = 7, then second order": "chunk-4-sharp", "four samples": "3-forms/chunk-4-samples",
                        "two gists, of two tokens each": "3-forms/chunk-4-two",
                        "gists pass one block": "3-forms/chunk-4-layer",
                        'the same, `gist_b="own+truth"`': "3-forms/chunk-4-own", "chunks of 8": "3-forms/chunk-8"},
                       what="critic of chunks of 4")


def synonym_chunks():
    """What chunks that the learner writes alone are worth, and by seed what `frozen` gains over the two controls."""
    points = {"learned by second order": "synonyms-chunk", "the same, four rollouts": "synonyms-chunk-samples",
              "κ = 7 by hand, random E": "synonyms-chunk-by-hand"}
    lines = []
    for text, name in points.items():
        ends = [{arm: a["gold_end"] for arm, a in s["arms"].items()} for s, _ in load(name, "3").values()]
        ahead = [pm([e[arm] - e["frozen"] for e in ends], 3) for arm in ("first", "frozen_first")]
        if ends:
            lines.append(f"{text}: by seed `frozen` ends {ahead[0]} nats below `first` and {ahead[1]} below `frozen_first`.")
    return "\n\n".join((critic_rows(points), *lines)) if lines else ""


def judges():
    return critic_rows({"`random` text, one inner step": "base", "`next`": "next", "`similar`": "similar",
                        "`random`, 2 inner steps": "steps-2", "`random`, 4 inner steps": "steps-4",
                        "facts, `random`": "facts-random", "facts, `next`": "facts-next",
                        "facts, `similar`": "facts-similar", "facts, κ = 7 by hand": "facts-by-hand"},
                       arms=("frozen",), what="what judges")


def show(axis, steps, values, **style):
    """Mean over seeds and its 95 % interval; values: [seeds, steps]."""
    mean, half = interval(values)
    axis.plot(steps, mean, **style)
    axis.fill_between(steps, mean - half, mean + half, color=style["color"], alpha=0.2, lw=0)


def show_arms(axis, runs, arms):
    """Gold less that at the start, of arms of runs {seed: (summary, rows)}; arms: {arm: what the legend says}."""
    for arm, text in arms.items():
        rows = [[r for r in rows if r["arm"] == arm] for _, rows in runs.values()]
        gold = [[r["gold_nats"] - one[0]["gold_nats"] for r in one] for one in rows]
        show(axis, [r["step"] for r in rows[0]], gold, color=COLOUR[arm], label=text)


def draw_gists():
    """figures/stage-2-study.png: gold on the plays, and on texts in which much of what differs is noise."""
    meant = dict(real="real", forecast="forecasts", frozen="gists", random="random numbers")
    panels = (("the plays", load("base", "2"), dict(real="real", frozen="gists", random="random numbers")),
              ("little text full of synonyms", load("praise", "2-meaning"), meant),
              ("little of the plays, in random spellings", load("spellings", "2-meaning"), meant))
    if not all(runs for _, runs, _ in panels):
        return
    figure, axes = plt.subplots(1, 3, figsize=(15, 4))
    for axis, (title, runs, arms) in zip(axes, panels):
        show_arms(axis, runs, arms)
        axis.set(title=title, xlabel="self steps")
        axis.grid(alpha=0.2)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("gold less that at the start, nats")
    figure.tight_layout()
    figure.savefig(FIGURES / "stage-2-study.png", dpi=120)


def draw_second_order():
    """figures/stage-3-study.png: gain, shuffled and real over the meta phase, the open run, and the planted synonyms."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4))
    base = [rows for _, rows in load("base", "3").values()]
    met = [[r for r in rows if "gain" in r] for rows in base]
    for name, colour in (("gain", "tab:green"), ("gain_real", "k"), ("gain_shuffled", "tab:purple")):
        show(left, [r["step"] for r in met[0]], [[1e3 * r[name] for r in rows] for rows in met], color=colour, label=name)
    left.set(xlabel="steps of the meta phase", title="gain of one inner step, 0.001 nats", yscale="symlog")
    for axis, point, label, style in ((middle, "base", "{}", "-"), (right, "synonyms", "{}, 40,000 tokens", "-"),
                                      (right, "synonyms-10000", "{}, 10,000 tokens", "--")):
        runs = load(point, "3").values()
        for arm in ("real", "frozen", "shuffled") if runs else ():
            rows = [[r for r in rows if r["arm"] == arm] for _, rows in runs]
            if all(rows):
                show(axis, [r["step"] for r in rows[0]], [[r["gold_nats"] for r in one] for one in rows],
                     color=COLOUR[arm], label=label.format(arm), ls=style)
    for axis, title, above in ((middle, "gold of the open run", 0.5), (right, "gold on planted synonyms", 0.8)):
        least = min(line.get_ydata().min() for line in axis.get_lines())
        axis.set(xlabel="self steps", ylim=(least - 0.05, least + above), title=title)
    for axis in (left, middle, right):
        axis.grid(alpha=0.2)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(FIGURES / "stage-3-study.png", dpi=120)


def draw():
    FIGURES.mkdir(exist_ok=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    base = list(load("base").values())
    for arm in ("real", "frozen", "ema", "self", "shuffled", "sharpen"):
        steps = [r["step"] for r in base[0][1] if r["arm"] == arm]
        mean, half = interval([[r["gold_nats"] for r in rows if r["arm"] == arm] for _, rows in base])
        left.plot(steps, mean, color=COLOUR[arm], label=arm)
        left.fill_between(steps, mean - half, mean + half, color=COLOUR[arm], alpha=0.2, lw=0)
    start = np.mean([s["gold_meta_end"] for s, _ in base])
    left.set(ylim=(start - 0.55, start + 0.9), xlabel="self steps", ylabel="gold, nats a token",
             title=f"600 steps, {len(base)} seeds, 95 % intervals")
    left.legend(fontsize=7, ncol=2)
    for point, arm in (("frozen", "real"), ("frozen", "frozen"), ("self", "self")):
        runs = list(load(point, "1-long").values())
        if not runs:
            continue
        steps = [r["step"] for r in runs[0][1] if r["arm"] == arm]
        mean, half = interval([[r["gold_nats"] for r in rows if r["arm"] == arm] for _, rows in runs])
        label = arm if arm != "self" else "self, keep_meta=.1 on random strings"
        right.plot(steps, mean, color=COLOUR[arm], label=label, ls="--" if arm == "real" else "-")
        right.fill_between(steps, mean - half, mean + half, color=COLOUR[arm], alpha=0.2, lw=0)
        right.legend(fontsize=7)
        right.set_title(f"20 times the meta phase, {len(runs)} seeds")
    right.set(xlabel="self steps")
    for axis in (left, right):
        axis.grid(alpha=0.2)
    figure.tight_layout()
    figure.savefig(FIGURES / "stage-1-study.png", dpi=120)


def first_runs(study):
    """The folders of a study's first point, all seeds."""
    return [OUT / f"study-{study}" / next(iter(STUDIES[study][1])) / str(seed) for seed in STUDIES[study][2]]


# Tables by the study that they need; they are written when its first point has been run, unless the README has more.
TABLES = {
    "1": dict(levers=lever_table, ensembles=ensemble_table, law=law, order=breaking_order, judged=cross_examination,
              watch=watch_score, rescues=rescues),
    "1-long": dict(long=long_run),
    "2": dict(carried=carried, gist_arms=gist_arms, forgets=forgets),
    "2-meaning": dict(meaning=meaning),
    "3": dict(second_order=second_order, synonyms=synonyms, chunks=chunks, synonym_chunks=synonym_chunks, judges=judges),
}


def main():
    text, ready = README.read_text(), [study for study in TABLES if all(finished(f) for f in first_runs(study))]
    if not ready:
        refuse(f"{OUT} holds no study whose first point is finished; run python study.py 1, 1-long, 2, 2-meaning or 3 first")
    for name, table in ((n, t) for study in ready for n, t in TABLES[study].items()):
        content = table()
        print(content, "\n")
        found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, flags=re.S)
        if found and content.count("\n") + 1 < found[1].count("\n"):
            print(f"{name}: left as it is, for the README has rows of runs that are not here\n")
        elif content:
            text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: m[1] + content + "\n" + m[2], text,
                          flags=re.S)
    README.write_text(text)
    if {"1", "1-long"} <= set(ready):
        draw()
    if {"2", "2-meaning"} <= set(ready):
        draw_gists()
    if "3" in ready:
        draw_second_order()
    print(f"written into {README.name} and {FIGURES.name}/: studies {', '.join(ready)}")


if __name__ == "__main__":
    main()
