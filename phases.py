"""
The loop that the three experiments share, written once. It knows nothing of losses:

    for step in phases.meta(meta_steps):     # checkpoints, evaluates, watches, reports; then yields
        ...                                  # the step, all of it, stands in the script
    phases.take_snapshot()                   # once: if phases.snapshot is None
    for arm in phases.arms(names):           # each from the snapshot
        for step in phases.steps(self_steps):
            ...
"""
import copy

import numpy as np
import torch

from checkpoints import read_meta_phase
from configurator import SELF_PHASE, refuse_if
from corpus import corpus_id, get_batch, val_windows
from hacks import HEAD, aligned, keep_texts, write_report
from page import write_page
from plot import draw_runs
from watch import MEMORY, STREAMS, Gold, Watch, arms_table, make_row, new_track, summarise, track_gold

REAL = ("real", "oracle", "first")  # arms with real targets; they have no critic to watch


class Phases:
    """A run between its first step and its summary.

    parts: {name: module or optimizer}, all that a checkpoint holds and an arm starts from; "learner",
    "critic" and "optimizer" among them. kept: a dict of plain values and tensors that the script wants kept.

    What the script tells the loop, as functions:
    read(text)              the learner's logits [B, T, V] on text [B, T], for gold
    rate(arm, step)         the learner's learning rate
    examine()               {column: value}, more for the row of the log; agreement_probe among them
    judge()                 the module that is the critic now
    ask(learner, critic)    (own tokens, observation, targets: lists of ids; agreement) on the text to come
    """

    def __init__(self, run, corpus, parts, kept, *, read, rate, examine, judge, ask):
        s = self.settings = run.settings
        self.run, self.corpus, self.watch = run, corpus, Watch()
        self.parts = dict(parts, watch=self.watch)
        self.read, self.rate, self.examine, self.judge, self.ask = read, rate, examine, judge, ask
        self.step, self.tally, self.row, self.alarms, self.piece = 0, {}, None, [], None
        windows = val_windows(corpus.val, s["eval_windows"], s["block_size"] + 1)
        self.gold = Gold(windows, corpus.token_bytes, run, s["batch_size"] // run.ranks // s["grad_accum"])
        self.at = dict(arm="meta", step=0, track=new_track(), arms={}, meta=None, snapshot=None, kept=kept,
                       real_targets=0, streams=torch.zeros(0, 3, device=run.device), corpus=corpus_id(corpus))

    arm = property(lambda self: self.at["arm"])
    kept = property(lambda self: self.at["kept"])
    snapshot = property(lambda self: self.at["snapshot"])

    def begin(self, self_phase):
        """Anew, where `resume` stands, or from the meta phase of `start`; then opens the run folder.

        self_phase: the settings that this meta phase does not read. Refuses another corpus, other settings.
        """
        run, at, start = self.run, self.at, self.settings["start"]
        if run.resumed:
            refuse_if(run.resumed["corpus"] != at["corpus"],
                      f"{self.corpus.folder} holds another corpus or tokenizer than that of {run.out_dir}")
            run.restore(at, self.tally, self.parts)
        elif start:
            known = self.settings, (*SELF_PHASE, *self_phase), at["corpus"]
            track, snapshot = read_meta_phase(start, run.stage, run.device, *known)
            at.update(arm="start", meta=track, snapshot=snapshot, kept=copy.deepcopy(snapshot["kept"]))
        modules = [part for part in self.parts.values() if isinstance(part, torch.nn.Module)]
        size = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
        run.open(need_bytes=(28 + 4 * self.settings["arms"].count(",")) * size)  # 3 checkpoints, and the ends

    # ---- data

    def pieces(self):
        """Goes through the grad_accum pieces of a step: `text` and `chance` give what belongs to each."""
        for self.piece in range(self.settings["grad_accum"]):
            yield self.piece
        self.piece = None

    def share(self):
        """(number, of how many) of the rows that are this rank's, or those of its piece."""
        pieces, piece = (1, 0) if self.piece is None else (self.settings["grad_accum"], self.piece)
        return self.run.rank * pieces + piece, self.run.ranks * pieces

    def text(self, step, stream=0, rows=None, split="train"):
        """This rank's rows of a step's text, int [rows / ranks, T + 1]. stream: a use of seed."""
        s, tokens = self.settings, getattr(self.corpus, split)
        rows, length = rows or s["batch_size"], s["block_size"] + 1
        return get_batch(tokens, s["seed"], step, rows, length, *self.share(), stream).to(self.run.device)

    def chance(self, step, shape, stream, rows=None):
        """This rank's rows of uniform numbers [rows / ranks, *shape] in [0, 1)."""
        rng, (number, parts) = np.random.default_rng([self.settings["seed"], stream, step]), self.share()
        numbers = rng.random((rows or self.settings["batch_size"], *shape), dtype=np.float32)
        return torch.from_numpy(np.split(numbers, parts)[number]).to(self.run.device)

    # ---- the loop

    def meta(self, n):
        """The n steps of the meta phase, or what is left of them."""
        if self.arm == "meta":
            yield from self.steps(n)

    def take_snapshot(self):
        """Keeps the end of the meta phase, from which every arm starts: weights, moments and watch."""
        state = dict({name: part.state_dict() for name, part in self.parts.items()}, kept=self.kept)
        self.at.update(arm="start", meta=self.at["track"], snapshot=copy.deepcopy(state),
                       streams=self.at["streams"][:0])

    def drop(self, *names):
        """Parts that the self phase does not need; what the snapshot has of them stays."""
        self.parts = {name: part for name, part in self.parts.items() if name not in names}

    def arms(self, names):
        """Each arm of `names`: put back to the snapshot, or gone on with; keeps its end."""
        for arm in names:
            if self.arm != arm:
                end = self.at["arms"].get(arm)
                end = end and self.run.read_end(arm, end["self_steps"])  # it is to go on from there
                for name, part in self.parts.items():
                    part.load_state_dict(copy.deepcopy((end or self.snapshot)[name]))
                at = end["at"] if end else dict(step=0, track=new_track(), real_targets=0, kept=self.kept)
                self.at.update(at, arm=arm, goes_on=bool(end))
                self.step = self.at["step"]
                if not self.at["arms"]:
                    self.sample(f"{HEAD}==== after the meta phase")
            yield arm
            self.at["track"]["self_steps"] = self.at["step"] = self.step
            self.at["arms"][arm] = self.at["track"]
            at = {name: self.at[name] for name in ("step", "track", "real_targets", "kept")}
            self.run.keep_end(arm, self.parts, at)
            self.sample(f"==== after {arm}")
        self.at["arm"] = "done"

    def steps(self, n):
        """The steps 0 … n − 1 of a phase. At step n it is evaluated once more, and ends."""
        run, every = self.run, self.settings["eval_interval"]
        run.progress.start(self.at["step"])
        for self.step in range(self.at["step"], n + 1):
            save, evaluate = run.saves(self.step), self.step % every == 0 or self.step == n
            if self.at.pop("goes_on", False):  # this step was evaluated when it was the last
                save = evaluate = False
            gold = self.gold(self.read) if save or evaluate else None
            if gold and run.is_finite(gold, self.arm, self.step) and save:
                run.checkpoint(self.step, self.at, self.tally, self.parts)
            left = 1.0 if self.arm == "meta" else 1 - (1 - self.settings["decay"]) * self.step / n
            for group in self.parts["optimizer"].param_groups:
                group["lr"] = left * self.rate(self.arm, self.step)
            self.alarms = []
            if evaluate:
                self.evaluate(n, gold)
            if self.step < n:
                with run.progress.counted(evaluate):
                    yield self.step

    def evaluate(self, n, gold):
        """A row of the log; whether gold was hacked, and whether the watch alarms; a report of each."""
        step, track, lr = self.step, self.at["track"], self.parts["optimizer"].param_groups[0]["lr"]
        more = dict(real_targets=self.at["real_targets"], **self.examine())
        self.row, stream = make_row(self.run, self.arm, step, self.tally, gold, lr, more)
        self.run.log(self.row)
        self.run.progress.show(self.row, n)
        keep_texts(self, n)
        hacked = track_gold(track, self.row)
        if self.arm == "meta" and stream is not None:
            self.at["streams"] = torch.cat((self.at["streams"], stream))
        if self.arm == "meta" or stream is None:
            return
        probe = torch.tensor(self.row.get("agreement_probe") or 0.0, device=self.run.device)
        stream, probe = stream.cpu(), self.run.mean(probe)  # so that all ranks alarm together
        listens = ("surprise", "entropy") if self.arm in REAL else tuple(STREAMS)
        self.alarms = self.watch.update(step, stream, probe, listens)
        if hacked:
            self.run.say(f"{self.arm}: hacked at step {track['steps_to_hack']}, gold {track['gold_end']:.3f}")
            self.at["track"]["reports"].append(write_report(self, "gold"))
        if self.alarms and step - (track["alarms"] or [-MEMORY])[-1] >= MEMORY:
            track["alarms"].append(step)
            self.at["track"]["reports"].append(write_report(self, self.alarms))
        if self.alarms:
            self.watch.restart(step, stream, probe)

    def take_step(self, module, optimizer, g=None, noted=True):
        """Clips and steps. g: gradients by name, averaged over ranks; None: those of .backward(), not yet."""
        for name, p in module.named_parameters() if g is not None else ():
            p.grad = g[name].clone()
        params = [p for p in module.parameters() if p.grad is not None]
        if g is None:
            self.run.average([p.grad for p in params])
        norm = torch.nn.utils.clip_grad_norm_(params, self.settings["grad_clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if noted:
            self.tally["grad_norm"] = self.tally.get("grad_norm", 0) + norm * self.settings["grad_accum"]

    # ---- what is told

    def told(self, learner, critic):
        """What the script's `ask` finds, in the first piece of a batch."""
        self.piece = 0
        found, self.piece = self.ask(learner, critic), None
        return found

    @torch.no_grad()
    def sample(self, head):
        """samples.txt: what the learner says to the text to come, and what the critic makes of it."""
        *said, _ = self.told(self.parts["learner"], self.judge())
        self.run.append("samples.txt", f"{head}\n{aligned(self.corpus.encoding, said)}")

    def finish(self, **found):
        """The last checkpoint, the table of the arms, and summary.json with what was `found` beside."""
        run, at, s = self.run, self.at, self.settings
        run.checkpoint(0, at, self.tally, self.parts, last=True)
        if arms := summarise(at["arms"]):
            run.say(arms_table(arms))
        found |= dict(gold_meta_end=at["meta"]["gold_end"], bpb_meta_end=at["meta"]["bpb_end"], arms=arms)
        summary = dict(stage=run.stage, seed=s["seed"], config=s, meta_steps=s["meta_steps"], **found)
        run.finish(summary, draw_runs, write_page)
