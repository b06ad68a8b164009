"""
What a run survives, tried: kills, damage, full disks, wrong uses, divergence, low precision, locales.

    python tests/faults.py            # all of it
    python tests/faults.py --quick    # about a minute

A line for each kind: how often it was tried, survived, lost something (to be 0), and was answered badly (to
be 0): by a traceback, a hang, a message of more than two lines, or by silence where a refusal is due. Linux;
the full disks are of a tmpfs where the user is root, else a limit on the size of files stands in.
"""
import contextlib
import copy
import io
import json
import multiprocessing
import os
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "studies")]
import page
import plot
import prepare_data
import sample
from checkpoints import read_checkpoint, read_end
from configurator import read_settings
from corpus import corpus_id, open_corpus
from run import Run
from tracker import ids_of

COMMON = ("--n_embd=16 --n_head=2 --n_layer=2 --block_size=16 --batch_size=4 --eval_windows=4 "
          "--eval_interval=2 --save_interval=3 --warmup=2 --device=cpu --meta_steps=12 --self_steps=12")
# Of each script a run of seconds, with an arm that is hacked, so that there is a report.
STAGES = {
    "self_ce": f"{COMMON} --arms=real,shuffled --learning_rate=5e-2 --self_rate=4",
    "gist_bottleneck": f"{COMMON} --candidates=4 --arms=real,shuffled --self_learning_rate=0.2",
    "meta_gist": f"{COMMON} --chunk=1 --inner_steps=1 --inner_length=0.05 --outer_batch=8 --pretrain=6 "
                 "--arms=real,shuffled --learning_rate=5e-2 --self_rate=4"}
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.truncate", "os.rmdir"}  # audit events, beside "open"
OF_MACHINE = ("tok_per_s", "mfu", "peak_gb")
# What stands in a JSON file where it should not; None deletes.
VALUES = ([], {}, None, "null", "[]", "{}", "12", -1, 0, True, 1e308, "x" * 5000)
HUGE = "9" * 400

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch._dynamo", "phases", "gists", "equations", "pool", "matplotlib.pyplot",
                                "sample", "page"])


# ---- a script in a process of its own, without the seconds of importing torch

class Answer(NamedTuple):
    code: int | None  # None: it hung
    out: str
    err: str

    def refuses(self):
        """Exit code 2 with a message of one or two lines."""
        return self.code == 2 and self.err.startswith("error: ") and 1 <= len(self.err.splitlines()) <= 2


def child(out, err, script, words, cwd, env, strike):
    for fd, pipe in ((1, out), (2, err)):
        os.dup2(pipe.fileno(), fd)
        pipe.close()
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", 1, closefd=False, errors=errors)
                              for fd, errors in ((1, "strict"), (2, "backslashreplace")))
    os.chdir(cwd)
    os.environ.update(env)
    torch.set_num_threads(1)
    if strike:
        seen = watch_changes(*strike)
    sys.argv = [script, *words]
    script(*words) if callable(script) else runpy.run_path(str(ROOT / script), run_name="__main__")
    if strike:
        print("CHANGES", len(seen))


def watch_changes(folder, at, kind, left):
    """Strikes before the change number `at` of a file in `folder`; returns the list of changes."""
    seen = []

    def hook(event, args):
        opened = event == "open" and isinstance(args[2], int) and args[2] & os.O_ACCMODE
        if (opened or event in CHANGES) and str(args[0]).startswith(folder):
            seen.append(args[0])
            if len(seen) == at:
                strike_now(folder, kind, left)
    sys.addaudithook(hook)
    return seen


def strike_now(folder, kind, left):
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (left, resource.RLIM_INFINITY))
    if kind == "fill":
        ballast = os.open(Path(folder).parent / "ballast", os.O_WRONLY | os.O_CREAT)
        with contextlib.suppress(OSError):
            while True:
                os.write(ballast, bytes(4096))
        os.ftruncate(ballast, max(0, os.lseek(ballast, 0, os.SEEK_END) - left))
        os.close(ballast)


def call(script, *words, cwd="/tmp", env={}, strike=None, timeout=60, kill_after=None):
    """The Answer of a script of the project, or of a function. strike: see `watch_changes`; kill_after:
    seconds."""
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(2)]
    process = CONTEXT.Process(target=child, args=(*(w for _, w in pipes), script, words, cwd, env, strike))
    process.start()
    texts = [[], []]

    def drain(reader, text):
        while data := os.read(reader.fileno(), 65536):
            text.append(data)
    threads = [threading.Thread(target=drain, args=(r, text)) for (r, _), text in zip(pipes, texts)]
    for (_, writer), thread in zip(pipes, threads):
        writer.close()
        thread.start()
    process.join(kill_after or timeout)
    hung = process.is_alive()
    process.kill()
    process.join()
    for thread in threads:
        thread.join()
    out, err = (b"".join(text).decode("utf-8", "replace") for text in texts)
    return Answer(None if hung and not kill_after else process.exitcode, out, err)


# ---- what is counted

class Tally:
    """How often a kind was tried, and what came of it."""

    def __init__(self):
        self.tried = self.survived = self.lost = self.badly = 0
        self.notes = []

    def add(self, what, lost=False, badly=False, told=""):
        self.tried += 1
        self.survived += not (lost or badly)
        self.lost += bool(lost)
        self.badly += bool(badly)
        if lost or badly:
            self.notes.append(f"{'LOST' if lost else 'BADLY'} {what}: {' '.join(str(told).split())[-600:]}")

    def refusal(self, what, answer, untouched=True):
        """Counts an answer that has to be a refusal, before anything is written."""
        self.add(what, lost=not untouched, badly=not answer.refuses(), told=(answer.code, answer.err))


def log(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if k not in OF_MACHINE} for row in rows]


def left_by(folder):
    """What a run left that any other of the same settings must leave too."""
    same = {name: (folder / name).read_bytes() for name in ("samples.txt", "texts.jsonl")}
    hacks = {p.name: "" for p in (folder / "hacks").glob("*") if p.name != "notes.txt"}
    arms = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["arms"]
    return dict(log=log(folder), arms=arms, hacks=hacks, **same)


def differs(folder, whole):
    """Names of what differs from a run without interruption, or the reason why it cannot be told."""
    try:
        found = left_by(folder)
    except (OSError, ValueError) as error:
        return str(error)
    return [name for name in whole if found[name] != whole[name]]


def whole_run(stage, out):
    """(what the run of a stage leaves, how many changes of files it makes, its seconds)."""
    began = time.monotonic()
    words = *STAGES[stage].split(), f"--out_dir={out}"
    answer = call(f"{stage}.py", *words, strike=(str(out), 0, "", 0))
    assert answer.code == 0 and list((out / "hacks").glob("*.md")), answer
    return left_by(out), int(answer.out.rsplit("CHANGES ", 1)[1]), time.monotonic() - began


# ---- kinds

def kills(tally, tmp, rng, n):
    for stage in STAGES:
        whole, changes, seconds = whole_run(stage, tmp / f"{stage}-whole")
        for i in range(n):
            out = tmp / f"{stage}-{i}"
            words, told = [*STAGES[stage].split(), f"--out_dir={out}", "--resume=auto"], []
            for _ in range(rng.integers(1, 3)):
                before = 1 + int(changes * rng.random() ** 2)  # more of them early
                at = dict(strike=(str(out), before, "kill", 0))
                at = at if rng.random() < 0.6 else dict(kill_after=rng.uniform(0, seconds))
                told.append((at, call(f"{stage}.py", *words, **at).code))
                if (out / "config.json").exists():
                    (out / "hacks").mkdir(exist_ok=True)
                    (out / "hacks/notes.txt").write_text("mine")
            held = (out / "hacks/notes.txt").exists()
            last = call(f"{stage}.py", *words)
            wrong = last.code == 0 and differs(out, whole)
            mine = held and not list(tmp.glob(f"{stage}-{i}*/hacks/notes.txt"))
            tally.add(f"{stage} {told}", lost=wrong or mine, badly=last.code != 0, told=(wrong, *last))
            shutil.rmtree(out, ignore_errors=True)


def ranks(tally, tmp, rng, n):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "--max-restarts=3", str(ROOT / "self_ce.py"), *STAGES["self_ce"].split(), "--resume=auto"]
    env = dict(os.environ, OMP_NUM_THREADS="1")

    def run(out):
        return subprocess.Popen([*command, f"--out_dir={out}"], stdout=subprocess.PIPE, env=env,
                                stderr=subprocess.STDOUT, text=True, start_new_session=True)
    began = time.monotonic()
    assert run(tmp / "whole").wait(120) == 0
    whole, seconds = left_by(tmp / "whole"), time.monotonic() - began
    for i in range(n):
        out, printed = tmp / str(i), ""
        process = run(out)
        time.sleep(rng.uniform(0.3 * seconds, seconds))
        if i % 2:  # all of them, then the command again
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process = run(out)
        else:
            found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
            if found.split():
                os.kill(int(rng.choice(found.split())), signal.SIGKILL)
        try:
            printed = process.communicate(timeout=120)[0]
            wrong = process.returncode == 0 and differs(out, whole)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        tally.add(f"ranks {i}", lost=process.returncode == 0 and wrong, badly=process.returncode != 0,
                  told=printed)


def damaged(data, rng):
    """Bytes with one fault: flipped, cut, zeroed, inserted, or taken out."""
    at, size, how = int(rng.integers(len(data))), int(rng.integers(1, 64)), rng.integers(5)
    if how == 0:
        return data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1:]
    return (data[:at], data[:at] + bytes(size) + data[at + size:], data[:at] + rng.bytes(size) + data[at:],
            data[:at] + data[at + size:])[how - 1]


def values(data, rng):
    """A JSON text with a value in the place of another, or a key gone."""
    tree = json.loads(data.splitlines()[0] if data[:1] == b"{" and data.count(b"\n{") else data)
    places = [((), None)]
    for where, _ in places:
        inside = tree
        for key in where:
            inside = inside[key]
        keys = list(inside) if isinstance(inside, dict) else range(min(len(inside), 4)) \
            if isinstance(inside, list) else ()
        places += [((*where, key), None) for key in keys]
    where, value = places[rng.integers(len(places))][0], VALUES[rng.integers(len(VALUES))]
    if not where:
        return json.dumps(value).encode()
    inside = tree
    for key in where[:-1]:
        inside = inside[key]
    if value is None and rng.random() < 0.5 and isinstance(inside, dict):
        del inside[where[-1]]
    else:
        inside[where[-1]] = "HUGE" if rng.random() < 0.1 else value
    return json.dumps(tree).replace('"HUGE"', HUGE).encode() + b"\n"


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def in_words(read):
    """(what `read()` returns, None), or (None, the Answer of one that does not come back)."""
    err = io.StringIO()

    def late(*a):
        raise TimeoutError
    signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())):
            return read(), None
    except SystemExit as stop:
        return None, Answer(stop.code, "", err.getvalue())
    except BaseException as error:
        return None, Answer(1, "", f"{type(error).__name__}: {error}")
    finally:
        signal.alarm(0)


def taken_back(out, state):
    """The growing files as a resumed run finds them."""
    fake = SimpleNamespace(out_dir=out, resumed=state, sources=(0, state["sources"]))
    Run._take_back(fake)
    return [(out / name).read_bytes() for name in state["files"]]


def corpus_of(text, root):
    corpus = open_corpus(str(text), 300, root)
    return [corpus_id(corpus), np.array(corpus.train).tobytes(), np.array(corpus.val).tobytes(),
            corpus.token_bytes.tolist(), [corpus.encoding.decode_bytes([i]) for i in range(300)]]


def tool(make, folder):
    """A tool's main(), as it answers to a folder."""
    sys.argv = ["tool.py", str(folder)]
    return make()


def table():
    """plot.main() without the picture."""
    with mock.patch.object(plot, "draw_runs", lambda folders: (
            Path(), plot.table(plot.group_by_settings([plot.read_run(f) for f in folders])))):
        plot.main()


def mutations(tally, tmp, rng, n):
    """Damage to what is read. `exact`: what is read must be equal; the rest carries no sum, and is refused or
    believed, but for its form."""
    out, text, root = tmp / "run", tmp / "book.txt", tmp / "data"
    text.write_text("".join(f"Line {i} of a böok, {i * i % 97}.\n" for i in range(600)), encoding="utf-8")
    root.mkdir()
    with contextlib.redirect_stdout(io.StringIO()):
        folder = prepare_data.prepare(str(text), 300, root).folder
    whole_run("self_ce", out)
    (out / "wandb.json").write_text('{"group": "run-1234"}')
    state = read_checkpoint(out, "self_ce")
    state = {name: copy.deepcopy(value) for name, value in state.items()}  # the file will be written over
    corpus = lambda: corpus_of(text, root)
    grown = lambda: taken_back(out, state)
    readers = [(out / "ckpt.pt", lambda: read_checkpoint(out, "self_ce"), True, 4),
               (out / "ends/real.pt", lambda: read_end(out, "real", "self_ce"), True, 2),
               *((folder / name, corpus, True, share) for name, share in (
                   ("train.bin", 1), ("val.bin", 1), ("tokenizer.json", 2), ("meta.json", 4))),
               *((out / name, grown, True, 1) for name in ("log.jsonl", "samples.txt", "texts.jsonl")),
               *((out / name, lambda: tool(table, out), False, 2) for name in ("summary.json", "log.jsonl")),
               *((out / name, lambda: tool(page.main, out), False, 0.2)
                 for name in ("summary.json", "config.json", "log.jsonl", "texts.jsonl", "ckpt.pt")),
               *((out / name, lambda: tool(plot.main, out), False, 0.05)
                 for name in ("summary.json", "log.jsonl")),
               (out / "wandb.json", lambda: ids_of(out), False, 0.2),
               (out / "log.jsonl", lambda: sample.read_run(out)[0]["step"], False, 0.5)]
    total = sum(share for *_, share in readers)
    for path, read, exact, share in readers:
        data = path.read_bytes()
        first, error = in_words(read)
        assert error is None, (path, error)
        first = copy.deepcopy(first)
        for i in range(max(1, int(n * share / total))):
            new = values(data, rng) if path.suffix in (".json", ".jsonl") and i % 2 else damaged(data, rng)
            if new == data:
                continue
            path.unlink()  # what is mapped stays as it was
            path.write_bytes(new)
            found, answer = in_words(read)
            lost = exact and answer is None and not equal(found, first)
            tally.add(f"{path.name} {read.__name__}", lost=lost, badly=answer and not answer.refuses(),
                      told=(answer, new[:300] if len(new) < 5000 else ""))
        path.unlink()
        path.write_bytes(data)


@contextlib.contextmanager
def small_disk(tmp):
    """(folder, "fill") of a tmpfs if that can be had, else (folder, "limit")."""
    folder = tmp / "disk"
    folder.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount") and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48m", "none", folder], capture_output=True).returncode
    try:
        yield folder, "fill" if mounted else "limit"
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder])


def full_disks(tally, tmp, rng, n):
    with small_disk(tmp) as (disk, how):
        for stage in STAGES:
            whole, changes, _ = whole_run(stage, tmp / f"{stage}-whole")
            for i in range(n):
                out, kind = disk / stage, how if i % 3 else "limit"
                words = [*STAGES[stage].split(), f"--out_dir={out}", "--resume=auto"]
                at, left = int(rng.integers(1, changes + 1)), int(rng.choice((0, 100, 5000, 100_000)))
                full = call(f"{stage}.py", *words, strike=(str(out), at, kind, left))
                (disk / "ballast").unlink(missing_ok=True)
                named = str(out) in full.err or "out_dir" in full.err
                badly = full.code != 0 and not (full.refuses() and named)
                way = [f"--resume={out}"] if "--resume=" in full.err else words  # as it is told
                last = call(f"{stage}.py", *way) if full.code else full
                wrong = last.code == 0 and differs(out, whole)
                tally.add(f"{stage} {at} {kind} {left}", lost=wrong, badly=badly or last.code != 0,
                          told=(wrong, full, last if full.code else ""))
                for folder in disk.glob("*"):
                    shutil.rmtree(folder)
        text, parts = tmp / "book.txt", (disk / "data", disk / "whole")
        text.write_text("".join(f"Line {i} of a book, {i * i % 97}.\n" for i in range(3000)))
        held = lambda root: {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        call(prepared, text, parts[1])
        for i in range(3 * n):
            at, left = int(rng.integers(1, 20)), int(rng.integers(9999))
            strike = str(parts[0]), at, how if i % 2 else "limit", left
            full = call(prepared, text, parts[0], strike=strike)
            (disk / "ballast").unlink(missing_ok=True)
            last = call(prepared, text, parts[0])
            wrong = last.code == 0 and held(parts[0]) != held(parts[1])
            tally.add(f"prepare_data {strike}", lost=wrong, told=(full, last),
                      badly=last.code != 0 or full.code != 0 and not full.refuses())
            shutil.rmtree(parts[0])


def prepared(text, root):
    prepare_data.prepare(str(text), 300, Path(root))


def things(here):
    """What wrong uses name: a link to itself, a file, an empty folder, texts that are none, FIFOs."""
    (here / "loop").symlink_to("loop")
    (here / "file").write_text("x" * 20)
    (here / "empty").mkdir()
    (here / "latin.txt").write_bytes("käse ".encode("latin-1") * 4000)
    (here / "nul.txt").write_bytes(b"text \0 " * 4000)
    os.mkfifo(here / "fifo.txt")
    (here / "folder").mkdir()
    os.mkfifo(here / "folder/fifo.txt")


def wrong_settings(stage):
    """[words] of a script, each with one setting that cannot be, or that only asks for very much."""
    paths = ("a" * 300, "~nouser/x", "loop", "loop/x", "a\0b", "file", "file/x")
    for name, (_, default, _, choices) in read_settings(ROOT / f"{stage}.py").items():
        wrong = ("x", "nan", "[]", "", "1" + "0" * 18, HUGE)
        if isinstance(default, bool):
            wrong = ("maybe", "2", "")
        elif isinstance(default, str):
            listed = choices or name in ("arms", "controls", "device")
            wrong = ("nosuch", "\udcff") if listed else paths
            wrong += ("empty", "latin.txt", "nul.txt", "fifo.txt", "folder", "") * (name == "dataset")
            wrong += ("empty", "other", "edited", "old") * (name in ("resume", "start", "critic_from"))
            wrong += ("begun",) * (name in ("start", "critic_from"))
        elif isinstance(default, float):
            wrong = ("x", "nan", "1e999", "-1", "[]", "", HUGE)
        yield from ([f"--{name}={value}"] for value in wrong)
    yield from (["--nosuch=1"], ["nosuch"], ["--seed"], ["--=1"], ["--"], ["--resume=empty", "--start=empty"])


PROMPTS = ("", "\udcff", "latin.txt")
FOLDERS = ("nosuch", "empty", "file", "loop", "a" * 300, "a\0b", "begun", "~nouser/x", "\udcff", "broken")
TOOLS = [("sample.py", ["run", f"--prompt={prompt}"]) for prompt in PROMPTS] + [
    (f"{tool}.py", [folder]) for tool in ("sample", "plot", "page", "studies/probe", "studies/verses")
    for folder in FOLDERS if (tool, folder) != ("page", "begun")] + [
    ("sample.py", ["run", "--arm=nosuch"]), ("sample.py", ["run", "--how=full"]), ("sample.py", ["edited"]),
    ("sample.py", ["run", "run"]), ("sample.py", ["run", f"--tokens={HUGE}"]), ("plot.py", ["run", "nosuch"]),
    ("plot.py", ["--nosuch"]), ("page.py", ["--nosuch"]), ("bench.py", ["4"]), ("bench.py", ["--quik"]),
    ("bench.py", ["1", "nosuch"]), ("studies/probe.py", ["gist", "nosuch"]), ("studies/probe.py", ["run"]),
    ("studies/probe.py", ["gist", "gist2"]), ("studies/study.py", ["nosuch"]),
    ("studies/study.py", ["1", "2"]), ("studies/study.py", ["1", "--lst"]), ("studies/report.py", ["nosuch"]),
    ("studies/verses.py", ["gist"]),
    ("studies/classes.py", ["nosuch"]), ("prepare_data.py", ["--vocab=1"]), ("prepare_data.py", ["nosuch"]),
    ("prepare_data.py", [f"--vocab={HUGE}"]), ("prepare_data.py", ["--dataset=fineweb-edu-0M"])]


def wrong_uses(tally, tmp, rng, n):
    runs = tmp / "runs"
    for name, stage in (("run", "self_ce"), ("gist", "gist_bottleneck"), ("meta", "meta_gist")):
        whole_run(stage, runs / name)
    here = tmp / "here"
    cases = [(f"{stage}.py", [*STAGES[stage].split(), "--out_dir=out", *words], stage)
             for stage in STAGES for words in wrong_settings(stage)]
    cases += [(script, words, "self_ce") for script, words in TOOLS]
    for i in rng.permutation(len(cases))[:n]:
        script, words, stage = cases[i]
        here.mkdir()
        things(here)
        if any(word.split("=")[-1] in LENT for word in words):
            lend(runs, here, stage)
        before = {p: p.lstat().st_mtime_ns for p in here.rglob("*") if "__pycache__" not in str(p)}
        answer = call(script, *words, cwd=here, timeout=10)
        after = {p: p.lstat().st_mtime_ns for p in here.rglob("*") if "__pycache__" not in str(p)}
        runs_on = (here / "out/log.jsonl").exists() and answer.code in (None, 0)  # it only asks for much
        if not runs_on:
            tally.refusal(f"{script} {[w[:60] for w in words[-2:]]}", answer, before == after)
        else:
            tally.add(script)
        shutil.rmtree(here)


LENT = "run", "gist", "other", "begun", "edited", "old", "broken"


def lend(runs, here, stage):
    """Copies of runs: as they are; of another stage; of this one with a checkpoint in the meta phase, of
    other sizes, of older code; and with files that hold no run's values."""
    mine = dict(self_ce="run", gist_bottleneck="gist", meta_gist="meta")[stage]
    other = "gist" if mine == "run" else "run"
    for name, of in zip(LENT, ("run", "gist", other, mine, mine, mine, mine)):
        shutil.copytree(runs / of, here / name)
    path = lambda name: here / name / "ckpt.pt"
    state = torch.load(path("edited"), weights_only=True)
    old = {k: v for k, v in state["config"].items() if k != "decay"}
    for name, change in (("begun", dict(snapshot=None, meta=None, arm="meta")), ("old", dict(config=old)),
                         ("edited", dict(config=dict(state["config"], n_embd=32)))):
        torch.save(state | change, path(name))
    (here / "begun/summary.json").unlink()
    for name in ("summary.json", "config.json"):
        (here / "broken" / name).write_text("[]")
    (here / "broken/log.jsonl").write_text('{"a": 1}\n')


RATES = [("learning_rate=1e38",), ("learning_rate=1e3", "grad_clip=1e30")]
OF_STAGE = dict(self_ce=[("self_rate=1e38",)], gist_bottleneck=[("self_learning_rate=1e38",)],
                meta_gist=[("critic_rate=1e30",), ("scalar_rate=1e30",), ("self_rate=1e38",)])


def divergence(tally, tmp, rng, n):
    for stage in STAGES:
        for given in (RATES + OF_STAGE[stage])[:n]:
            out = tmp / f"{stage}-{'-'.join(given)}"
            rates = [f"--{word}" for word in given]
            first = call(f"{stage}.py", *STAGES[stage].split(), *rates, f"--out_dir={out}")
            state = torch.load(out / "ckpt.pt", weights_only=True)
            weights = [t for part in ("learner", "critic") for t in state[part].values()]
            fine = all(torch.isfinite(t).all() for t in weights)
            last = Answer(0, "", "")
            if first.code == 3:
                _, script, *words = shlex.split(first.out.rstrip().splitlines()[-1])
                last = call(script, *(w.replace("=...", "=1e-4") for w in words), timeout=60)
            finite = first.code == 3 or np.isfinite([row["gold_nats"] for row in log(out)]).all()
            tally.add(f"{stage} {given}", lost=not fine or not finite, told=(first, last),
                      badly=first.code not in (0, 3) or last.code != 0 or first.err)


def statistics(tally, tmp, rng, n):
    for stage in STAGES:
        for every in (1, 600):
            out = tmp / f"{stage}-{every}"
            steps = (n, max(6, n // 4)) if every == 1 else (n, n)
            call(f"{stage}.py", *STAGES[stage].split(), "--dtype=bfloat16", f"--eval_interval={every}",
                 "--save_interval=600", f"--meta_steps={steps[0]}", f"--self_steps={steps[1]}",
                 *["--arms=real,frozen", f"--pretrain={n - 6}"][:2 if stage == "meta_gist" else 1],
                 f"--out_dir={out}", "--learning_rate=1e-3", timeout=300)
            vocab = json.loads((out / "config.json").read_text())["vocab"]
            for row in log(out):
                columns = lambda names: [row.get(name) or 0 for name in names.split()]
                shares = columns("agreement echo target_top agreement_probe")
                entropies = columns("target_entropy output_entropy")
                alike = row["arm"] == "real" and stage != "gist_bottleneck"  # it leaves the last token out
                proxy, surprise = columns("proxy surprise") if alike else (0, 0)
                wrong = (max(shares) > 1 or max(entropies) > np.log(vocab) * (1 + 1e-5)
                         or abs(proxy - surprise) > 1e-4 * surprise)
                tally.add(f"{stage} every {every}", lost=wrong, told=row)


LETTERS = "Größe λόγος слово 語 \U0001f600 "
LOCALES = (dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"), dict(PYTHONIOENCODING="latin-1"),
           dict(PYTHONIOENCODING="ascii"))


def locales(tally, tmp, rng, n):
    name = f"book-{os.getpid()}"  # a locale of ASCII has no other names
    text, made = tmp / f"{name}.txt", ROOT / "data" / f"{name}-256"
    text.write_text("".join(f"{LETTERS}{i}.\n" for i in range(600)), encoding="utf-8")
    try:
        for env in LOCALES[:n]:
            env, commands = dict(os.environ, OMP_NUM_THREADS="1", **env), []
            for stage in STAGES:
                out = tmp / f"lauf-ö-{stage}"
                words = [*STAGES[stage].split(), f"--dataset={text}", "--vocab=256", f"--out_dir={out}"]
                commands += [[f"{stage}.py", "--help"], [f"{stage}.py", *words], ["page.py", out],
                             ["plot.py", out], ["sample.py", out, "--prompt=Größe", "--tokens=5"]]
            for script, *words in commands[:5] if n == 1 else commands:
                done = subprocess.run([sys.executable, ROOT / script, *words], env=env, capture_output=True,
                                      timeout=120)
                tally.add(f"{script} {words[-1:]}", badly=done.returncode or done.stderr, told=done)
            for out in tmp.glob("lauf*"):
                samples = (out / "samples.txt").read_text(encoding="utf-8")
                tally.add("samples.txt", lost=not set(samples) & set(LETTERS[4:]), told=samples)
                shutil.rmtree(out)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def no_compiler(tally, tmp, rng, n):
    for stage in STAGES:
        here = tmp / stage
        here.mkdir()
        env = dict(CXX="/nonexistent", PATH="/nonexistent", TORCHINDUCTOR_CACHE_DIR=str(tmp / "cache"))
        words = *STAGES[stage].split(), "--compile=true", "--out_dir=out"
        answer = call(f"{stage}.py", *words, cwd=here, env=env)
        tally.refusal(stage, answer, not list(here.iterdir()))


KINDS = {"kills": (kills, 2, 24), "two ranks": (ranks, 0, 6), "damage": (mutations, 300, 10_000),
         "full disks": (full_disks, 2, 12), "wrong uses": (wrong_uses, 60, 10_000),
         "divergence": (divergence, 1, 9), "bfloat16": (statistics, 30, 600), "locales": (locales, 1, 3),
         "no compiler": (no_compiler, 1, 1)}


def main():
    quick = "--quick" in sys.argv[1:]
    wanted = [word for word in sys.argv[1:] if word != "--quick"] or list(KINDS)
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"{'':<20} {'tried':>7} {'survived':>9} {'lost':>5} {'answered badly':>15} {'seconds':>8}")
    sums, began = np.zeros(4, int), time.monotonic()
    for name in wanted:
        kind, few, many = KINDS[name]
        tally, start = Tally(), time.monotonic()
        with tempfile.TemporaryDirectory() as tmp:
            kind(tally, Path(tmp), np.random.default_rng(1), few if quick else many)
        figures = tally.tried, tally.survived, tally.lost, tally.badly
        show(name, figures, start)
        print(*(f"    {note}" for note in tally.notes[:20]), sep="\n", end="\n" if tally.notes else "")
        sums += figures
    show("sum", sums, began)
    raise SystemExit(int(sums[2] + sums[3] > 0))


def show(name, figures, began):
    tried, survived, lost, badly = figures
    seconds = time.monotonic() - began
    print(f"{name:<20} {tried:>7} {survived:>9} {lost:>5} {badly:>15} {seconds:>8.0f}", flush=True)


if __name__ == "__main__":
    main()
