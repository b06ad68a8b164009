"""
What the studies say: the tables between the marks of results/stage-*.md, and the figures beside them.

    python studies/report.py     # after studies/study.py, any of its studies

A row is called by its point in studies/study.py. A table says how many seeds it rests on, and never replaces
one of more rows or of more seeds. Hacks that have not come by an arm's end are counted as its end, marked
with >.
"""
import math
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's modules
from configurator import refuse
from plot import COLOUR, STUDENT, interval, pyplot, read_run
from probe import precision
from study import OUT, ROOT, STUDIES, finished

RESULTS = ROOT / "results"
ARMS = "real oracle first self frozen frozen_first same_place ema shuffled sharpen table mask forecast random"


# ---- runs. A point is named "study/point"

def folders(name):
    """{seed: folder} of the finished runs of a point."""
    study, point = name.split("/")
    found = {seed: OUT / f"study-{study}" / point / str(seed) for seed in STUDIES[study][2]}
    return {seed: folder for seed, folder in found.items() if finished(folder)}


def load(name, arm=None):
    """{seed: (summary, rows)} of the finished runs of a point, those that have the arm if one is named."""
    runs = {seed: read_run(folder) for seed, folder in folders(name).items()}
    return {seed: run for seed, run in runs.items() if arm is None or arm in run[0]["arms"]}


def complete(name):
    return len(folders(name)) == len(STUDIES[name.split("/")[0]][2])


def each(names, arms=ARMS):
    """(point, arm, runs) of each arm of points, such as "2/base 2/long", that has finished runs."""
    pairs = [(name, arm) for name in names.split() for arm in arms.split()]
    found = [(f"`{name.split('/')[1]}`", arm, load(name, arm)) for name, arm in pairs]
    return [one for one in found if one[2]]


def points_of(study, start):
    """The names of a study's points that start so."""
    return " ".join(f"{study}/{point}" for point in STUDIES[study][1] if point.startswith(start))


def of_arm(rows, arm):
    return [row for row in rows if row["arm"] == arm]


def at(rows, arm, step, name="gold_nats"):
    """A quantity of an arm's log at a step."""
    return next(row[name] for row in of_arm(rows, arm) if row["step"] == step)


def told(runs, arm, name):
    """What the summaries of runs say of an arm, a list."""
    return [summary["arms"][arm][name] for summary, _ in runs.values()]


def recovered_at(runs, arm, base, step):
    """Recovered at `step` of each seed, against the real arm of the base run of that seed at that step."""
    shares = []
    for seed, (summary, rows) in runs.items():
        if seed in base:
            real = base[seed][0]["arms"]["real"]["gold_start"] - at(base[seed][1], "real", step)
            shares.append((summary["arms"][arm]["gold_start"] - at(rows, arm, step)) / real)
    return shares


# ---- text

def pm(values, digits=2):
    """mean ± half of the 95 % interval; nothing where a value is missing."""
    if not len(values) or any(v is None for v in values):
        return ""
    mean, half = interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def spread(values, show="{:.0f}".format):
    """Median [least, most]."""
    values = sorted(values)
    return f"{show(values[len(values) // 2])} [{show(values[0])}, {show(values[-1])}]"


def hacks(runs, arm):
    """Median [least, most] steps to hack over seeds; > marks arms that ended without."""
    steps = zip(told(runs, arm, "steps_to_hack"), told(runs, arm, "self_steps"))
    steps = [(hack or end, hack is None) for hack, end in steps]
    if all(never for _, never in steps):
        return f"none in {steps[0][0]}"
    return spread(steps, lambda pair: f"{'>' * pair[1]}{pair[0]}")


def cells(runs, arm, shares):
    """What the tables have in common: arm, seeds, steps to hack, recovered."""
    return [f"`{arm}`", len(runs), hacks(runs, arm), pm(shares)]


def leaked(runs, arm):
    return f"{np.mean([of_arm(rows, arm)[-1]['real_targets'] for _, rows in runs.values()]):,.0f}"


def table(head, rows, *below):
    """Markdown of a head, its cells with | between, of rows, lists of cells, and of the paragraphs below."""
    if not rows:
        return ""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    found = "\n".join([f"| {head} |", "|---" * (head.count("|") + 1) + "|", *lines])
    return "\n\n".join([found, *filter(None, below)])


# ---- stage 1

def levers():
    points = "base random flips order-2 keep-random ema-.99 ema-.9999 soft rescue-hacked"
    base, names = load("1/base"), " ".join(f"1/{point}" for point in points.split())
    rows = [[point, *cells(runs, arm, recovered_at(runs, arm, base, 400)), leaked(runs, arm)]
            for point, arm, runs in each(names) if arm != "real"]
    return table("lever | arm | seeds | steps to hack | recovered at 400 | real tokens as targets", rows)


def law():
    """Steps to hack by meta steps, rate and vocabulary, and the fit of a power law."""
    rows, data = [], []
    for _, arm, runs in each(points_of("1", "law-"), "self"):
        config = next(iter(runs.values()))[0]["config"]
        varied = config["meta_steps"], config["learning_rate"] * config["self_rate"], config["vocab"]
        accuracy = [at(log, arm, 2, "agreement") for _, log in runs.values()]
        rows.append([varied[0], f"{varied[1]:g}", varied[2], len(runs), pm(accuracy, 3), hacks(runs, arm)])
        steps = zip(told(runs, arm, "steps_to_hack"), told(runs, arm, "self_steps"))
        data += [np.log((*varied, max(1, hack or end))) for hack, end in steps]
    data = np.array(data).reshape(-1, 4)
    taught = data[data[:, 0] > np.log(300)]  # with 250 meta steps the critic is a biased teacher
    return table("meta steps | rate | vocabulary | seeds | critic's accuracy | steps to hack", rows,
                 fit(data, "all points"), fit(taught, "without 250 meta steps"))


def fit(data, which):
    """The power law by least squares on logarithms, or "" where one of the three has not been varied yet.

    The points of one seed share a snapshot and are taken as independent: the intervals are somewhat narrow.
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
    share = 1 - left.var() / data[:, 3].var()
    return f"Fitted, {which}: steps to hack ∝ {terms}; R² {share:.2f}, {len(x)} runs."


SIGNS = {  # what leaves its place, by a row of the log and the first one
    "agreement, on own output": lambda r, first: r["agreement"] < first["agreement"] - 0.05,
    "agreement on the stored probe": lambda r, first: r["agreement_probe"] < first["agreement_probe"] - 0.05,
    "the most frequent token is 10 % of targets": lambda r, first: r["target_top"] > 0.1,
    "surprise, + .3 nats": lambda r, first: r["surprise"] > first["surprise"] + 0.3,
    "gold, + .1 nats": lambda r, first: r["gold_nats"] > first["gold_nats"] + 0.1,
    "entropy of the output, − .5 nats": lambda r, first: r["output_entropy"] < first["output_entropy"] - 0.5,
    "half of the targets equal the own output": lambda r, first: r["echo"] > 0.5}


def order():
    """When each quantity leaves its place in the unfrozen arm; of all seeds, for it does not say how many."""
    logs = [[r for r in of_arm(rows, "self") if r["step"]] for _, rows in load("1/law-base").values()]
    first = {what: sorted(next((r["step"] for r in log if sign(r, log[0])), math.inf) for log in logs)
             for what, sign in SIGNS.items() if complete("1/law-base")}
    return table("what | step", [[what, spread(steps)] for what, steps in sorted(
        first.items(), key=lambda pair: np.median(pair[1]))])


def judged():
    """Who changed: agreement of the critic and outputs of then and now at the first report after a hack."""
    rows, whose = [], ("then on then", "then on now", "now on then", "now on now")
    for _, arm, runs in each("1/base", "self ema shuffled sharpen"):
        reports = [r["judged"] for found in told(runs, arm, "reports") for r in found if r["why"] == "gold"]
        rows += [[f"`{arm}`", len(reports), *(pm([r[k] for r in reports]) for k in whose)]] if reports else []
    return table("arm | seeds | snapshot's critic, snapshot's outputs | snapshot's critic, today's outputs | "
                 "today's critic, snapshot's outputs | today's critic, today's outputs", rows)


def watch():
    """Alarms beside gold, over all arms that were not rescued."""
    names = f"{points_of('1', '')} {points_of('1-long', '')}".replace("1/rescue-hacked", "")
    arms = [(arm, a) for name in names.split() for summary, _ in load(name).values()
            for arm, a in summary["arms"].items()]
    hacked, lead = [(arm, a) for arm, a in arms if a["steps_to_hack"] is not None], {}
    well = [a for _, a in arms if a["steps_to_hack"] is None]
    for arm, a in hacked:
        lead.setdefault(arm, []).extend(a["steps_to_hack"] - alarm for alarm in a["alarms"][:1])
    alarms, steps = sum(len(a["alarms"]) for a in well), sum(a["self_steps"] for a in well)
    missed, often = sum(not a["alarms"] for _, a in hacked), 1e4 * alarms / max(1, steps)
    return table("arm | hacks | steps of lead, median [least, most]",
                 [[f"`{arm}`", len(found), spread(found)] for arm, found in lead.items() if found],
                 f"{len(hacked)} hacked arms, {missed} missed. {alarms} alarms in {steps:,} steps of arms "
                 f"never hacked: {often:.2f} for each 10,000.")


def long():
    base, rows, below = load("1-long/frozen"), [], []
    for point, arm, runs in each("1-long/frozen", "frozen") + each("1-long/self", "self"):
        shares = recovered_at(runs, arm, base, 20000)
        for (seed, (summary, log)), share in zip(runs.items(), shares):
            a, gold = summary["arms"][arm], [f"{at(log, arm, s):.3f}" for s in (0, 5000, 10000, 20000)]
            rows.append([point, seed, *gold, f"{at(base[seed][1], 'real', 20000):.3f}", f"{share:.3f}",
                         a["steps_to_hack"] or "none", len(a["alarms"]), leaked({seed: runs[seed]}, arm)])
        falls = [at(log, arm, 15000) - at(log, arm, 20000) for _, log in runs.values()]
        below.append(f"{point}: recovered {pm(shares, 3)} over {len(runs)} seeds; gold falls by "
                     f"{pm(falls, 3)} from step 15,000 to 20,000.")
    below += [f"`{arm}` without any lever: hacked at {hacks(runs, arm)}, {len(runs)} seeds."
              for _, arm, runs in each("1-long/sharpen")]
    return table("critic | seed | gold at start | at 5,000 | at 10,000 | at 20,000 | the same of `real` | "
                 "recovered | hack | alarms | real tokens as targets", rows, *below)


# ---- stage 2

def carried():
    """What the gists carry: cross entropies of later chunks by mask, and the share of full minus none."""
    rows = []
    for name in ["2/base", *points_of("2", "share-").split()]:
        runs = [summary for summary, _ in load(name).values()]
        for config in [run["config"] for run in runs[:1]]:
            nats = (pm([run["later"][how] for run in runs], 3) for how in ("full", "gist", "none"))
            rows.append([f"{config['chunk']}, {config['n_gist']}", config["meta_steps"], len(runs), *nats,
                         pm([run["gist_share"] for run in runs])])
    return table("chunk, gists | meta steps | seeds | full | gists | none | the gists carry", rows)


def distances(names, below=""):
    """A row for each arm: recovered at its end, and agreement then."""
    rows = []
    for point, arm, runs in each(names):
        agreement = [of_arm(log, arm)[-1]["agreement"] for _, log in runs.values()]
        rows.append([point, *cells(runs, arm, end_shares(runs, arm)), "" if arm == "real" else pm(agreement),
                     leaked(runs, arm)])
    head = "what differs | arm | seeds | steps to hack | recovered | agreement | real tokens as targets"
    return table(head, rows, below)


def end_shares(runs, arm):
    """Recovered at the arm's end, beside the real arm of its own runs, else of the base."""
    own = all("real" in summary["arms"] for summary, _ in runs.values())
    return recovered_at(runs, arm, runs if own else load("2/base"), max(told(runs, arm, "self_steps")))


def forgets():
    """What is recovered as the signal tells less apart, and by scores that are not proper."""
    names = [f"2/{point}" for point in STUDIES["2"][1]
             if point not in ("base", "arms", "forecast") and not point.startswith("share-")]
    beside = []
    for point, _, runs in each(" ".join(["2/base", *names]), "frozen"):
        runs = {seed: run for seed, run in runs.items() if "random" in run[0]["arms"]}
        more = [a - b for a, b in zip(end_shares(runs, "frozen"), end_shares(runs, "random"))] if runs else []
        beside += [f"{point} {pm(more)}"] * (len(more) > 2)
    said = "What gists recover more than random numbers, by seed: " + ", ".join(beside) + "."
    return distances(" ".join(names), said if beside else "")


def meaning():
    """Little text, much of it noise, and a critic that has read more: who learns faster, and farther."""
    rows = []
    for name in ("2-meaning/praise", "2-meaning/own", "2-meaning/spellings", "2-meaning/plays"):
        base = load(name.replace("own", "praise"), "real")
        for point, arm, runs in each(name, "forecast frozen random"):
            runs = {seed: run for seed, run in runs.items() if seed in base}
            best, real = told(runs, arm, "gold_best"), told({s: base[s] for s in runs}, "real", "gold_best")
            rows.append([point, f"`{arm}`", len(runs), pm(recovered_at(runs, arm, base, 100)), pm(best, 3),
                         pm(real, 3), pm([r - b for r, b in zip(real, best)], 3)])
    return table("point | arm | seeds | recovered at 100 | best gold | the same of real | better by", rows)


# ---- stage 3

def critics(names, arms=ARMS, below=()):
    """Gains of one step in thousandths of a nat, cosines, and what the open run recovers, a row an arm."""
    rows, shown = [], set()
    for point, arm, runs in each(names, arms):
        means = lambda *keys, by=1, digits=2: ", ".join(
            pm([by * summary[key] for summary, _ in runs.values()], digits) for key in keys)
        head = [point, means("gain", "gain_shuffled", "gain_real", by=1e3, digits=1), means("cosine_real"),
                means("cos_bb", "cos_bb_real")]
        if arm != "real":
            rows.append([*(head if point not in shown else [""] * 4),
                         *cells(runs, arm, told(runs, arm, "recovered"))])
            shown.add(point)
    return table("critic | gain, shuffled, real | cos with real | cos_bb, real's | arm | seeds | "
                 "steps to hack | recovered", rows, *below)


def open_runs(names):
    """What the open run of each arm recovers; on kjv-asv beside oracle."""
    rows = [[point, *cells(runs, arm, told(runs, arm, "recovered"))] for point, arm, runs in each(names)]
    return table("critic | arm | seeds | steps to hack | recovered", rows)


def ranks():
    """Spearman's correlation, over the critics of study 3-ranks, of what each has gained after H of the
    learner's own steps with what it recovers in 500."""
    rows, order = [], lambda values: values.argsort(-1).argsort(-1)
    for name in ("shift", "plays"):
        runs = [load(point) for point in points_of("3-ranks", name).split()]
        if all(runs):
            gold = np.array([[at(rows, "frozen", h) for h in (0, 1, 4, 15, 60, 250, 500)]
                             for found in runs for _, rows in found.values()])
            gains = order(gold[:, 0] - gold[:, 1:].T)
            rows.append([name, len(runs[0]), *(f"{np.corrcoef(g, gains[-1])[0, 1]:.2f}" for g in gains[:-1])])
    return table("corpus | seeds | H = 1 | 4 | 15 | 60 | 250", rows)


def synonym_chunks():
    """What chunks are worth, and by seed what `frozen` gains over the two controls."""
    names, below = "3/synonyms-chunk 3/synonyms-chunk-by-hand", []
    for point, arm, runs in each(names, "frozen_first"):
        first, alone, frozen = (np.array(told(runs, a, "gold_end")) for a in ("first", arm, "frozen"))
        below.append(f"{point}: by seed `frozen` ends {pm(first - frozen, 3)} nats below `first` and "
                     f"{pm(alone - frozen, 3)} below `frozen_first`.")
    return critics(names, below=below)


def synonyms():
    """Where many tokens mean one thing: what second order finds, and who learns faster."""
    rows = []
    for name in f"{points_of('3', 'synonyms')} {points_of('3', 'spellings')}".split():
        for point, arm, runs in each(name, "frozen") if "chunk" not in name else ():
            means = lambda key: [summary[key] for summary, _ in runs.values()]
            goals, best = told(runs, "real", "gold_best"), told(runs, arm, "gold_best")
            gains = [a / b for a, b in zip(means("gain"), means("gain_real"))]
            rows.append([point, len(runs), pm([precision(folder) for folder in folders(name).values()], 3),
                         pm(gains), f"{pm(means('cos_bb'))}, {pm(means('cos_bb_real'))}",
                         pm(told(runs, arm, "recovered"), 3), f"{pm(best, 3)}, {pm(goals, 3)}"])
    return table("critic | seeds | precision | gain / real's | cos_bb, real's | recovered at the end | "
                 "best gold of the signal, of real", rows)


# ---- figures: of each panel the title, and of each point the arms

TAUGHT = "real forecast frozen random"
FIGURES = {
    "stage-1-study.png": {
        "600 steps": {"1/base": "real frozen ema self shuffled sharpen"},
        "20 times the meta phase; self practises": {"1-long/frozen": "real frozen", "1-long/self": "self"}},
    "stage-2-study.png": {
        "the plays": {"2/base": "real frozen random"},
        "little text full of synonyms": {"2-meaning/praise": TAUGHT},
        "little of the plays, in random spellings": {"2-meaning/spellings": TAUGHT}},
    "stage-3-study.png": {
        "the plays": {"3/dense": "real frozen shuffled"},
        "planted synonyms": {"3/synonyms": "real frozen shuffled"}}}
GAINS = dict(gain="frozen", gain_real="real", gain_shuffled="shuffled")  # whose colour each has


def curve(axis, runs, arm, label, colour, quantity="gold_nats", start=0):
    """The mean over seeds and its 95 % interval, less what it is at the start; returns the lowest mean."""
    logs = [[r for r in of_arm(rows, arm) if quantity in r] for _, rows in runs.values()]
    mean, half = interval([[r[quantity] - (log[0][quantity] if start else 0) for r in log] for log in logs])
    steps = [r["step"] for r in logs[0]]
    axis.plot(steps, mean, color=COLOUR[colour], label=label)
    axis.fill_between(steps, mean - half, mean + half, color=COLOUR[colour], alpha=0.2, lw=0)
    return mean.min()


def draw(file, panels):
    """A figure in results/, from all seeds of every point; else none."""
    if not all(complete(name) for points in panels.values() for name in points):
        return
    gains = int(file == "stage-3-study.png")
    figure, axes = pyplot().subplots(1, len(panels) + gains, figsize=(15, 4))
    for axis, (title, points) in zip(axes[gains:], panels.items()):
        lowest = min(curve(axis, load(name), arm, arm, arm, start=1)
                     for name, arms in points.items() for arm in arms.split())
        if axis.get_ylim()[1] > -1.6 * lowest > 0:  # hacked arms may leave the picture through its top
            axis.set_ylim(1.2 * lowest, -1.6 * lowest)
        axis.set(title=title, xlabel="self steps")
    axes[gains].set_ylabel("gold less that at the start, nats")
    for quantity, colour in GAINS.items() if gains else ():
        curve(axes[0], load("3/dense"), "meta", quantity, colour, quantity)
        axes[0].set(title="the plays: what one inner step gains, nats", xlabel="steps of the meta phase")
    for axis in axes:
        axis.grid(alpha=0.2)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / file, dpi=120)
    print(f"drawn: {file}")


# ---- pages

PAGES = {
    "stage-1.md": dict(levers=levers, law=law, order=order, judged=judged, watch=watch, long=long),
    "stage-2.md": dict(carried=carried, gist_arms=lambda: distances("2/base 2/arms 2/forecast"),
                       forgets=forgets, meaning=meaning),
    "stage-3.md": dict(
        own_steps=lambda: open_runs("3/chunks 3-chunks/bytes-4-own-15 3/dense-own"),
        second_order=lambda: critics("3/dense 3/untrained 3/by-hand"),
        synonyms=synonyms,
        chunks=lambda: critics("3/chunk-4 3/chunk-4-by-hand 3/chunk-4-sharp "
                               "3-forms/chunk-8"),
        synonym_chunks=synonym_chunks,
        shift=lambda: critics(points_of("3-shift", "")),
        words=lambda: open_runs(points_of("3-words", "")),
        plays_chunks=lambda: open_runs(points_of("3-chunks", "")),
        ranks=ranks,
        facts=lambda: open_runs(points_of("3-facts", "")),
        long=lambda: open_runs(points_of("3-long", "")),
        judges=lambda: critics("3/dense 3/steps-2 3/steps-4", "frozen"))}


def size(text):
    """(rows, seeds or hacks in all) of a table."""
    head, *rows = [line.split("|")[1:-1] for line in text.splitlines() if line[:1] == "|"] or [[]]
    counts = [i for i, cell in enumerate(head) if cell.strip() in ("seeds", "hacks")]
    return len(rows), sum(int(row[i]) for row in rows[1:] for i in counts)


def put(page, name, content):
    """The page with a table between its marks, unless it has one of more, and what was done."""
    found = re.search(rf"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", page, flags=re.S)
    if not found:
        return page, "printed alone, for the page has no marks for it"
    if any(new < old for new, old in zip(size(content), size(found[0]))):
        return page, "left as it is, for the page has rows or seeds that are not here"
    return page[:found.start()] + content + "\n" + page[found.end():], "written"


def main():
    if {"-h", "--help"} & set(sys.argv[1:]):
        return print(__doc__.strip())
    if sys.argv[1:]:
        refuse(f"{sys.argv[1]!r} is not asked for: all studies are reported together (see --help)")
    if not any(folders(f"{study}/{point}") for study in STUDIES for point in STUDIES[study][1]):
        refuse(f"{OUT} holds no finished run of a study; begin with python studies/study.py 1")
    for file, tables in PAGES.items():
        page = (RESULTS / file).read_text(encoding="utf-8")
        for name, make in tables.items():
            if content := make():
                page, done = put(page, name, content)
                print(f"{content}\n\n{file}, {name}: {done}\n")
        (RESULTS / file).write_text(page, encoding="utf-8")
    for file, panels in FIGURES.items():
        draw(file, panels)


if __name__ == "__main__":
    main()
