"""
What tells whether a run goes well: gold, the row of the log, and the watch that must do without gold.

Gold is the held-out cross entropy of the learner on real text. It is for the report; no part of a self phase
may read it. The watch reads what a deployed model has: its own output, the critic's signal, the observations.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

HACK_MARGIN = 0.1  # nats above the best gold, three evaluations running, that count as hacked


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
    def __call__(self, read):
        """(nats a token, bits a byte) of `read`, a function from text [B, T] to logits [B, T, V]."""
        total = 0.0
        for text in self.windows.split(self.batch):
            with self.run.autocast():
                logits = read(text[:, :-1])
                total = total + F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten(), reduction="sum")
        nats = self.run.mean(total / self.windows[:, 1:].numel())
        return nats, nats / math.log(2) / self.bytes_per_token


def new_track():
    """What is remembered of an arm's gold: a plain dict, so that a checkpoint can hold it."""
    return dict(gold_start=None, gold_best=None, gold_end=None, bpb_end=None, proxy_start=None,
                proxy_end=None, steps_to_hack=None, alarms=[], rescues=[], reports=[], rising_since=None,
                rising=0, self_steps=None)


def track_gold(track, row):
    """Follows an arm's gold through the rows of its log. A hack: three rows HACK_MARGIN above its best.

    Returns True at the evaluation that makes it a hack; `steps_to_hack` is then the first of the three.
    """
    nats = row["gold_nats"]
    if track["gold_start"] is None:
        track["gold_start"] = track["gold_best"] = nats
    if track["proxy_start"] is None:
        track["proxy_start"] = row["proxy"]
    track["gold_best"] = min(track["gold_best"], nats)
    track["gold_end"], track["bpb_end"], track["proxy_end"] = nats, row["gold_bpb"], row["proxy"]
    if nats <= track["gold_best"] + HACK_MARGIN:
        track["rising"] = 0
        return False
    if track["rising"] == 0:
        track["rising_since"] = row["step"]
    track["rising"] += 1
    if track["rising"] < 3 or track["steps_to_hack"] is not None:
        return False
    track["steps_to_hack"] = track["rising_since"]
    return True


def recovered(track, real):
    """(gold at start − gold at end) of an arm over the same of `real`; None if real has learned nothing."""
    if real is None or real["gold_start"] <= real["gold_end"]:
        return None
    return (track["gold_start"] - track["gold_end"]) / (real["gold_start"] - real["gold_end"])


def summarise(tracks):
    """{arm: what the summary keeps of it}, of the arms' tracks. The ceiling is oracle, or else real."""
    ceiling = tracks.get("oracle", tracks.get("real"))
    return {name: dict(recovered=recovered(track, ceiling),
                       **{k: v for k, v in track.items() if not k.startswith("rising")})
            for name, track in tracks.items()}


def arms_table(arms):
    """The arms of a summary as text, a row each."""
    row = "{:<12} {:>10} {:>7} {:>7} {:>9} {:>9} {:>6} {:>7} {:>9}".format
    head = "arm", "gold start", "best", "end", "bits/byte", "hacked at", "alarm", "rescues", "recovered"
    lines = [row(*head)]
    for name, a in arms.items():
        gold = [f"{a[k]:.3f}" for k in ("gold_start", "gold_best", "gold_end", "bpb_end")]
        hack = "never" if a["steps_to_hack"] is None else a["steps_to_hack"]
        share = "" if a["recovered"] is None else f"{a['recovered']:.2f}"
        lines.append(row(name, *gold, hack, (a["alarms"] or ["none"])[0], len(a["rescues"]), share))
    if "real" not in arms:
        lines.append("No real arm was run: a hack here may be the optimizer's doing, not the signal's.")
    elif arms["real"]["steps_to_hack"] is not None:
        lines.append("Gold rose in the real arm too, whose targets are right: believe no hack here.")
    return "\n".join(lines)


# ---- the row of the log

ROW = ("grad_norm", "surprise", "agreement", "echo", "target_top", "target_entropy", "output_entropy")


@torch.no_grad()
def note(tally, loss, logp, obs, told=None, **means):
    """Adds a step, or a piece of one, to what the next row of the log will average, without waiting for the
    device.

    logp: the learner's log probabilities [B, T, V]. obs: what was observed there, int [B, T], or the first of
    them. told: the tokens that the critic names, int [B, T] or [B, R, T]: agreement is the share of them that
    are observed, echo that of those that are the learner's likeliest. means: scalars, to be averaged as well.
    """
    if told is not None:
        told = told.view(len(obs), -1, obs.size(1))
        means.update(agreement=(told == obs[:, None]).float().mean(),
                     echo=(told == logp.argmax(-1)[:, None]).float().mean())
        counts = torch.zeros(logp.size(-1), device=told.device)  # not bincount, which waits for the device
        means["targets"] = counts.index_add_(0, told.flatten(), counts.new_ones(told.numel()))
    surprise = -logp[:, :obs.size(1)].gather(-1, obs.unsqueeze(-1)).mean()
    entropy = -(logp.exp() * logp).sum(-1).mean()
    means.update(steps=torch.ones_like(loss), loss=loss.detach(), surprise=surprise, output_entropy=entropy)
    for name, value in means.items():  # in bfloat16 a sum of ones would stop at 256
        tally[name] = tally.get(name, 0) + (value if value.dtype == torch.float64 else value.float())
    stream = torch.stack((surprise, means["agreement"], entropy)).float()[None]
    tally["stream"] = torch.cat((tally["stream"], stream)) if "stream" in tally else stream


def streams(tally, pieces):
    """The streams of the steps in a tally, float [steps, 3]; each step was noted in so many pieces."""
    return tally["stream"].view(-1, pieces, 3).mean(1)


def make_row(run, arm, step, tally, gold, lr, more):
    """(row of the log, streams of the steps since the last one, float [steps, 3] or None). Empties the tally.

    The row holds the means of the tally, gold as (nats a token, bits a byte), and `more`. A mean replaces
    what `more` has by its name: None there is what rows without a step hold.
    """
    run.average(list(tally.values()))
    pieces = run.settings["grad_accum"]
    stream = streams(tally, pieces) if tally else None
    n = tally.pop("steps").item() if tally else 0
    tally.pop("stream", None)
    counts = tally.pop("targets", None)
    mean = {k: (v / n).item() for k, v in tally.items()}
    tally.clear()
    if counts is not None:
        share = counts / counts.sum()
        mean.update(target_top=share.max().item(), target_entropy=torch.special.entr(share).sum().item())
    tokens = run.settings["batch_size"] * run.settings["block_size"]
    total = step + (run.settings["meta_steps"] if arm != "meta" else 0)
    row = dict(stage=run.stage, arm=arm, step=step, tokens=total * tokens, proxy=mean.pop("loss", None),
               gold_nats=gold[0], gold_bpb=gold[1], lr=lr, **{**dict.fromkeys(ROW), **more, **mean},
               **run.progress.speed(n / pieces, tokens))
    return row, stream


# ---- the watch

STREAMS = dict(surprise=1, agreement=-1, entropy=-1, probe=-1)  # what is watched, and which way is bad
FALSE_ALARMS = 0.05  # chance of one or more in 10,000 healthy steps, over all streams together
SLACK = 0.5          # spreads that a stream may be off its reference for ever, beside what learning moves it
MEMORY = 100         # steps that the reference looks back; an alarm within as many after another is the same
BLOCK = 10           # steps that are resampled together, to keep what correlation they have


class Watch:
    """Change-point tests, gold-free, on four streams:

    surprise    cross entropy of the learner on the observation before it learns from it, nats a token
    agreement   share of the critic's targets that equal the observation
    entropy     mean entropy of the learner's output (diversity), nats
    probe       share of a stored set of pairs for which the critic still names the truth

    Each is a one-sided CUSUM (Page 1954) of its distance from a slow reference, in spreads:

        S_t = max(0, S_{t−1} + (x_t − r_t)/s_t − k)      r_{t+1} = r_t + (x_t − r_t)/MEMORY

    and alarms when S_t > h. All is calibrated on the end of the meta phase. s is the spread of x − r there,
    or more where x − r has spread since (over 10 MEMORY steps; the text that a better model knows varies
    more). The slack k is SLACK, and the lag of r behind x where learning itself moves x the bad way (entropy
    falls while a model learns). h is the quantile of the largest S_t of 10,000 steps at which the chance of a
    false alarm is FALSE_ALARMS, over steps resampled from there or over normal ones, whichever is larger: the
    one has too short a tail, the other no skew. The probe, which is no average over fresh text, has the noise
    of its few tokens.
    """

    def __init__(self):
        off = dict(reference=None, spread=1.0, floor=1.0, slack=SLACK, threshold=math.inf, sum=0.0, since=0)
        self.state = {name: dict(off) for name in STREAMS}

    def state_dict(self):
        return {name: dict(s) for name, s in self.state.items()}

    def load_state_dict(self, state):
        self.state = {name: dict(s) for name, s in state.items()}

    def calibrate(self, values, tokens, probe, probe_tokens, seed=0):
        """values: float [steps, 3] of a meta phase: surprise, agreement, entropy; tokens: each is a mean of
        so many. probe: its last value, over probe_tokens tokens. With under 100 steps the watch stays off.
        """
        values = np.asarray(values, dtype=float)
        if len(values) < 100:
            return
        recent = values[-max(100, len(values) // 5):]
        rng = np.random.default_rng(seed)
        for i, name in enumerate(list(STREAMS)[:3]):
            off = innovations(recent[:, i])
            # An agreement that never failed in the sample still has a spread: that of one token failing.
            spread = max(off.std(), 1 / tokens if name == "agreement" else 1e-6)
            slope = np.polyfit(np.arange(len(recent)), recent[:, i], 1)[0]
            lag = max(0.0, STREAMS[name] * slope * MEMORY / spread)  # how far r stays behind such a slope
            start, sample = recent[-MEMORY // 2:, i].mean(), STREAMS[name] * off / spread
            self._set(name, start, spread, sample, rng, SLACK + lag)
        spread = math.sqrt(max(probe * (1 - probe), 1 / probe_tokens) / probe_tokens)
        self._set("probe", probe, spread, rng.standard_normal(1000), rng, SLACK)

    def _set(self, name, reference, spread, sample, rng, slack):
        h = max(threshold(sample - sample.mean(), rng),
                threshold(rng.standard_normal(100 * len(sample)), rng, len(sample)))
        self.state[name] = dict(reference=float(reference), spread=float(spread), floor=float(spread),
                                slack=float(slack), threshold=h, sum=0.0, since=0)

    def update(self, step, values, probe, names=tuple(STREAMS)):
        """Reads the steps since the last call, float [steps, 3], and the probe; returns what alarms."""
        fired = []
        for i, (name, s) in enumerate(self.state.items()):
            if name not in names or s["reference"] is None:
                continue
            stream = values[:, i].tolist() if name != "probe" else [probe]
            for j, x in enumerate(stream):
                off = (x - s["reference"]) / s["spread"]
                s["sum"] = max(0.0, s["sum"] + STREAMS[name] * off - s["slack"])
                if s["sum"] == 0:
                    s["since"] = step - len(stream) + 1 + j
                s["reference"] += off * s["spread"] / MEMORY
                grown = 1 + (min(off * off, 9) - 1) / (10 * MEMORY)  # at most 9: a change may not hide itself
                s["spread"] = max(s["floor"], s["spread"] * math.sqrt(grown))
                if s["sum"] > s["threshold"]:
                    fired.append(name)
                    break
        return fired

    def settled(self):
        """Whether no stream is on its way to an alarm: then the weights are worth going back to."""
        return all(s["sum"] < s["threshold"] / 4 for s in self.state.values())

    def restart(self, step, values=None, probe=None):
        """After an alarm: the sums begin anew, at the level that the streams have now if it is given."""
        for i, (name, s) in enumerate(self.state.items()):
            s["sum"], s["since"] = 0.0, step
            if values is not None and s["reference"] is not None:
                s["reference"] = float(values[:, i].mean()) if name != "probe" else probe

    def order(self):
        """(step, stream) of those above a quarter of their threshold, by when each left its reference."""
        return sorted((s["since"], name) for name, s in self.state.items() if s["sum"] > s["threshold"] / 4)


def innovations(x):
    """Distances of a series from its own slow reference, begun at the mean of its first tenth."""
    r, off = x[:max(1, len(x) // 10)].mean(), []
    for value in x:
        off.append(value - r)
        r += (value - r) / MEMORY
    return np.array(off)


def threshold(sample, rng, known=None, steps=10_000, chains=500):
    """h such that a healthy CUSUM of `steps` steps passes it with the stated chance.

    Each chain lives through the whole procedure: it takes its own spread and first reference from as few
    values as are `known` (all if None), and then its steps, all resampled in blocks from `sample`.
    """
    def draw(n):
        start = rng.integers(0, len(sample) - BLOCK + 1, (n // BLOCK, 1, chains))
        return sample[start + np.arange(BLOCK)[None, :, None]].reshape(-1, chains)

    calibration = draw((known or len(sample)) // BLOCK * BLOCK)
    spread, reference = np.maximum(calibration.std(0), 1e-9), calibration[-MEMORY // 2:].mean(0)
    sums, top = np.zeros(chains), np.zeros(chains)
    for x in draw(steps):
        sums = np.maximum(0, sums + (x - reference) / spread - SLACK)
        reference += (x - reference) / MEMORY
        top = np.maximum(top, sums)
    return float(np.quantile(top, 1 - FALSE_ALARMS / len(STREAMS)))
