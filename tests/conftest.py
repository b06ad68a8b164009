"""What the tests of the three scripts share: ways to run a script, and to read what it left."""
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from model import GPT, GPTConfig

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small models run faster on one thread, and the processes started here inherit it."""
    before, os.environ["OMP_NUM_THREADS"] = torch.get_num_threads(), "1"
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    del os.environ["OMP_NUM_THREADS"]


def start(script, *arguments, ranks=1):
    """The process of a script, such as "self_ce.py", with these arguments, on so many ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(torchrun if ranks > 1 else []), ROOT / script, *arguments]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(script, *arguments, ranks=1, timeout=120):
    """Runs a script to its end in a process of its own; returns what it printed."""
    process = start(script, *arguments, ranks=ranks)
    output = process.communicate(timeout=timeout)[0]
    assert process.returncode == 0, output
    return output


def in_process(monkeypatch, script, *arguments):
    """Runs a script with fresh globals in this process, which saves the seconds of importing torch."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setattr(signal, "signal", lambda *a: None)
    return runpy.run_path(str(ROOT / script), run_name="__main__")


def log(folder):
    """The rows of a log without what the machine has to do with."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("tok_per_s", "mfu", "peak_gb")} for row in rows]


def summary(folder):
    """summary.json, as a dict, without when and where it was made."""
    return {k: v for k, v in json.loads((folder / "summary.json").read_text()).items() if k != "made"}


def kill_at(process, folder, arm, step):
    """Kills a run as soon as its log has the row of a step of an arm."""
    path = folder / "log.jsonl"
    while process.poll() is None:
        if path.exists() and f'"arm": "{arm}", "step": {step},' in path.read_text():
            process.kill()
            process.communicate()
            return
        time.sleep(0.002)
    raise AssertionError("ended before it was killed: " + process.communicate()[0])


def small_gpt(vocab=13, special=1, layers=2, width=16):
    """A GPT in float64 whose matrices are all random, so that every part of it shows in the logits."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab, special, layers, 2, width)).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model
