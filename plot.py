"""
Proxy and gold of every arm against steps, with hacks marked, and the table of the arms.

    python plot.py out/self_ce                     # one run
    python plot.py out/study/*                     # many: runs that differ by seed alone become mean and interval

Writes curves.png beside the run (beside the first one, if there are several) and prints where. A run that ends draws
its own.
"""
import json
import sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from configurator import FREE_ON_RESUME, refuse

COLOUR = dict(meta="0.6", real="k", first="0.4", frozen="tab:green", frozen_first="tab:olive", ema="tab:blue", self="tab:red",
              shuffled="tab:purple", sharpen="tab:orange", forecast="tab:pink", static="tab:cyan", random="tab:brown")
# 97.5 % points of Student's t for n - 1 degrees of freedom, n = 2 to 10; beyond, 1.96 + 2.5 / (n - 1) is within 1 %.
STUDENT = dict(zip(range(2, 11), (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)))
NOT_COMPARED = ("seed", "out_dir", "start", "critic_from", *FREE_ON_RESUME)


def interval(values, axis=0):
    """(mean, half width of the 95 % interval of the mean) over `axis`; the width is 0 for a single value."""
    values = np.asarray(values, dtype=float)
    n = values.shape[axis]
    if n < 2:
        return values.mean(axis), np.zeros_like(values.mean(axis))
    return values.mean(axis), STUDENT.get(n, 1.96 + 2.5 / (n - 1)) * values.std(axis, ddof=1) / n ** 0.5


def read_run(folder):
    """(summary, rows of the log) of a finished run; refuses a folder that is none."""
    folder = Path(folder)
    try:
        summary = json.loads((folder / "summary.json").read_text())
        rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        refuse(f"{folder} is no finished run ({error.__class__.__name__}: it needs summary.json and log.jsonl)")
    return summary, rows


def group_by_settings(runs):
    """Lists of runs that differ by seed alone, each with the settings that tell it from the others."""
    keys = [{k: v for k, v in s["config"].items() if k not in NOT_COMPARED} for s, _ in runs]
    differing = sorted({k for a in keys for k in a if any(a[k] != b.get(k, a[k]) for b in keys)})
    groups = {}
    for key, run in zip(keys, runs):
        groups.setdefault(", ".join(f"{k}={key[k]}" for k in differing if k in key), []).append(run)
    return groups


def curve(group, arm, name):
    """(steps, values [runs, steps]) of a quantity of an arm; rows without a value are left out."""
    per_run = [{r["step"]: r[name] for r in rows if r["arm"] == arm and r[name] is not None} for _, rows in group]
    steps = sorted(set.intersection(*(set(p) for p in per_run)))
    return np.array(steps), np.array([[p[s] for s in steps] for p in per_run])


def draw(axis, group, name):
    meta_steps = group[0][0]["meta_steps"]
    arms = ["meta"] + list(group[0][0]["arms"])
    for arm in arms:
        steps, values = curve(group, arm, name)
        if not len(steps):
            continue
        steps = steps - meta_steps if arm == "meta" else steps
        mean, half = interval(values)
        axis.plot(steps, mean, color=COLOUR[arm], lw=1.4, label=arm)
        axis.fill_between(steps, mean - half, mean + half, color=COLOUR[arm], alpha=0.2, lw=0)
        for summary, _ in group:
            mark(axis, summary["arms"].get(arm, {}), dict(zip(steps.tolist(), mean)), COLOUR[arm])
    axis.axvline(0, color="0.8", lw=0.8, zorder=0)
    axis.set_xlabel("steps (meta phase before 0)")
    axis.grid(alpha=0.2)


def mark(axis, arm, curve, colour):
    """Marks an arm's hack (x), its first alarm (triangle) and its rescues (bars) on its curve, a dict step: value."""
    for steps, symbol, size in (([arm.get("steps_to_hack")], "x", 8), (arm.get("alarms", [])[:1], "^", 6),
                                (arm.get("rescues", []), "|", 9)):
        for step in steps:
            if step in curve:
                axis.plot(step, curve[step], symbol, color=colour, ms=size, mew=2)


def limit(axis, group):
    """Shows what an arm can gain: hacked arms may leave the picture through its top."""
    start = np.mean([s["gold_meta_end"] for s, _ in group])
    best = min(a["gold_best"] for s, _ in group for a in s["arms"].values()) if group[0][0]["arms"] else start
    room = max(0.2, start - best)
    axis.set_ylim(start - 1.3 * room, start + 2.5 * room)


def table(groups):
    """Markdown: a row for each arm of each group, means with 95 % intervals over seeds."""
    lines = ["| settings | arm | seeds | gold start | best | end | bits/byte end | steps to hack | recovered |",
             "|---|---|---|---|---|---|---|---|---|"]
    show = lambda values, digits=3: "{:.{d}f} ± {:.{d}f}".format(*interval(values), d=digits) if len(values) > 1 \
        else f"{values[0]:.{digits}f}"
    for key, group in groups.items():
        for arm in group[0][0]["arms"]:
            a = [s["arms"][arm] for s, _ in group if arm in s["arms"]]
            hacks = ["never" if r["steps_to_hack"] is None else str(r["steps_to_hack"]) for r in a]
            back = [r["recovered"] for r in a if r["recovered"] is not None]
            cells = [show([r[k] for r in a]) for k in ("gold_start", "gold_best", "gold_end", "bpb_end")]
            cells += [", ".join(hacks) if len(set(hacks)) > 1 else hacks[0], show(back, 2) if back else ""]
            lines.append(f"| {key} | {arm} | {len(a)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_runs(folders):
    """Draws the finished runs in `folders`: (path of the picture, table as markdown)."""
    groups = group_by_settings([read_run(f) for f in folders])
    figure, axes = plt.subplots(len(groups), 2, figsize=(11, 4 * len(groups)), squeeze=False)
    for (key, group), (left, right) in zip(groups.items(), axes):
        draw(left, group, "gold_nats")
        limit(left, group)
        left.set_ylabel("gold: held-out nats a token")
        draw(right, group, "proxy")
        right.set_ylabel("proxy: the self-produced loss")
        left.set_title(key or group[0][0]["stage"], fontsize=9)
        right.set_title("x hack   ▲ first alarm   | rescue", fontsize=9)
        left.legend(fontsize=8, ncol=2)
    figure.tight_layout()
    path = Path(folders[0]) / "curves.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path, table(groups)


def main():
    folders = sys.argv[1:]
    if not folders or folders[0] in ("-h", "--help"):
        print(__doc__.strip())
        raise SystemExit(0 if folders else 2)
    path, text = draw_runs(folders)
    print(f"{text}\ndrawn in {path}")


if __name__ == "__main__":
    main()
