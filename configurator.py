"""
From the command line to a configured run: settings, device, ranks, run folder, log, checkpoints.

A script keeps its settings as globals at its top, one a line with a comment behind it, and calls
`run = configure(globals())`. The comments are the help (`python self_ce.py --help`).

    --name=value on the command line     what happens
    --learning_rate=1                    int where a float is meant: 1.0
    --meta_steps=1e3                     float where an int is meant: 1000, refused unless whole
    --compile=true                       true/false (any case) for a bool; bare --compile is true
    --dataset=a=b.txt                    a string stays the string it is, whatever it contains
    --target=hard                        refused: the comment lists the choices
    --learning_rte=1e-3                  refused: the nearest name is shown

Values are literals and are never executed. `--name value` works as well as `--name=value`.
"""
import ast
import difflib
import fcntl
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import tokenize
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

POSITIVE = ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "eval_interval", "eval_windows",
            "save_interval", "learning_rate", "grad_clip", "vocab")
# What may differ when a run is resumed: how it computes, and which arms it adds; never what it computes.
FREE_ON_RESUME = ("arms", "device", "compile", "wandb_log", "save_interval", "resume", "prompt")


def refuse(message):
    """Bad input ends here: one line or two on stderr (of rank 0 alone) and exit code 2."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# ----------------------------------------------------------------------------------------------
# settings

def read_settings(path):
    """The settings of a script: {name: (group, default, comment, choices)}, in the file's order.

    A setting is an assignment of a literal to a lower-case name above the first function or class, with a
    comment behind it. `# --- title` opens a group. A comment that begins with "a" | "b" lists the choices.
    """
    source = Path(path).read_text()
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokenize.generate_tokens(io.StringIO(source).readline)
                if t.type == tokenize.COMMENT}
    settings, group = {}, ""
    titles = {line: text[4:].strip() for line, text in comments.items() if text.startswith("--- ")}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            break
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
            continue
        name, comment = node.targets[0].id, comments.get(node.lineno)
        if comment is None or not isinstance(node.value, ast.Constant) or not name.islower():
            continue
        group = next((titles[k] for k in sorted(titles, reverse=True) if k < node.lineno), "")
        head = re.match(r'"[^"]*"( \| "[^"]*")+', comment)
        choices = re.findall(r'"([^"]*)"', head.group()) if head else []
        settings[name] = (group, node.value.value, comment, choices)
    return settings


def parse_value(name, text, default, choices):
    """The value that `text` means for a setting whose default is `default`; refuses what does not fit."""
    if isinstance(default, str):
        if choices and text not in choices:
            refuse(f"{name}={text!r} is not one of " + ", ".join(f'"{c}"' for c in choices))
        return text
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            refuse(f"{name}={text} must be true or false")
        return text.lower() == "true"
    kind = "a whole number" if isinstance(default, int) else "a number"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        refuse(f"{name}={text} must be {kind}, as {default}")
    if value < 0:
        refuse(f"{name}={text} must not be negative")
    if isinstance(default, int):
        if value != int(value):
            refuse(f"{name}={text} must be {kind}, as {default}")
        return int(value)
    return float(value)


def parse_arguments(settings, argv):
    """{name: value} of what the command line sets."""
    given, rest = {}, list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            refuse(f"{word!r} is not of the form --name=value (see --help)")
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in settings:
            near = difflib.get_close_matches(name, settings, n=1)
            refuse(f"unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else " (see --help)"))
        _, default, _, choices = settings[name]
        if not equals and rest and not rest[0].startswith("--"):
            text = rest.pop(0)
        elif not equals and isinstance(default, bool):
            text = "true"
        elif not equals:
            refuse(f"{name} needs a value: --{name}=...")
        given[name] = parse_value(name, text, default, choices)
    return given


def print_help(scope, settings):
    """The script's docstring, then each setting with its default and its comment, in the file's groups."""
    print((scope.get("__doc__") or "").strip())
    width = max(len(f"--{name}={default}") for name, (_, default, _, _) in settings.items()) + 2
    last = None
    for name, (group, default, comment, _) in settings.items():
        if group != last:
            print(f"\n{group}")
            last = group
        print("  " + f"--{name}={default}".ljust(width) + comment)


def override(scope, argv=None):
    """Overrides the settings among `scope` (a script's globals) from the command line, in place.

    Returns ({name: value} of all settings, {name: value} of those given). `--help` prints and exits.
    """
    argv = sys.argv[1:] if argv is None else argv
    settings = read_settings(scope["__file__"])
    if "--help" in argv or "-h" in argv:
        print_help(scope, settings)
        raise SystemExit(0)
    given = parse_arguments(settings, argv)
    scope.update(given)
    return {name: scope[name] for name in settings}, given


def check_common(settings):
    """Refuses the impossible sizes that all scripts share."""
    for name in POSITIVE:
        if name in settings and not settings[name] > 0:
            refuse(f"{name}={settings[name]} must be above 0")
    if settings["seed"] >= 2**63:
        refuse(f"seed={settings['seed']} must be below 2**63")
    n_embd, n_head = settings["n_embd"], settings["n_head"]
    if n_embd % n_head or (n_embd // n_head) % 2:
        refuse(f"n_embd={n_embd} must be an even multiple of n_head={n_head} (rotary positions turn pairs of numbers)")


def chosen_arms(text, known):
    """The arms that `text` lists with commas, real first: no hack is to be believed before it. Refuses unknown ones."""
    names = [a for a in text.replace(" ", "").split(",") if a]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            refuse(f"arms={text!r}: there is no arm {name!r}; "
                   + (f"did you mean {near[0]!r}?" if near else f"the arms are {', '.join(known)}"))
    if len(set(names)) < len(names):
        refuse(f"arms={text!r} names an arm twice")
    return sorted(names, key=lambda a: a != "real")


# ----------------------------------------------------------------------------------------------
# device and ranks

def choose_device(name, dtype, local_rank):
    """(torch.device, reason) for `name` in "auto" | "cuda" | "mps" | "cpu"; refuses what is not there."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name != "auto" and not has[name]:
        there = " and ".join(k for k in has if has[k])
        refuse(f"device={name!r} is not there on this machine, which has {there}; --device=auto takes the best")
    reason = "asked for" if name != "auto" else "the best there is"
    name = next(k for k in has if has[k]) if name == "auto" else name
    if name == "mps" and dtype == "float64":
        refuse('dtype="float64" does not exist on device "mps"; use --device=cpu or --dtype=float32')
    return torch.device(f"cuda:{local_rank}" if name == "cuda" else name), reason


def start_ranks():
    """(rank, local_rank, ranks), from the environment that torchrun sets; (0, 0, 1) without it."""
    return tuple(int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))


class Run:
    """One run: where it computes, where it writes, and whether it should stop.

    Attributes: stage (the script's name), settings, device, dtype, rank, ranks, out_dir (Path), and resumed (the
    checkpoint's dict, or None).
    """

    def __init__(self, stage, settings, scope):
        self.stage, self.settings, self.script = stage, settings, Path(scope["__file__"])
        self.rank, self.local_rank, self.ranks = start_ranks()
        self.first = self.rank == 0
        if settings["batch_size"] % self.ranks or settings["eval_windows"] % self.ranks:
            refuse(f"batch_size={settings['batch_size']} and eval_windows={settings['eval_windows']} must both be "
                   f"multiples of the {self.ranks} ranks")
        self.device, reason = choose_device(settings["device"], settings["dtype"], self.local_rank)
        self.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[settings["dtype"]]
        self.out_dir, self.resumed = Path(settings["out_dir"]), None
        self.log_file = self.samples_file = self.lock = self.wandb = None
        self.weight_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.stop_signal, self.shown_at, self.line = 0, 0.0, 0
        if self.device.type == "cuda":
            if self.local_rank >= torch.cuda.device_count():
                refuse(f"nproc_per_node is above the {torch.cuda.device_count()} GPUs of this machine")
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if self.ranks > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.say(f"{stage}: {self.device} ({reason}), {settings['dtype']}, {self.ranks} rank{'s' * (self.ranks > 1)}, "
                 f"{torch.get_num_threads()} threads, torch {torch.__version__}")

    # ---- ranks

    def barrier(self):
        if self.ranks > 1:
            dist.barrier()

    def average(self, tensors):
        """Averages a list of tensors over the ranks, in place, through one flat buffer and one all-reduce."""
        if self.ranks == 1 or not tensors:
            return
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
        """The context of a forward pass: bfloat16 arithmetic over float32 parameters if asked, else nothing."""
        if self.dtype == torch.bfloat16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    # ---- folder, checkpoints, log

    def open(self, need_bytes):
        """Takes the run folder, after every check and before the first step. An earlier run is moved aside.

        need_bytes: what the checkpoints will take on disk; refused now rather than failing halfway.
        """
        if self.first:
            existing = next(p for p in (self.out_dir, *self.out_dir.absolute().parents) if p.exists())
            free = shutil.disk_usage(existing).free
            if free < need_bytes:
                refuse(f"out_dir={str(self.out_dir)!r}: {free / 1e6:.0f} MB are free there and the run needs about "
                       f"{need_bytes / 1e6:.0f} MB; free some or choose another --out_dir")
            if self.settings["wandb_log"] != "no":
                self._start_wandb()
            try:
                if not self.resumed:
                    self._move_aside()
                self.out_dir.mkdir(parents=True, exist_ok=True)
                self._take_lock()
                self._open_files()
            except OSError as error:
                refuse(f"out_dir={str(self.out_dir)!r} cannot be written to ({error.strerror}); choose another")
        self.barrier()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _move_aside(self):
        held = {p.name for p in self.out_dir.iterdir()} - {".lock"} if self.out_dir.exists() else ()
        if not held:
            return
        if "config.json" not in held:
            refuse(f"out_dir={str(self.out_dir)!r} holds files that are no run's; name a new or empty folder")
        self._take_lock()
        n = next(n for n in range(1, 10**6) if not Path(f"{self.out_dir}-{n}").exists())
        os.rename(self.out_dir, f"{self.out_dir}-{n}")
        self.lock.close()
        self.say(f"{self.out_dir} held an earlier run: moved to {self.out_dir}-{n}")

    def _take_lock(self):
        self.lock = open(self.out_dir / ".lock", "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            refuse(f"another run is writing to {self.out_dir}; wait for it or choose another --out_dir")

    def _open_files(self):
        self.write_json("config.json", self.settings)
        if self.resumed:  # what was written after the checkpoint will be written again
            for name, size in self.resumed["files"].items():
                path = self.out_dir / name
                if not path.is_file() or path.stat().st_size < size:
                    refuse(f"{path} is shorter than when {self.out_dir} was saved, or gone: it cannot be gone on with")
                os.truncate(path, size)
            for path in (self.out_dir / "hacks").glob("*.*"):
                if int(path.stem) > self.resumed["reports"]:
                    path.unlink()
        else:
            shutil.copy(self.script, self.out_dir / self.script.name)
        self.log_file = open(self.out_dir / "log.jsonl", "a")
        self.samples_file = open(self.out_dir / "samples.txt", "a")

    def _start_wandb(self):
        import wandb
        try:
            self.wandb = wandb.init(project="metalearn", name=self.out_dir.name, dir=self.out_dir.parent,
                                    config=self.settings, mode=self.settings["wandb_log"])
        except Exception as error:  # no account, no network: wandb has its own kinds for each
            refuse(f"wandb_log={self.settings['wandb_log']!r} could not start ({type(error).__name__}); "
                   "log in with `wandb login` or use --wandb_log=offline")

    def write(self, name, write):
        """Writes out_dir/name by `write(file)`, whole or not at all."""
        path = self.out_dir / name
        tmp = path.with_name(f".{path.name}.tmp")
        try:
            with open(tmp, "wb") as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(tmp, path)
        except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
            tmp.unlink(missing_ok=True)
            refuse(f"{path} could not be written ({error}); the one before it is kept. "
                   f"When there is room: --resume={self.out_dir}")

    def write_json(self, name, value):
        if self.first:
            self.write(name, lambda f: f.write((json.dumps(value, indent=1) + "\n").encode()))

    def checkpoint(self, step, at, tally, **parts):
        """Every save_interval steps, and when asked to stop, writes ckpt.pt; then stops if asked to.

        at: dict of plain values and tensors, where the run stands. tally: dict of tensors, what the next line of the
        log will average. parts: modules and optimizers. With the length of the log so far that is everything: data
        and random numbers are pure functions of the step, so a resumed run repeats an uninterrupted one: on the CPU
        bit for bit, on a GPU as far as its kernels repeat themselves.
        """
        stop = self.stopping(step)
        if step % self.settings["save_interval"] and not stop:
            return
        self.average(list(tally.values()))
        if not all(torch.isfinite(v).all() for v in tally.values()):
            self.stop_not_finite(at["arm"], step)
        at["step"] = step
        if self.first:
            files = {n: (self.out_dir / n).stat().st_size for n in ("log.jsonl", "samples.txt")}
            reports = len(list((self.out_dir / "hacks").glob("*.md")))
            state = dict(at, tally=tally, format="metalearn-1", stage=self.stage, config=self.settings, files=files,
                         reports=reports, **{name: part.state_dict() for name, part in parts.items()})
            self.write("ckpt.pt", lambda f: torch.save(state, f))
        if stop:
            self.stop()

    def restore(self, at, tally, **parts):
        """Puts the checkpoint that `resume` named back into what `checkpoint` was given."""
        at.update({name: self.resumed[name] for name in at})
        tally.update(self.resumed["tally"])
        for name, part in parts.items():
            part.load_state_dict(self.resumed[name])

    def log(self, row):
        """Appends a row to log.jsonl (and wandb). A number in it that is not finite ends the run."""
        if not all(math.isfinite(v) for v in row.values() if isinstance(v, float)):
            self.stop_not_finite(row["arm"], row["step"])
        rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
        self._append(self.log_file, json.dumps(rounded) + "\n")
        if self.wandb:
            self.wandb.log({f"{row['arm']}/{k}": v for k, v in row.items() if isinstance(v, (int, float))})

    def finish(self, summary, draw):
        """Writes summary.json and the picture that `draw` makes of run folders, shows both to wandb; closes the run."""
        self.write_json("summary.json", summary)
        if self.first:
            picture, _ = draw([self.out_dir])
            self.say(f"drawn in {picture}")
        if self.wandb and summary["arms"]:
            import wandb
            columns = [k for k, v in next(iter(summary["arms"].values())).items() if not isinstance(v, list)]
            rows = [[name, *(arm[k] for k in columns)] for name, arm in summary["arms"].items()]
            self.wandb.log({"arms": wandb.Table(columns=["arm", *columns], data=rows),
                            "curves": wandb.Image(str(picture))})
        self.close()

    def sample(self, text):
        """Appends text to samples.txt."""
        self._append(self.samples_file, text)

    def _append(self, file, text):
        if self.first:
            try:
                file.write(text)
                file.flush()
            except OSError as error:
                refuse(f"{file.name} could not be written ({error.strerror}); the last checkpoint is kept. "
                       f"When there is room: --resume={self.out_dir}")

    def arms_to_go(self, names, known):
        """The arms of `names` that are not finished, an interrupted one first; refuses to leave that one out."""
        done, at = (self.resumed["arms"], self.resumed["arm"]) if self.resumed else ({}, "meta")
        if at in known and at not in names:
            refuse(f"arms={self.settings['arms']!r} leaves out {at!r}, in which {self.out_dir} was interrupted; "
                   "name it too")
        return sorted((a for a in names if a not in done), key=lambda a: a != at)

    # ---- what a person sees

    def say(self, text):
        """Prints a line, from rank 0 alone, below the updating one if there is one."""
        if self.first:
            if self.line:
                print(f"\r{' ' * self.line}\r", end="")
                self.line = 0
            print(text, flush=True)

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
        per_step = (time.time() - self.phase_at) / max(1, row["step"] - self.phase_step)
        left = int(per_step * (steps - row["step"]))
        loss = "    -" if row["proxy"] is None else f"{row['proxy']:.3f}"
        text = (f"{row['arm']:>12} {row['step']:>{len(str(steps))}}/{steps}  loss {loss}  "
                f"gold {row['gold_nats']:.3f} ({row['gold_bpb']:.3f} bits/byte)  {row['tok_per_s']:,.0f} tokens/s  "
                f"{left // 60}:{left % 60:02d} left")
        if not self.first:
            return
        if sys.stdout.isatty():
            print("\r" + text.ljust(self.line), end="", flush=True)
            self.line = len(text)
        elif row["step"] in (0, steps) or time.time() - self.shown_at > 5:
            print(text, flush=True)
            self.shown_at = time.time()

    # ---- stopping

    def _on_signal(self, number, frame):
        if self.stop_signal:  # asked twice: at once
            raise KeyboardInterrupt
        self.stop_signal = number

    def stopping(self, step):
        """Whether to end after this step. All ranks agree: they ask each other at the evaluations."""
        if self.ranks == 1:
            return self.stop_signal > 0
        if step % self.settings["eval_interval"]:
            return False
        flag = torch.tensor([self.stop_signal], device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self.stop_signal = int(flag.item())
        return self.stop_signal > 0

    def stop(self):
        """Ends a run that was asked to stop, after its checkpoint is written."""
        self.say(f"stopped by {signal.Signals(self.stop_signal).name}; "
                 f"go on with: python {self.script.name} --resume={self.out_dir}")
        code = 128 + self.stop_signal
        self.close()
        raise SystemExit(code)

    def stop_not_finite(self, arm, step):
        """Ends a run whose loss is NaN or infinite; the checkpoint before it stays."""
        self.say(f"error: the loss of {arm} is not finite within the steps before {step}. The last good checkpoint is "
                 f"{self.out_dir / 'ckpt.pt'}; try a smaller learning_rate (now {self.settings['learning_rate']})")
        self.close()
        raise SystemExit(3)

    def close(self):
        if self.wandb:
            self.wandb.finish()
        for f in (self.log_file, self.samples_file, self.lock):
            if f:
                f.close()
        if self.ranks > 1:
            dist.barrier()
            time.sleep(0.5)  # gloo's threads hold the last tensors for a moment; an interpreter that ends before aborts
            dist.destroy_process_group()


def read_checkpoint(folder, stage, device="cpu"):
    """The checkpoint in `folder`, a dict; refuses what is missing, half written or another stage's."""
    path = Path(folder) / "ckpt.pt"
    if not path.is_file():
        refuse(f"{folder} holds no ckpt.pt; name the folder of a run, such as out/{stage}")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises many kinds: zip, pickle, runtime, end of file
        refuse(f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is damaged or half written")
    if not isinstance(state, dict) or state.get("format") != "metalearn-1":
        refuse(f"{path} is no checkpoint of this project")
    if state["stage"] != stage:
        refuse(f"{path} is a checkpoint of {state['stage']}.py, and one of {stage}.py is needed here")
    return state


def read_meta_phase(folder, stage, device, settings, self_phase, corpus):
    """(meta, snapshot) of the run in `folder`, to start arms from; refuses one whose meta phase would have been another.

    self_phase: names of the settings that a meta phase does not read. corpus: its identity, see `corpus_id`.
    """
    other = read_checkpoint(folder, stage, device)
    if other["meta"] is None:
        refuse(f"start={folder!r} has not finished its meta phase")
    if other["corpus"] != corpus:
        refuse(f"start={folder!r} was begun with another corpus or tokenizer")
    for name, value in settings.items():
        if name not in self_phase and other["config"].get(name, value) != value:
            refuse(f"{name}={value!r} differs from {other['config'][name]!r}, with which {folder} went through its "
                   "meta phase")
    return other["meta"], other["snapshot"]


def read_bottleneck(folder, device, corpus, **alike):
    """The settings, and as "weights" the model, that a finished meta phase of gist_bottleneck.py left in `folder`.

    corpus: its identity, see `corpus_id`. alike: settings that must be the same there. Refuses what is otherwise.
    """
    other = read_checkpoint(folder, "gist_bottleneck", device)
    if other["snapshot"] is None:
        refuse(f"critic_from={folder!r} has not finished its meta phase")
    if other["corpus"] != corpus:
        refuse(f"critic_from={folder!r} was trained on another corpus or tokenizer")
    for name, value in alike.items():
        if other["config"][name] != value:
            refuse(f"{name}={value!r} differs from {other['config'][name]!r}, that of critic_from={folder!r}")
    return dict(other["config"], weights=other["snapshot"]["learner"])


def keep_saved(settings, given, saved, folder):
    """The settings of the run in `folder`, with what was given now where it may differ; refuses where it may not."""
    for name in settings:
        if name in given and name not in FREE_ON_RESUME and given[name] != saved.get(name):
            refuse(f"{name}={given[name]!r} differs from {saved.get(name)!r}, with which {folder} was begun; "
                   "leave it out, or start a new run")
    kept = {name: value if name in given else saved.get(name, value) for name, value in settings.items()}
    return dict(kept, out_dir=folder, resume="")


def configure(scope):
    """Overrides a script's settings (its globals), checks them, and returns the Run. Nothing is written yet.

    With `resume`, the settings of the resumed run stand; a different one on the command line is refused.
    """
    settings, given = override(scope)
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
