"""
A configured run: device, ranks and their averages, run folder, checkpoints, log, progress.

It leaves in out_dir: config.json, log.jsonl, samples.txt, summary.json, curves.png, checkpoints (see
checkpoints.py), hacks/ (a report of each hack and each alarm), sources/ (the script that ran, and the modules
of the project that it imported).
"""
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from checkpoints import FORMAT, Writer, copied, read_checkpoint, write_whole
from configurator import check_common, configure, keep_saved, refuse
from locks import lock

GROWING = ("log.jsonl", "samples.txt")  # resuming cuts them to their length at the checkpoint
# Dense bfloat16 arithmetic of GPUs, FLOPs a second, by NVIDIA's data sheets: what `mfu` is a share of.
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


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
        if settings["batch_size"] % (self.ranks * settings["grad_accum"]):
            refuse(f"batch_size={settings['batch_size']} must be a multiple of the {self.ranks} ranks times "
                   f"grad_accum={settings['grad_accum']}")
        if settings["eval_windows"] % self.ranks:
            refuse(f"eval_windows={settings['eval_windows']} must be a multiple of the {self.ranks} ranks")
        self.device, reason = choose_device(settings["device"], settings["dtype"], self.local_rank)
        self.dtype = getattr(torch, settings["dtype"])
        self.weight_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.out_dir, self.resumed = Path(settings["out_dir"]), None
        self.log_file = self.samples_file = self.lock = self.wandb = self.writer = None
        self.stop_signal, self.shown_at, self.line = 0, 0.0, 0
        self.peak, self.flops = None, 0  # of the GPU a second; of this rank's step
        if self.device.type == "cuda":
            if self.local_rank >= torch.cuda.device_count():
                refuse(f"nproc_per_node is above the {torch.cuda.device_count()} GPUs of this machine")
            torch.cuda.set_device(self.device)
            name = torch.cuda.get_device_name(self.device)
            self.peak = next((peak for key, peak in PEAK.items() if key in name), None)
            torch.set_float32_matmul_precision("high")
        if self.ranks > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.say(f"{stage}: {self.device} ({reason}), {settings['dtype']}, rank 0 of {self.ranks}, "
                 f"{torch.get_num_threads()} threads, torch {torch.__version__}")

    @property
    def command(self):
        """The command that goes on with the run."""
        launch = "torchrun --nproc_per_node=" + os.environ.get("LOCAL_WORLD_SIZE", "1")
        return shlex.join((*(launch.split() if self.ranks > 1 else ["python"]), str(self.script),
                           f"--resume={self.out_dir}"))

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

    def room_for(self, size):
        """The device on which `size` bytes are kept that are seldom used: the CPU if a GPU would be short."""
        short = self.device.type == "cuda" and size > torch.cuda.mem_get_info(self.device)[0] / 4
        return torch.device("cpu") if short else self.device

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
                self.log_file, self.samples_file = (
                    open(self.out_dir / name, "a", encoding="utf-8") for name in GROWING)
                self.writer = Writer(self.out_dir)
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
            lock(self.lock, wait=False)
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
        try:
            write_whole(self.out_dir / name, write)
        except OSError as error:
            refuse(f"{self.out_dir / name} could not be written ({error}); once it can: "
                   f"--resume={self.out_dir}")

    def write_json(self, name, value):
        if self.first:
            self.write(name, lambda f: f.write((json.dumps(value, indent=1) + "\n").encode("utf-8")))

    def saves(self, step):
        """Whether a checkpoint is due at a step: each save_interval steps, and where the run is to stop."""
        return self.stopping(step) or step % self.settings["save_interval"] == 0

    def is_finite(self, gold, arm, step):
        """True, or the end of a run whose gold, (nats a token, bits a byte), is not finite."""
        return math.isfinite(gold[0]) or self.stop_not_finite("gold", arm, step)

    def checkpoint(self, step, at, tally, parts, last=False):
        """Writes ckpt.pt, unless the one before is still being written, and stops if asked to.

        at: dict of plain values and tensors, where the run stands. tally: dict of tensors, what the next row
        averages. parts: {name: module, optimizer or watch}. That is everything: data and random numbers are
        pure functions of the step, so that a resumed run repeats one without interruption, on the CPU bit for
        bit, on a GPU as far as its kernels repeat themselves.
        """
        self.average(list(tally.values()))
        weights = [p for part in parts.values() if isinstance(part, torch.nn.Module) for p in part.parameters()]
        if not all(torch.isfinite(t).all() for t in (*weights, *tally.values())):
            self.stop_not_finite("a weight or the loss", at["arm"], step)
        at["step"] = step
        if self.first and (last or self.stop_signal or self.writer.due()):
            files = {n: (self.out_dir / n).stat().st_size for n in GROWING}
            saved = {name: part.state_dict() for name, part in parts.items()}
            self.writer.write(dict(at, tally=tally, format=FORMAT, stage=self.stage, config=self.settings,
                                   files=files, reports=self.last_report(), **saved))
        if self.stop_signal:
            self.stop()

    def restore(self, at, tally, parts):
        """Puts the checkpoint back into what `checkpoint` was given; of `parts` into those that it holds."""
        at.update({name: copied(self.resumed[name], self.device) for name in at})
        tally.update(copied(self.resumed["tally"], self.device))
        for name, part in parts.items():
            if name in self.resumed:
                part.load_state_dict(self.resumed[name])
        self.resumed = {name: self.resumed[name] for name in ("files", "reports")}  # the rest is freed

    def keep_end(self, arm, learner):
        """Writes the weights of an arm's end to ends/<arm>.pt; `checkpoints.read_end` reads them."""
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
            self.stop_not_finite("what is logged", row["arm"], row["step"])
        rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
        self._append(self.log_file, json.dumps(rounded) + "\n")
        if self.wandb:
            self.wandb.log({f"{row['arm']}/{k}": v for k, v in row.items() if isinstance(v, (int, float))})

    def sample(self, text):
        """Appends text to samples.txt."""
        self._append(self.samples_file, text)

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

    def finish(self, summary, draw):
        """Writes summary.json and the picture that draw([folder]) makes, shows both to wandb, and ends."""
        self.write_json("summary.json", summary)
        picture = None
        if self.first:
            try:
                picture, _ = draw([self.out_dir])
                self.say(f"drawn in {picture}")
            except Exception as error:  # the run is done and written: a picture may not undo that
                self.say(f"no picture was drawn ({type(error).__name__}); try python plot.py {self.out_dir}")
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

    @contextmanager
    def counted(self, first):
        """Counts the FLOPs of this rank's step if it is the `first` after an evaluation and `mfu` needs them."""
        if not (first and self.peak):
            yield
            return
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            yield
        self.flops = counter.get_total_flops()

    def use_of_machine(self, steps_per_s):
        """{"mfu": the arithmetic of this rank's steps as a share of the peak of its GPU, "peak_gb": the most
        memory that this process held, GB}; None where it cannot be told."""
        mfu = self.flops * steps_per_s / self.peak if self.peak and self.flops else None
        if self.device.type == "cuda":
            return dict(mfu=mfu, peak_gb=torch.cuda.max_memory_allocated(self.device) / 1e9)
        try:
            import resource  # Linux and Mac have it
        except ImportError:
            return dict(mfu=mfu, peak_gb=None)
        unit = 1 if sys.platform == "darwin" else 1024
        return dict(mfu=mfu, peak_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9)

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
        self.say(f"stopped by {signal.Signals(self.stop_signal).name}; go on with: {self.command}")
        self.close()
        raise SystemExit(128 + self.stop_signal)

    def stop_not_finite(self, what, arm, step):
        """Ends a run in which something is NaN or infinite; the checkpoint before it stays."""
        self.say(f"error: {what} is not finite at step {step} of {arm}; go on from the last checkpoint at a "
                 f"learning_rate below {self.settings['learning_rate']}:\n  {self.command} --learning_rate=...")
        self.close()
        raise SystemExit(3)

    def close(self):
        if self.writer:
            self.writer.wait()
        if self.wandb:
            self.wandb.finish()
        for f in filter(None, (self.log_file, self.samples_file, self.lock)):
            f.close()
        if self.ranks > 1:
            dist.barrier()
            time.sleep(0.5)  # gloo's threads still hold the last tensors; an interpreter that ends now aborts
            dist.destroy_process_group()


def open_run(scope):
    """The Run of a script's settings (its globals), overridden and checked. Nothing is written yet.

    With `resume`, the settings of the resumed run stand; a different one on the command line is refused.
    """
    settings, given = configure(scope)
    stage, folder = Path(scope["__file__"]).stem, settings["resume"]
    if folder:
        resumed = read_checkpoint(folder, stage)
        settings = keep_saved(settings, given, resumed["config"], folder)
        scope.update(settings)
    check_common(settings)
    run = Run(stage, settings, scope)
    if folder:
        run.resumed = resumed
    run.say("  ".join(f"{k}={v}" for k, v in settings.items() if v != ""))
    return run
