"""
Proxy and gold of every arm against steps, with hacks marked, and the table of the arms.

    python plot.py out/self_ce                     # one run
    python plot.py out/study/*                     # many: those that differ by seed alone are averaged

Writes curves.png into the run's folder, or that of several runs into the nearest folder that holds them all,
and prints where. A run that ends draws its own.
"""
import json
import os
import sys
from pathlib import Path

import numpy as np

from configurator import FREE_ON_RESUME, refuse
from sources import DAMAGE, brief

COLOUR = dict(meta="0.6", real="k", first="0.4", frozen="tab:green", frozen_first="tab:olive",
              ema="tab:blue", self="tab:red", shuffled="tab:purple", sharpen="tab:orange",
              forecast="tab:pink", random="tab:brown")
# 97.5 % points of Student's t for n - 1 degrees of freedom, n = 2 to 10; beyond, 1.96 + 2.5 / (n - 1) is
# within 1 %.
STUDENT = dict(zip(range(2, 11), (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)))
NOT_COMPARED = ("seed", "out_dir", "start", *FREE_ON_RESUME)
# The panels of a hack report: what of its rows is drawn together.
PANELS = (("gold_nats", "surprise", "proxy"), ("agreement", "agreement_probe", "echo"),
          ("output_entropy", "target_entropy"))


# ----------------------------------------------------------------------------------------------
# runs

def read_rows(folder, name="log.jsonl"):
    """The rows of a growing file in `folder`; one that a kill cut short, the last, is left out."""
    lines = (Path(folder) / name).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def interval(values, axis=0):
    """(mean, half width of the 95 % interval of the mean) over `axis`; the width is 0 for a single value."""
    values = np.asarray(values, dtype=float)
    n = values.shape[axis]
    if n < 2:
        return values.mean(axis), np.zeros_like(values.mean(axis))
    return values.mean(axis), STUDENT.get(n, 1.96 + 2.5 / (n - 1)) * values.std(axis, ddof=1) / n ** 0.5


def read_run(folder):
    """(summary, rows of the log) of a finished run; refuses a folder that is none."""
    try:
        summary = json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))
        return summary, read_rows(folder)
    except (OSError, ValueError) as error:
        refuse(f"{folder} is no finished run ({type(error).__name__}: it needs summary.json and log.jsonl)")


def group_by_settings(runs):
    """Lists of runs that differ by seed alone, by the settings that tell each from the others, as text."""
    keys = [{k: v for k, v in s["config"].items() if k not in NOT_COMPARED} for s, _ in runs]
    for key in keys:  # whether another run's critic taught, not which seed's
        key.update(critic_from=bool(key.get("critic_from")))
    differing = sorted({k for a in keys for k in a if any(a[k] != b.get(k, a[k]) for b in keys)})
    groups = {}
    for key, run in zip(keys, runs):
        groups.setdefault(", ".join(f"{k}={key[k]}" for k in differing if k in key), []).append(run)
    return groups


def arms_of(runs):
    """The arms of runs, which need not have the same ones."""
    return list(dict.fromkeys(arm for summary, _ in runs for arm in summary["arms"]))


def curve(group, arm, name):
    """(steps, values [runs, steps]) of a quantity of an arm, where all runs that have it have a value."""
    per_run = []
    for _, rows in group:
        values = {r["step"]: r[name] for r in rows if r["arm"] == arm and r[name] is not None}
        per_run += [values] if values else []
    steps = sorted(set(per_run[0]).intersection(*per_run)) if per_run else []
    return np.array(steps), np.array([[values[s] for s in steps] for values in per_run])


def table(groups):
    """Markdown: a row for each arm of each group, means with 95 % intervals over seeds."""
    head = ("settings", "arm", "seeds", "gold start", "best", "end", "bits/byte end", "steps to hack",
            "recovered")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for key, group in groups.items():
        for arm in arms_of(group):
            a = [s["arms"][arm] for s, _ in group if arm in s["arms"]]
            hacks = ["never" if r["steps_to_hack"] is None else str(r["steps_to_hack"]) for r in a]
            back = [r["recovered"] for r in a if r["recovered"] is not None]
            cells = [show([r[k] for r in a]) for k in ("gold_start", "gold_best", "gold_end", "bpb_end")]
            cells += [", ".join(hacks) if len(set(hacks)) > 1 else hacks[0], show(back, 2) if back else ""]
            lines.append(f"| {key} | {arm} | {len(a)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def show(values, digits=3):
    """The mean of some values as text, with its interval if they are several."""
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


# ----------------------------------------------------------------------------------------------
# pictures

def pyplot():
    """matplotlib.pyplot, which draws into files alone; imported here, for it takes a second."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def colours(arms):
    """{arm: colour} of the meta phase and of arms: of COLOUR, else the next of matplotlib's that is free."""
    from matplotlib import rcParams
    from matplotlib.colors import to_hex
    known = {arm: COLOUR[arm] for arm in ("meta", *arms) if arm in COLOUR}
    taken = {to_hex(colour) for colour in known.values()}
    cycle = rcParams["axes.prop_cycle"].by_key()["color"]
    free = [colour for colour in cycle if to_hex(colour) not in taken] or cycle
    new = [arm for arm in arms if arm not in COLOUR]
    return {**known, **{arm: free[i % len(free)] for i, arm in enumerate(new)}}


def draw(axis, group, name, colour):
    """The curves of a quantity of a group's arms; colour: {arm: colour}."""
    meta_steps = group[0][0]["meta_steps"]
    for arm in ["meta", *arms_of(group)]:
        steps, values = curve(group, arm, name)
        if not len(steps):
            continue
        steps = steps - meta_steps if arm == "meta" else steps
        mean, half = interval(values)
        axis.plot(steps, mean, color=colour[arm], lw=1.4, label=arm)
        axis.fill_between(steps, mean - half, mean + half, color=colour[arm], alpha=0.2, lw=0)
        for summary, _ in group:
            mark(axis, summary["arms"].get(arm, {}), dict(zip(steps.tolist(), mean)), colour[arm])
    axis.axvline(0, color="0.8", lw=0.8, zorder=0)
    axis.set_xlabel("steps (meta phase before 0)")
    axis.grid(alpha=0.2)


def mark(axis, arm, curve, colour):
    """Marks hack (x), first alarm (triangle) and rescues (bars) of an arm on its curve, {step: value}."""
    for steps, symbol, size in (([arm.get("steps_to_hack")], "x", 8), (arm.get("alarms", [])[:1], "^", 6),
                                (arm.get("rescues", []), "|", 9)):
        for step in steps:
            if step in curve:
                axis.plot(step, curve[step], symbol, color=colour, ms=size, mew=2)


def limit(axis, group):
    """Shows what an arm can gain: hacked arms may leave the picture through its top."""
    start = np.mean([s["gold_meta_end"] for s, _ in group])
    best = min((a["gold_best"] for s, _ in group for a in s["arms"].values()), default=start)
    room = max(0.2, start - best)
    axis.set_ylim(start - 1.3 * room, start + 2.5 * room)


def draw_runs(folders):
    """Draws the finished runs in `folders`: (path of the picture, table as markdown)."""
    runs = [read_run(folder) for folder in folders]
    groups, plt = group_by_settings(runs), pyplot()
    colour = colours(arms_of(runs))
    figure, axes = plt.subplots(len(groups), 2, figsize=(11, 4 * len(groups)), squeeze=False)
    for (key, group), (left, right) in zip(groups.items(), axes):
        draw(left, group, "gold_nats", colour)
        limit(left, group)
        left.set_ylabel("gold: held-out nats a token")
        draw(right, group, "proxy", colour)
        right.set_ylabel("proxy: the self-produced loss")
        title = (key or group[0][0]["stage"]).encode("utf-8", "replace").decode("utf-8")
        left.set_title(title, fontsize=9, parse_math=False)  # a name of a file may hold anything
        right.set_title("x hack   ▲ first alarm   | rescue", fontsize=9)
        left.legend(fontsize=8, ncol=2)
    figure.tight_layout()
    # Parents, so that no run's own picture is written over, not even where one folder lies within another.
    parents = [os.path.dirname(os.path.abspath(folder)) for folder in folders]
    path = Path(folders[0] if len(folders) == 1 else os.path.commonpath(parents)) / "curves.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path, table(groups)


def draw_report(folder, row, path):
    """The picture of a hack report, into `path`: the log of the row's arm so far, after as much of the meta
    phase (left of 0), and a line at the row's step.

    Dots are drawn too, for a report may come after one row. A panel of which no row has a value is left out.
    """
    rows = read_rows(folder)
    own = [r for r in rows if r["arm"] == row["arm"] and r["step"] <= row["step"]]
    meta = [r for r in rows if r["arm"] == "meta"][-max(5, len(own)):]
    placed = [(r["step"] - meta[-1]["step"], r) for r in meta] + [(r["step"], r) for r in own]
    curves = {name: [(step, r[name]) for step, r in placed if r.get(name) is not None]
              for panel in PANELS for name in panel}
    panels = [[name for name in panel if curves[name]] for panel in PANELS]
    panels = [panel for panel in panels if panel]
    plt = pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(3.7 * len(panels), 2.8), squeeze=False)
    for axis, panel in zip(axes[0], panels):
        for name in panel:
            axis.plot(*zip(*curves[name]), ".-", label=name)
        axis.axvline(0, color="0.7", lw=0.8, ls=":")
        axis.axvline(row["step"], color="0.7", lw=0.8)
        axis.legend(fontsize=7)
        axis.set_xlabel("step (meta phase before 0)")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    sys.stdout.reconfigure(errors="replace")  # an encoding without ± gets a question mark
    folders = sys.argv[1:]
    if not folders or {"-h", "--help"} & set(folders):
        print(__doc__.strip())
        raise SystemExit(0 if folders else 2)
    try:
        path, text = draw_runs(folders)
    except OSError as error:
        refuse(f"{error.filename or 'curves.png'} could not be written ({error.strerror})")
    except DAMAGE as error:
        refuse(f"{', '.join(folders)}: a file of the run holds what no run writes ({brief(error)})")
    print(f"{text}\ndrawn in {path}")


if __name__ == "__main__":
    main()
