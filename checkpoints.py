"""
Checkpoints: written whole or not at all, by a thread while the run goes on; read once, and checked.

    ckpt.pt           the newest: all that it takes to go on, of finite numbers alone
    ckpt-before.pt    the one before it
    ends/<arm>.pt     the end of an arm: the learner's weights, and what the arm needs to go on
"""
import os
import shlex
import threading
import time
import zipfile
from pathlib import Path

import torch

from configurator import refuse

FORMAT = "metalearn-4"
NEWEST, BEFORE = "ckpt.pt", "ckpt-before.pt"
SHARE = 0.05  # of the time, at most, in which a checkpoint that takes long is being written


def copied(state, where):
    """A copy of nested dicts and lists whose tensors are on the device `where`, and share no memory."""
    if isinstance(state, torch.Tensor):
        return state.detach().to(where, copy=True)
    if isinstance(state, dict):
        return {name: copied(value, where) for name, value in state.items()}
    return [copied(value, where) for value in state] if isinstance(state, list) else state


def write_whole(path, write, before=None):
    """Writes a file by `write(file)`, whole or not at all; what it was stays as `before` if that is named.

    Raises OSError where it cannot.
    """
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        if before and path.exists():
            os.replace(path, before)
        os.replace(tmp, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        tmp.unlink(missing_ok=True)
        raise error if isinstance(error, OSError) else OSError(*error.args) from error


def cannot_write(path, folder, error):
    """Refuses to go on with the run in `folder`, and names the way on."""
    there = any((folder / name).exists() for name in (NEWEST, BEFORE))
    way = f"--resume={shlex.quote(str(folder))}" if there else "give the same command again"
    refuse(f"{path} could not be written ({error}); once it can: {way}")


class Writer:
    """Writes the checkpoints of a folder, one at a time; a run waits for one no longer than a copy takes."""

    def __init__(self, folder):
        self.folder, self.thread, self.error, self.took, self.ended = folder, None, None, 0.0, 0.0

    def due(self):
        """Whether another is to be written: the last is on the disk, and not too much time goes into it."""
        if self.thread and self.thread.is_alive():
            return False
        return self.took < 1 or time.monotonic() - self.ended > self.took / SHARE

    def write(self, state):
        """Begins to write a copy of `state`, a dict of plain values, tensors and dicts."""
        self.wait()
        self.thread = threading.Thread(target=self._write, args=(copied(state, "cpu"),))
        self.thread.start()

    def _write(self, state):
        began, newest = time.monotonic(), self.folder / NEWEST
        try:
            write_whole(newest, lambda f: torch.save(state, f), self.folder / BEFORE)
        except Exception as error:  # of whatever kind: the run must hear of it
            self.error = error
        self.ended = time.monotonic()
        self.took = self.ended - began

    def wait(self):
        """Waits for the one that is being written; refuses to go on if it could not be."""
        if self.thread:
            self.thread.join()
        if self.error:
            cannot_write(self.folder / NEWEST, self.folder, self.error)


def load(path):
    """What torch.save wrote into a file, on the CPU; ValueError if a byte of it has changed.

    The tensors lie in the file, and are read where they are used.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # torch.load does not look at the sums that stand beside what it reads
                raise zipfile.BadZipFile
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except UnicodeEncodeError:  # a locale of ASCII, other letters in the path: torch maps no such file
            with open(path, "rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle, runtime, end of file: each reader has its own kinds
        raise ValueError(type(error).__name__) from error


def read_checkpoint(folder, stage, name=NEWEST):
    """The checkpoint in `folder`, a dict; refuses what is missing, damaged or another stage's."""
    path, before = Path(folder) / name, Path(folder) / BEFORE
    if name == NEWEST and os.path.isfile(before) and not os.path.exists(path):  # killed between two renamings
        path = before
    if not os.path.isfile(path):
        refuse(f"{folder} holds no {name}; name the folder of a run, such as out/{stage}")
    try:
        state = load(path)
    except ValueError as error:
        refuse(f"{path} is damaged or half written ({error})"
               + (whole_before(path, before) if name == NEWEST else ""))
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        refuse(f"{path} is no checkpoint of this project, or of an earlier format than {FORMAT}")
    if state["stage"] != stage:
        refuse(f"{path} is a checkpoint of {state['stage']}.py, and one of {stage}.py is needed here")
    for weights in (state.get("learner"), (state.get("snapshot") or {}).get("learner")):
        if isinstance(weights, dict) and "config" in state and not fits(weights, state["config"]):
            refuse(f"{path} holds weights of other sizes than its settings; one of both was altered")
    return state


def fits(weights, config):
    """Whether weights of a GPT, by name, have the sizes of a run's settings."""
    table, blocks = weights["embed.weight"], {name.split(".")[1] for name in weights if name[:6] == "blocks"}
    sizes = len(table) - config.get("n_gist", 0) - 1, table.size(1), len(blocks)
    return sizes == (config["vocab"], config["n_embd"], config["n_layer"])


def whole_before(path, before):
    """ "; the one before it is whole: ...", if it is."""
    try:
        step = load(before)["step"]
    except (ValueError, TypeError, KeyError):
        return ""
    return f";\nthe one before it, of step {step}, is whole: rename {before} to {path.name} to go on"


def run_of(start):
    """(folder, arm or None) that `start` names: a run, or the end of one of its arms, ends/<arm>.pt."""
    path = Path(start)
    return (path.parent.parent, path.stem) if path.suffix == ".pt" else (path, None)


def read_end(folder, arm, stage, steps=None):
    """What `Run.keep_end` wrote of an arm: dict(format, stage, arm, weights, at). A missing one is refused.

    steps: the end after so many, which may be the one before the last.
    """
    ends = sorted(path.stem for path in (Path(folder) / "ends").glob("*.pt"))
    if arm not in ends:
        refuse(f"{folder} holds no end of arm {arm!r}; it holds {', '.join(ends) or 'none of any arm'}")
    for name in (f"ends/{arm}.pt", f"ends/.{arm}.before"):
        end = read_checkpoint(folder, stage, name)
        if steps is None or end["at"]["step"] == steps:
            return end
    refuse(f"{folder}/ends holds no end of arm {arm!r} after {steps} steps")


def read_finished(setting, folder, stage, corpus, alike):
    """The checkpoint that a setting names: past its meta phase, and alike in corpus and settings, a dict."""
    other = read_checkpoint(folder, stage)
    if other["meta"] is None or other["snapshot"] is None:
        refuse(f"{setting}={folder!r} has not finished its meta phase")
    if other["corpus"] != corpus:
        refuse(f"{setting}={folder!r} was begun with another corpus or tokenizer")
    for name, value in alike.items():
        if other["config"].get(name, value) != value:
            refuse(f"{name}={value!r} differs from {other['config'][name]!r}, that of {setting}={folder!r}")
    return other


def read_meta_phase(start, stage, device, settings, self_phase, corpus):
    """(meta, snapshot) of a run, to start arms from; see `run_of`: of an arm's end the learner's weights.

    self_phase: names of the settings that a meta phase does not read. corpus: its identity, see `corpus_id`.
    """
    alike, (folder, arm) = {k: v for k, v in settings.items() if k not in self_phase}, run_of(start)
    other = read_finished("start", str(folder), stage, corpus, alike)
    learner = dict(learner=read_end(folder, arm, stage)["weights"]) if arm else {}
    return other["meta"], copied(other["snapshot"] | learner, device)


def read_bottleneck(folder, device, corpus, **alike):
    """The settings, and as "weights" the model, of a finished meta phase of gist_bottleneck.py."""
    other = read_finished("critic_from", folder, "gist_bottleneck", corpus, alike)
    return dict(other["config"], weights=copied(other["snapshot"]["learner"], device))
