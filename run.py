"""
A configured run: device, ranks and their averages, run folder, checkpoints, log, progress.

It leaves in out_dir: config.json, log.jsonl, samples.txt, texts.jsonl (what was said at some evaluations),
summary.json, curves.png, report.html (all of it on a page), ckpt.pt (all that it takes to go on),
ends/<arm>.pt (the learner's weights after each arm), hacks/ (a report of each hack and each alarm), sources/
(the script that ran, and the modules of the project that it imported).
"""
import fcntl
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from configurator import check_common, configure, keep_saved, refuse

FORMAT = "metalearn-3"
GROWING = ("log.jsonl", "samples.txt", "texts.jsonl")  # resuming cuts them to their length at the checkpoint


def choose_device(name, dtype, local_rank):
    """(torch.device, reason) for `name` in "auto" | "cuda" | "mps" | "cpu"; refuses what is not there."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [k for k in has if has[k]]
    if name not in ("auto", *there):
        refuse(f"device={name!r} is not there on this machine, which has {' and '.join(there)}")
    kind, reason = (there[0], "the best there is") if name == "auto" else (name, "asked for")
    if kind == "mps" and dtype == "float64":
        refuse('dtype="float64" does not exist on device "mps"; use --device=cpu or --dtype=float32')
    return torch.device(f"cuda:{local_rank}" if kind == "cuda" else kind), reason


class Run:
    """One run: where it computes, where it writes, and whether it should stop.

    Attributes: stage (the script's name), settings, device, dtype, weight_dtype, rank, local_rank, ranks,
    first (whether this is rank 0), out_dir (Path), and resumed (the checkpoint's dict, or None).
    """

    def __init__(self, stage, settings, scope):
        self.stage, self.settings, self.script = stage, settings, Path(scope["__file__"])
        torchrun = (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
        self.rank, self.local_rank, self.ranks = (int(os.environ.get(k, d)) for k, d in torchrun)
        self.first = self.rank == 0
        if settings["batch_size"] % self.ranks or settings["eval_windows"] % self.ranks:
            refuse(f"batch_size={settings['batch_size']} and eval_windows={settings['eval_windows']} "
                   f"must both be multiples of the {self.ranks} ranks")
        self.device, reason = choose_device(settings["device"], settings["dtype"], self.local_rank)
        self.dtype = getattr(torch, settings["dtype"])
        self.weight_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.out_dir, self.resumed = Path(settings["out_dir"]), None
        self.log_file = self.samples_file = self.texts_file = self.lock = self.wandb = None
        self.stop_signal, self.shown_at, self.line = 0, 0.0, 0
        if self.device.type == "cuda":
            if self.local_rank >= torch.cuda.device_count():
                refuse(f"nproc_per_node is above the {torch.cuda.device_count()} GPUs of this machine")
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if self.ranks > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.say(f"{stage}: {self.device} ({reason}), {settings['dtype']}, rank 0 of {self.ranks}, "
                 f"{torch.get_num_threads()} threads, torch {torch.__version__}")

    def barrier(self):
        if self.ranks > 1:
            dist.barrier()

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

    # ---- the folder and what is written there
    def open(self, need_bytes):
        """Takes the run folder, after every check, if need_bytes are free; an earlier run is moved aside."""
        if self.first:
            existing = next(p for p in (self.out_dir, *self.out_dir.absolute().parents) if p.exists())
            free = shutil.disk_usage(existing).free
            if free < need_bytes:
                refuse(f"out_dir={str(self.out_dir)!r}: {free / 1e6:.0f} MB are free there and the run needs "
                       f"about {need_bytes / 1e6:.0f} MB; free some or choose another --out_dir")
            try:
                self._move_aside()
                self.out_dir.mkdir(parents=True, exist_ok=True)
                self._take_lock()
                if self.settings["wandb_log"] != "no":
                    self._start_wandb()
                if self.resumed:
                    self._take_back()
                self.write_json("config.json", self.settings)  # first: it tells that the folder is a run's
                if not self.resumed:
                    self._keep_sources()
                self.log_file, self.samples_file, self.texts_file = (
                    open(self.out_dir / name, "a", encoding="utf-8") for name in GROWING)
            except OSError as error:
                refuse(f"out_dir={str(self.out_dir)!r} cannot be written to ({error.strerror}); name another")
        self.barrier()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _move_aside(self):
        held = {p.name for p in self.out_dir.glob("*")} - {".lock"}
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
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            refuse(f"another run is writing to {self.out_dir}; wait for it or choose another --out_dir")

    def _take_back(self):
        """Undoes what was written after the checkpoint: it will be written again."""
        for name, size in self.resumed["files"].items():
            path = self.out_dir / name
            if not path.is_file() or path.stat().st_size < size:
                refuse(f"{path} is gone or shorter than at the checkpoint: the run cannot be gone on with")
            os.truncate(path, size)
        for path in (self.out_dir / "hacks").glob("*"):
            report = re.fullmatch(r"(\.?)(\d+)\.(md|png)(\.tmp)?", path.name)  # a kill may leave .001.md.tmp
            if report and (report[1] or int(report[2]) > self.resumed["reports"]):
                path.unlink()

    def _keep_sources(self):
        folder, kept = self.script.resolve().parent, self.out_dir / "sources"
        kept.mkdir(exist_ok=True)
        files = [str(self.script), *(getattr(m, "__file__", None) for m in list(sys.modules.values()))]
        for path in {Path(f).resolve() for f in files if isinstance(f, str)}:
            if path.parent == folder and path.is_file():
                shutil.copy(path, kept)

    def _start_wandb(self):
        try:
            import wandb
            self.wandb = wandb.init(project="metalearn", name=self.out_dir.name, dir=self.out_dir.parent,
                                    config=self.settings, mode=self.settings["wandb_log"])
        except Exception as error:  # no package, no account, no network: wandb has its own kinds for each
            refuse(f"wandb_log={self.settings['wandb_log']!r} could not start ({type(error).__name__}): "
                   "`pip install wandb`, `wandb login`, or use --wandb_log=offline")

    def write(self, name, write):
        """Writes out_dir/name by `write(file)`, whole or not at all."""
        path = self.out_dir / name
        tmp = path.with_name(f".{path.name}.tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            with open(tmp, "wb") as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(tmp, path)
        except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
            tmp.unlink(missing_ok=True)
            refuse(f"{path} could not be written ({error}); once it can: --resume={self.out_dir}")

    def write_json(self, name, value):
        if self.first:
            self.write(name, lambda f: f.write((json.dumps(value, indent=1) + "\n").encode("utf-8")))

    def checkpoint(self, step, at, tally, parts):
        """Every save_interval steps, and when asked to stop, writes ckpt.pt; then stops if asked to.

        at: dict of plain values and tensors, where the run stands. tally: dict of tensors, what the next row
        averages. parts: {name: module, optimizer or watch}. That is everything: data and random numbers are
        pure functions of the step, so that a resumed run repeats one without interruption, on the CPU bit for
        bit, on a GPU as far as its kernels repeat themselves.
        """
        stop = self.stopping(step)
        if step % self.settings["save_interval"] and not stop:
            return
        self.average(list(tally.values()))
        if not all(torch.isfinite(v).all() for v in tally.values()):
            self.stop_not_finite(at["arm"], step)
        at["step"] = step
        if self.first:
            files = {n: (self.out_dir / n).stat().st_size for n in GROWING}
            saved = {name: part.state_dict() for name, part in parts.items()}
            state = dict(at, tally=tally, format=FORMAT, stage=self.stage, config=self.settings, files=files,
                         reports=self.last_report(), **saved)
            self.write("ckpt.pt", lambda f: torch.save(state, f))
        if stop:
            self.stop()

    def restore(self, at, tally, parts):
        """Puts the checkpoint back into what `checkpoint` was given; of `parts` into those that it holds."""
        at.update({name: self.resumed[name] for name in at})
        tally.update(self.resumed["tally"])
        for name, part in parts.items():
            if name in self.resumed:
                part.load_state_dict(self.resumed[name])

    def keep_end(self, arm, learner):
        """Writes the weights of an arm's end to ends/<arm>.pt; `read_end` reads them."""
        if self.first:
            state = dict(format=FORMAT, stage=self.stage, arm=arm, weights=learner.state_dict())
            self.write(f"ends/{arm}.pt", lambda f: torch.save(state, f))

    def arms_to_go(self, names, known):
        """The arms of `names` not finished: an interrupted one (never left out), real, then the rest."""
        done, at = (self.resumed["arms"], self.resumed["arm"]) if self.resumed else ({}, "meta")
        if at in known and at not in names:
            refuse(f"arms={self.settings['arms']!r} leaves out {at!r}, in which the run was interrupted")
        # real before the others: no hack is to be believed before it was seen
        return sorted((a for a in names if a not in done), key=lambda a: (a != at, a != "real"))

    def log(self, row):
        """Appends a row to log.jsonl (and wandb). A number in it that is not finite ends the run."""
        if not all(math.isfinite(v) for v in row.values() if isinstance(v, float)):
            self.stop_not_finite(row["arm"], row["step"])
        rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
        self._append(self.log_file, json.dumps(rounded) + "\n")
        if self.wandb:
            self.wandb.log({f"{row['arm']}/{k}": v for k, v in row.items() if isinstance(v, (int, float))})

    def sample(self, text):
        """Appends text to samples.txt."""
        self._append(self.samples_file, text)

    def keep_text(self, row):
        """Appends a row to texts.jsonl."""
        self._append(self.texts_file, json.dumps(row) + "\n")

    def _append(self, file, text):
        if self.first:
            try:
                file.write(text)
                file.flush()
            except OSError as error:
                refuse(f"{file.name} could not be written ({error}); once it can: --resume={self.out_dir}")

    def last_report(self):
        """The number of the newest hack report, hacks/<number>.md; 0 without one."""
        stems = [path.stem for path in (self.out_dir / "hacks").glob("*.md")]
        return max((int(stem) for stem in stems if stem.isdecimal()), default=0)

    def finish(self, summary, draw, write_page=None):
        """Writes summary.json, the picture of draw([folder]) and the page of write_page(folder), and ends."""
        self.write_json("summary.json", summary)
        picture = None
        if self.first:
            try:
                picture, _ = draw([self.out_dir])
                self.say(f"drawn in {picture}")
            except Exception as error:  # the run is done and written: a picture may not undo that
                self.say(f"no picture was drawn ({type(error).__name__}); try python plot.py {self.out_dir}")
        if self.first and write_page:
            try:
                self.say(f"all of it on a page: {write_page(self.out_dir)}")
            except (Exception, SystemExit) as error:  # nor may a page
                self.say(f"no page was written ({type(error).__name__}); try python page.py {self.out_dir}")
        if self.wandb and summary["arms"]:
            import wandb
            columns = [k for k, v in next(iter(summary["arms"].values())).items() if not isinstance(v, list)]
            rows = [[name, *(arm[k] for k in columns)] for name, arm in summary["arms"].items()]
            curves = {"curves": wandb.Image(str(picture))} if picture else {}
            self.wandb.log({"arms": wandb.Table(columns=["arm", *columns], data=rows), **curves})
        self.close()

    # ---- progress and stopping
    def say(self, text):
        """Prints a line, from rank 0 alone, below the updating one if there is one."""
        if self.first:
            print(f"\r{' ' * self.line}\r" * (self.line > 0) + text, flush=True)
            self.line = 0

    def start_clock(self, step):
        """Begins a phase at `step`: the progress counts its time from here."""
        self.phase_step, self.phase_at, self.row_at = step, time.time(), time.time()

    def speed(self, tokens):
        """Tokens a second since the last call, evaluations left out of neither side."""
        now = time.time()
        speed, self.row_at = tokens / max(now - self.row_at, 1e-9), now
        return speed

    def show(self, row, steps):
        """The progress: one updating line on a terminal, elsewhere a plain line now and then."""
        step, spent = row["step"], time.time() - self.phase_at
        minutes, seconds = divmod(int(spent * (steps - step) / max(1, step - self.phase_step)), 60)
        loss = "    -" if row["proxy"] is None else f"{row['proxy']:.3f}"
        text = (f"{row['arm']:>12} {step:>{len(str(steps))}}/{steps}  loss {loss}  "
                f"gold {row['gold_nats']:.3f} ({row['gold_bpb']:.3f} bits/byte)  "
                f"{row['tok_per_s']:,.0f} tokens/s  {minutes}:{seconds:02d} left")
        if self.first and sys.stdout.isatty():
            print("\r" + text.ljust(self.line), end="", flush=True)
            self.line = len(text)
        elif self.first and (step in (0, steps) or time.time() - self.shown_at > 5):
            print(text, flush=True)
            self.shown_at = time.time()

    def _on_signal(self, number, frame):
        if self.stop_signal:  # asked twice: at once
            raise KeyboardInterrupt
        self.stop_signal = number

    def stopping(self, step):
        """Whether to end after this step. All ranks agree: they ask each other at the evaluations."""
        if self.ranks > 1 and step % self.settings["eval_interval"]:
            return False
        if self.ranks > 1:
            flag = torch.tensor([self.stop_signal], device=self.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            self.stop_signal = int(flag.item())
        return self.stop_signal > 0

    def stop(self):
        """Ends a run that was asked to stop, after its checkpoint is written."""
        self.say(f"stopped by {signal.Signals(self.stop_signal).name}; "
                 f"go on with: python {self.script.name} --resume={self.out_dir}")
        self.close()
        raise SystemExit(128 + self.stop_signal)

    def stop_not_finite(self, arm, step):
        """Ends a run whose loss is NaN or infinite; the checkpoint before it stays."""
        self.say(f"error: the loss of {arm} is not finite before step {step}; try a learning_rate below "
                 f"{self.settings['learning_rate']}. The last good checkpoint is {self.out_dir / 'ckpt.pt'}")
        self.close()
        raise SystemExit(3)

    def close(self):
        if self.wandb:
            self.wandb.finish()
        for f in filter(None, (self.log_file, self.samples_file, self.texts_file, self.lock)):
            f.close()
        if self.ranks > 1:
            dist.barrier()
            time.sleep(0.5)  # gloo's threads still hold the last tensors; an interpreter that ends now aborts
            dist.destroy_process_group()


def read_checkpoint(folder, stage, device="cpu", name="ckpt.pt"):
    """The checkpoint in `folder`, a dict; refuses what is missing, half written or another stage's."""
    path = Path(folder) / name
    if not path.is_file():
        refuse(f"{folder} holds no {name}; name the folder of a run, such as out/{stage}")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises many kinds: zip, pickle, runtime, end of file
        refuse(f"{path} cannot be read as a checkpoint ({type(error).__name__}): damaged or half written")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        refuse(f"{path} is no checkpoint of this project")
    if state["stage"] != stage:
        refuse(f"{path} is a checkpoint of {state['stage']}.py, and one of {stage}.py is needed here")
    return state


def read_end(folder, arm, stage, device="cpu"):
    """What `keep_end` wrote of an arm: dict(format, stage, arm, weights). One that is missing is refused."""
    ends = sorted(path.stem for path in (Path(folder) / "ends").glob("*.pt"))
    if arm not in ends:
        refuse(f"{folder} holds no end of arm {arm!r}; it holds {', '.join(ends) or 'none of any arm'}")
    return read_checkpoint(folder, stage, device, f"ends/{arm}.pt")


def read_finished(setting, folder, stage, device, corpus, alike):
    """The checkpoint that a setting names: past its meta phase, and alike in corpus and settings, a dict."""
    other = read_checkpoint(folder, stage, device)
    if other["meta"] is None or other["snapshot"] is None:
        refuse(f"{setting}={folder!r} has not finished its meta phase")
    if other["corpus"] != corpus:
        refuse(f"{setting}={folder!r} was begun with another corpus or tokenizer")
    for name, value in alike.items():
        if other["config"].get(name, value) != value:
            refuse(f"{name}={value!r} differs from {other['config'][name]!r}, that of {setting}={folder!r}")
    return other


def read_meta_phase(folder, stage, device, settings, self_phase, corpus):
    """(meta, snapshot) of the run in `folder`, to start arms from.

    self_phase: names of the settings that a meta phase does not read. corpus: its identity, see `corpus_id`.
    """
    alike = {name: value for name, value in settings.items() if name not in self_phase}
    other = read_finished("start", folder, stage, device, corpus, alike)
    return other["meta"], other["snapshot"]


def read_bottleneck(folder, device, corpus, **alike):
    """The settings, and as "weights" the model, of a finished meta phase of gist_bottleneck.py."""
    other = read_finished("critic_from", folder, "gist_bottleneck", device, corpus, alike)
    return dict(other["config"], weights=other["snapshot"]["learner"])


def open_run(scope):
    """The Run of a script's settings (its globals), overridden and checked. Nothing is written yet.

    With `resume`, the settings of the resumed run stand; a different one on the command line is refused.
    """
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # so that no locale ends a run at a letter that it lacks
    settings, given = configure(scope)
    stage, folder = Path(scope["__file__"]).stem, settings["resume"]
    if folder:
        settings = keep_saved(settings, given, read_checkpoint(folder, stage)["config"], folder)
        scope.update(settings)
    check_common(settings)
    run = Run(stage, settings, scope)
    if folder:
        run.resumed = read_checkpoint(folder, stage, run.device)
    run.say("  ".join(f"{k}={v}" for k, v in settings.items() if v != ""))
    return run
