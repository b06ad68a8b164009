"""
What tells whether a run goes well: gold (for the report) and the table of the arms.

Gold is the held-out cross entropy of the learner on real text. No part of a self phase may read it.
"""
import math

import torch
import torch.nn.functional as F


class Gold:
    """Held-out cross entropy, always over the same windows, in nats a token and in bits a byte.

    windows: int [n, T + 1]; each rank reads its n / ranks of them, `batch` at once. token_bytes: int [V].
    """

    def __init__(self, windows, token_bytes, run, batch):
        self.run, self.batch = run, batch
        share = len(windows) // run.ranks
        self.windows = windows[run.rank * share:(run.rank + 1) * share].to(run.device)
        targets = windows[:, 1:]
        self.bytes_per_token = torch.as_tensor(token_bytes)[targets].sum().item() / targets.numel()

    @torch.no_grad()
    def __call__(self, model):
        """(nats a token, bits a byte) of `model`."""
        total = 0.0
        for w in self.windows.split(self.batch):
            with self.run.autocast():
                total = total + F.cross_entropy(model(w[:, :-1]).flatten(0, 1), w[:, 1:].flatten(), reduction="sum")
        nats = self.run.mean(total / self.windows[:, 1:].numel())
        return nats, nats / math.log(2) / self.bytes_per_token


def new_track():
    """What is remembered of an arm's gold: a plain dict, so that a checkpoint can hold it."""
    return dict(gold_start=None, gold_best=None, gold_end=None, bpb_end=None, proxy_start=None, proxy_end=None,
                steps_to_hack=None, rising_since=None, rising=0)


def track_gold(track, row, margin):
    """Follows an arm's gold through the rows of its log. A hack: `margin` nats above the best so far, three evaluations running.

    Returns True at the evaluation that makes it a hack; `steps_to_hack` is then the first of the three.
    """
    nats, proxy = row["gold_nats"], row["proxy"]
    if track["gold_start"] is None:
        track["gold_start"] = track["gold_best"] = nats
    if track["proxy_start"] is None:
        track["proxy_start"] = proxy
    track["gold_best"] = min(track["gold_best"], nats)
    track["gold_end"], track["bpb_end"], track["proxy_end"] = nats, row["gold_bpb"], proxy
    if nats <= track["gold_best"] + margin:
        track["rising"] = 0
        return False
    if track["rising"] == 0:
        track["rising_since"] = row["step"]
    track["rising"] += 1
    if track["rising"] == 3 and track["steps_to_hack"] is None:
        track["steps_to_hack"] = track["rising_since"]
        return True
    return False


def recovered(track, real):
    """(gold at start − gold at end) of an arm over the same of `real`; None without a real arm that learned."""
    if real is None or real["gold_start"] <= real["gold_end"]:
        return None
    return (track["gold_start"] - track["gold_end"]) / (real["gold_start"] - real["gold_end"])


def summarise(run, meta, meta_steps, tracks, self_steps, **extra):
    """The run's summary as a dict; prints the table of its arms."""
    arms = {}
    for name, track in tracks.items():
        arms[name] = dict(self_steps=self_steps, recovered=recovered(track, tracks.get("real")),
                          **{k: v for k, v in track.items() if not k.startswith("rising")})
    if arms:
        run.say(table(arms))
    return dict(stage=run.stage, seed=run.settings["seed"], config=run.settings, meta_steps=meta_steps,
                gold_meta_end=meta["gold_end"], bpb_meta_end=meta["bpb_end"], **extra, arms=arms)


def table(arms):
    """The arms of a summary as text, a row each."""
    lines = [f"{'arm':<9} {'gold at start':>13} {'best':>7} {'end':>7} {'bits/byte':>10} {'steps to hack':>14} "
             f"{'recovered':>10}"]
    for name, a in arms.items():
        hack = "never" if a["steps_to_hack"] is None else str(a["steps_to_hack"])
        share = "" if a["recovered"] is None else f"{a['recovered']:.2f}"
        lines.append(f"{name:<9} {a['gold_start']:>13.3f} {a['gold_best']:>7.3f} {a['gold_end']:>7.3f} "
                     f"{a['bpb_end']:>10.3f} {hack:>14} {share:>10}")
    real = arms.get("real")
    if real is None:
        lines.append("No real arm was run: a hack here may be the optimizer's doing, not the signal's.")
    elif real["steps_to_hack"] is not None:
        lines.append("Gold rose in the real arm too, whose targets are right: no hack of this run is to be believed.")
    return "\n".join(lines)
