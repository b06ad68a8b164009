"""
A configured run: device, ranks and their averages, run folder, log, stopping and going on.

It leaves in out_dir: report.html (all of it on a page), config.json, log.jsonl, samples.txt, texts.jsonl
(what was said at some evaluations), summary.json, curves.png, checkpoints (see checkpoints.py), hacks/ (a
report of each hack and each alarm), sources/ (the script that ran, and the modules that it imported).
"""
import functools
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoints import (BEFORE, FORMAT, NEWEST, Writer, cannot_write, copied, read_checkpoint, read_end,
                         run_of, write_whole)
from configurator import RATES, check_common, configure, defaults_of, keep_saved, refuse, taken_from
from devices import check_compiler, choose_device, facts
from locks import lock
from progress import Progress
from ranks import meet, watch_refusals
from sources import DAMAGE, brief

LOST = 1000  # times as many nats as a guess costs: from there no learning rate leads back
GROWING = ("log.jsonl", "samples.txt", "texts.jsonl")  # resuming cuts them to their length at the checkpoint


class Run:
    """One run: where it computes, where it writes, and whether it should stop.

    Attributes: stage (the script's name), settings, device, dtype, weight_dtype, rank, local_rank, ranks,
    first (whether this is rank 0), out_dir (Path), progress, and resumed (the checkpoint's dict, or None).
    """

    def __init__(self, stage, settings, scope, resumed=None):
        self.stage, self.settings, self.script = stage, settings, Path(scope["__file__"])
        torchrun = (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
        self.rank, self.local_rank, self.ranks = (int(os.environ.get(k, d)) for k, d in torchrun)
        self.first, accum = self.rank == 0, settings["grad_accum"]
        if settings["batch_size"] % (self.ranks * accum):
            refuse(f"batch_size={settings['batch_size']} must be a multiple of the {self.ranks} ranks times "
                   f"grad_accum={accum}")
        if settings["eval_windows"] % self.ranks:
            refuse(f"eval_windows={settings['eval_windows']} must be a multiple of the {self.ranks} ranks")
        self.device, reason = choose_device(settings["device"], settings["dtype"], self.local_rank)
        if settings.get("compile"):
            check_compiler(self.device)
        self.dtype = getattr(torch, settings["dtype"])
        self.weight_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.out_dir, self.resumed, self.began = Path(settings["out_dir"]), resumed, time.time()
        self.lock = self.tracker = self.writer = None
        self.ends = False
        self.stop_signal, self.ask_every, self.files, self.hashes, self.spent = 0, 1, {}, {}, 0.0
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        self.progress = Progress(self.device, self.first)
        self.say = self.progress.say
        self.say(f"{stage}: {self.device} ({reason}), {settings['dtype']}, rank 0 of {self.ranks}, "
                 f"{torch.get_num_threads()} threads, torch {torch.__version__}")

    @property
    def command(self):
        """The command that goes on with the run."""
        launch = "torchrun --nproc_per_node=" + os.environ.get("LOCAL_WORLD_SIZE", "1")
        return shlex.join((*(launch.split() if self.ranks > 1 else ["python"]), self.script.name,
                           f"--resume={self.out_dir}"))

    # ---- ranks

    def together(self, work):
        """The first rank does the work; if it refuses, all end, and none waits for another."""
        code = 0
        if self.first:
            try:
                work()
            except SystemExit as refused:
                code = refused.code
        if self.ranks > 1:
            flag = torch.tensor([code], device=self.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            code = int(flag.item())
        if code:
            raise SystemExit(code)

    def average(self, tensors):
        """Averages a list of tensors over the ranks, in place, through one flat buffer and one all-reduce."""
        if self.ranks > 1 and tensors:
            flat = torch.cat([t.reshape(-1) for t in tensors])
            dist.all_reduce(flat)
            flat /= self.ranks
            for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
                t.copy_(part.view_as(t))

    def mean(self, value):
        """The mean over ranks of a scalar tensor, as a float. Waits for the device: not for a hot loop."""
        value = value.detach().clone().view(1)
        self.average([value])
        return value.item()

    def autocast(self):
        """The context of a forward pass: bfloat16 arithmetic over float32 weights if asked, else nothing."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype == torch.bfloat16 else nullcontext()

    def room_for(self, copies, module):
        """Where copies of a module's weights wait that are seldom used: the CPU if a GPU would be short."""
        size = copies * sum(p.numel() * p.element_size() for p in module.parameters())
        short = self.device.type == "cuda" and size > torch.cuda.mem_get_info(self.device)[0] / 4
        return torch.device("cpu") if short else self.device

    # ---- the folder and what is written there

    def open(self, need_bytes):
        """Takes the run folder, after every check, if need_bytes are free; an earlier run is moved aside.

        The ranks meet here: whoever refused before did so alone, and in words.
        """
        if self.ranks > 1:
            meet(self.rank, self.ranks, "nccl" if self.device.type == "cuda" else "gloo")
        self.together(lambda: self._take_folder(need_bytes))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _take_folder(self, need_bytes):
        try:
            existing = next(p for p in (self.out_dir, *self.out_dir.absolute().parents) if p.exists())
            free = shutil.disk_usage(existing).free
            if free < need_bytes:
                refuse(f"out_dir={str(self.out_dir)!r}: {free / 1e6:.0f} MB are free there and the run needs "
                       f"about {need_bytes / 1e6:.0f} MB; free some or choose another --out_dir")
            if self.settings["wandb_log"] != "no":  # before anything is touched: it may refuse
                from tracker import Tracker, ids_of
                ids, mode = ids_of(self.out_dir) if self.resumed else None, self.settings["wandb_log"]
                self.tracker = Tracker(mode, self.out_dir, self.settings, self.stage, ids)
            self._move_aside()
            self.out_dir.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            if self.resumed:
                self._take_back()
            self.write_json("config.json", self.settings)  # first: it tells that the folder is a run's
            if not self.resumed:
                self._keep_sources()
            for name in GROWING:
                path = self.out_dir / name
                self.hashes[name] = hashlib.sha256(path.read_bytes() if path.exists() else b"")
                self.files[name] = open(path, "ab")
            self.writer = Writer(self.out_dir)
            if self.tracker:
                self.write_json("wandb.json", self.tracker.ids)  # a resumed run goes on in the same ones
        except (OSError, RuntimeError, ValueError) as error:  # pathlib's of a symlink to itself; JSON's
            reason = getattr(error, "strerror", None) or error
            refuse(f"out_dir={str(self.out_dir)!r} cannot be written to ({reason}); name another")

    def _move_aside(self):
        held = {p.name for p in self.out_dir.glob("*")} - {".lock", ".config.json.tmp"}
        if self.resumed or not held:
            return
        if "config.json" not in held:
            refuse(f"out_dir={str(self.out_dir)!r} holds files that are no run's; name a new or empty folder")
        self._take_lock()
        n = next(n for n in range(1, 10**6) if not Path(f"{self.out_dir}-{n}").exists())
        os.rename(self.out_dir, f"{self.out_dir}-{n}")
        self.lock.close()
        self.say(f"{self.out_dir} held an earlier run: moved to {self.out_dir}-{n}")

    def _take_lock(self):
        self.lock = open(self.out_dir / ".lock", "w", encoding="utf-8")
        try:
            lock(self.lock, wait=False)
        except OSError:
            refuse(f"another run is writing to {self.out_dir}; wait for it or choose another --out_dir")

    def _take_back(self):
        """Undoes what was written after the checkpoint: it will be written again."""
        for name, (size, sha256) in self.resumed["files"].items():
            path = self.out_dir / name
            if not path.is_file() or path.stat().st_size < size:
                refuse(f"{path} is gone or shorter than at the checkpoint: the run cannot be gone on with")
            if hashlib.sha256(path.read_bytes()[:size]).hexdigest() != sha256:
                refuse(f"{path} was altered since the checkpoint: the run cannot be gone on with")
        for name, (size, _) in self.resumed["files"].items():
            os.truncate(self.out_dir / name, size)
        for path in (self.out_dir / "hacks").glob("*"):
            report = re.fullmatch(r"(\.?)(\d+)\.(md|png)(\.tmp)?", path.name)  # a kill may leave .001.md.tmp
            if report and (report[1] or int(report[2]) > self.resumed["reports"]):
                path.unlink()
                (path.parent / "index.md").unlink(missing_ok=True)  # the next report writes it anew
        if self.resumed["sources"] != self.sources[1]:
            self.say("the project's code has changed since the run was begun; it goes on with that of today")

    @functools.cached_property
    def sources(self):
        """(the script and the modules beside it that it imported, sorted paths; their sha256), at first."""
        folder = self.script.resolve().parent
        files = [str(self.script), *(getattr(m, "__file__", None) for m in list(sys.modules.values()))]
        paths = {Path(f).resolve() for f in files if isinstance(f, str)} | {folder / "page.html"}
        paths = sorted(path for path in paths if path.parent == folder and path.is_file())
        return paths, hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()

    def _keep_sources(self):
        kept = self.out_dir / "sources"
        kept.mkdir(exist_ok=True)
        for path in self.sources[0]:
            shutil.copy(path, kept)

    def write(self, name, write, before=None):
        """Writes out_dir/name by `write(file)`, whole or not at all; what it was stays as out_dir/before."""
        try:
            write_whole(self.out_dir / name, write, before and self.out_dir / before)
        except OSError as error:
            cannot_write(self.out_dir / name, self.out_dir, error)

    def write_json(self, name, value):
        if self.first:
            self.write(name, lambda f: f.write((json.dumps(value, indent=1) + "\n").encode("utf-8")))

    def saves(self, step):
        """Whether a checkpoint is due at a step: each save_interval steps, and where the run is to stop."""
        self.ends = self.stopping(step)  # as all ranks agree: a signal may come to one of them from here on
        return self.ends or step % self.settings["save_interval"] == 0

    def is_finite(self, gold, arm, step):
        """True, or the end of a run whose gold, (nats a token, bits a byte), is not finite, or as good as."""
        worst, told = LOST * math.log(self.settings.get("vocab", 2)), f"{gold[0]:.3g} nats"
        what = f"gold is {told if math.isfinite(gold[0]) else 'not finite'}"
        return gold[0] < worst or self.stop_diverged(what, arm, step)

    def checkpoint(self, step, at, tally, parts, last=False):
        """Writes ckpt.pt, unless the one before is still being written, and stops if asked to.

        at: dict of plain values and tensors, where the run stands. tally: dict of tensors, what the next row
        averages. parts: {name: module, optimizer or watch}. That is everything: data and random numbers are
        pure functions of the step, so that a resumed run repeats one without interruption, on the CPU bit for
        bit, on a GPU as far as its kernels repeat themselves.
        """
        self.average(list(tally.values()))
        modules = [part for part in parts.values() if isinstance(part, torch.nn.Module)]
        weights = [p for module in modules for p in module.parameters()]
        if not all(torch.isfinite(t).all() for t in (*weights, *tally.values())):
            self.stop_diverged("a weight or the loss is not finite", at["arm"], step)
        at["step"] = step
        if self.first and (last or self.ends or self.writer.due()):
            files = {n: ((self.out_dir / n).stat().st_size, self.hashes[n].hexdigest()) for n in GROWING}
            saved = {name: part.state_dict() for name, part in parts.items()}
            self.writer.write(dict(at, tally=tally, format=FORMAT, stage=self.stage, config=self.settings,
                                   files=files, reports=self.last_report(), sources=self.sources[1],
                                   seconds=self.seconds(), **saved))
        if self.ends:
            self.stop()

    def restore(self, at, tally, parts):
        """Puts the checkpoint back into what `checkpoint` was given; of `parts` into those that it holds."""
        try:
            at.update({name: copied(self.resumed[name], self.device) for name in at})
            tally.update(copied(self.resumed["tally"], self.device))
            for name, part in parts.items():
                if name in self.resumed:
                    part.load_state_dict(self.resumed[name])
        except (*DAMAGE, RuntimeError) as error:  # torch's, of other sizes
            refuse(f"{self.out_dir / NEWEST} does not fit the run's settings ({brief(error)})")
        self.spent = self.resumed["seconds"]
        self.resumed = {name: self.resumed[name] for name in ("files", "reports", "sources")}  # no more of it

    def keep_end(self, arm, parts, at):
        """Writes ends/<arm>.pt: the learner's weights, and what the arm needs to go on; see `read_end`."""
        if self.first:
            state = {name: part.state_dict() for name, part in parts.items()}
            state.update(at=at, format=FORMAT, stage=self.stage, arm=arm, weights=state["learner"])
            # The checkpoint on the disk may know of the end before alone.
            self.write(f"ends/{arm}.pt", lambda f: torch.save(state, f), before=f"ends/.{arm}.before")

    def read_end(self, arm, steps):
        """What `keep_end` wrote of an arm of this run, after so many steps."""
        return copied(read_end(self.out_dir, arm, self.stage, steps), self.device)

    def arms_to_go(self, names, known):
        """The arms of `names` not finished: an interrupted one (never left out), real, then the rest."""
        done, at = (self.resumed["arms"], self.resumed["arm"]) if self.resumed else ({}, "meta")
        if at in known and at not in names:
            refuse(f"arms={self.settings['arms']!r} leaves out {at!r}, in which the run was interrupted")
        # real before the others: no hack is to be believed before it was seen
        to_go = [a for a in names if a not in done or done[a]["self_steps"] < self.settings["self_steps"]]
        return sorted(to_go, key=lambda a: (a != at, a != "real"))

    def log(self, row):
        """Appends a row to log.jsonl (and wandb). A number in it that is not finite ends the run."""
        if not all(math.isfinite(v) for v in row.values() if isinstance(v, float)):
            self.stop_diverged("what is logged is not finite", row["arm"], row["step"])
        rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
        self.append("log.jsonl", json.dumps(rounded) + "\n")
        if self.tracker:
            self.tracker.log(row)

    def append(self, name, text):
        """Appends text to a file of GROWING."""
        if self.first:
            data = text.encode("utf-8", errors="replace")
            try:
                self.files[name].write(data)
                self.files[name].flush()
            except OSError as error:
                cannot_write(self.out_dir / name, self.out_dir, error)
            self.hashes[name].update(data)

    def last_report(self):
        """The number of the newest hack report, hacks/<number>.md; 0 without one."""
        stems = [path.stem for path in (self.out_dir / "hacks").glob("*.md")]
        return max((int(stem) for stem in stems if stem.isdecimal()), default=0)

    def seconds(self):
        """What the run has taken so far, before it was interrupted too."""
        return round(self.spent + time.time() - self.began, 1)

    def finish(self, summary, draw, write_page):
        """Writes summary.json, the picture of draw([folder]) and the page of write_page(folder), and ends."""
        made = dict(facts(self.script, self.device), ranks=self.ranks, seconds=self.seconds(),
                    sources_sha256=self.sources[1])
        self.write_json("summary.json", dict(summary, made=made))
        if self.first:
            for tool, make in (("plot", lambda out: draw([out])[0]), ("page", write_page)):
                try:
                    self.say(f"{tool}: {make(self.out_dir)}")
                except (Exception, SystemExit) as error:  # the run is done and written: this may not undo it
                    kind = type(error).__name__
                    self.say(f"no {tool} was drawn ({kind}); try python {tool}.py {self.out_dir}")
        self.close(summary["arms"])

    # ---- stopping

    def _on_signal(self, number, frame):
        if self.stop_signal:  # asked twice: at once
            raise KeyboardInterrupt
        self.stop_signal = number

    def stopping(self, step):
        """Whether to end after this step. All ranks agree: they ask each other every second or so."""
        if self.ranks > 1 and step % self.ask_every and step % self.settings["eval_interval"]:
            return False
        if self.ranks == 1:
            return self.stop_signal > 0
        each = int(1 / self.progress.step_time(step)) if self.first else 0
        flag = torch.tensor([self.stop_signal, each], device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        agreed, self.ask_every = int(flag[0].item()), max(1, int(flag[1].item()))
        self.stop_signal = self.stop_signal or agreed  # one that came meanwhile waits for the next question
        return agreed > 0

    def stop(self):
        """Ends a run that was asked to stop, after its checkpoint is written."""
        self.say(f"stopped by {signal.Signals(self.stop_signal).name}; go on with: {self.command}")
        self.close()
        raise SystemExit(128 + self.stop_signal)

    def stop_diverged(self, what, arm, step):
        """Ends a run in which something is NaN, infinite or as good as; the checkpoint before it stays."""
        default = defaults_of(dict(__file__=self.script))
        own = "self_learning_rate" if arm != "meta" else ""
        rates = [name for name in RATES if name in self.settings and name != "grad_clip"]
        name = max(rates, key=lambda n: (self.settings[n] / (default[n] or 1), n == own))  # most likely it
        self.say(f"error: {what} at step {step} of {arm}; go on from the last checkpoint at a "
                 f"{name} below {self.settings[name]}:\n  {self.command} --{name}=...")
        self.close()
        raise SystemExit(3)

    def close(self, arms=None):
        if self.writer:
            self.writer.wait()
        if self.tracker:
            self.tracker.finish(arms)
        for f in (*self.files.values(), *filter(None, [self.lock])):
            f.close()
        if self.ranks > 1:
            dist.barrier()
            time.sleep(0.5)  # gloo's threads still hold the last tensors; an interpreter that ends now aborts
            dist.destroy_process_group()


def open_run(scope, self_phase=()):
    """The Run of a script's settings (its globals), overridden and checked. Nothing is written yet.

    With `resume`, the settings of the resumed run stand, with `start` those that its meta phase read; a
    different one on the command line is refused. self_phase: names of the settings that no meta phase of the
    script reads, beside configurator.SELF_PHASE.
    """
    watch_refusals()
    settings, given = configure(scope)
    stage, folder, resumed = Path(scope["__file__"]).stem, settings["resume"], None
    if folder == "auto":
        begun = any((Path(settings["out_dir"]) / name).exists() for name in (NEWEST, BEFORE))
        folder = settings["resume"] = settings["out_dir"] if begun else ""
        if folder and not settings.get("start"):  # all of them: the same command goes on, and no other
            given = settings
    if folder:
        resumed = read_checkpoint(folder, stage)
        settings = keep_saved(settings, given, resumed["config"], folder)
    elif settings.get("start"):
        other = read_checkpoint(run_of(settings["start"])[0], stage)["config"]
        settings = taken_from(settings, given, other, self_phase)
    scope.update(settings)
    check_common(settings)
    run = Run(stage, settings, scope, resumed)
    default = defaults_of(scope)
    changed = {k: v for k, v in settings.items() if v != default[k] and k != "out_dir"}
    run.say("  ".join(f"{k}={v}" for k, v in changed.items()) or "all settings are the defaults")
    return run
