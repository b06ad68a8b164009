"""
Where a run computes, whether it can compile there, and what of it a summary tells.
"""
import datetime
import os
import platform
import shutil
import subprocess
import sys

import torch

from configurator import refuse


def choose_device(name, dtype, local_rank):
    """(torch.device, reason) for `name` in "auto" | "cuda" | "mps" | "cpu"; refuses what is not there."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [k for k in has if has[k]]
    if name not in ("auto", *there):
        refuse(f"device={name!r} is not there on this machine, which has {' and '.join(there)}")
    kind, reason = (there[0], "the best there is") if name == "auto" else (name, "asked for")
    if kind == "mps" and dtype == "float64":
        refuse('dtype="float64" does not exist on device "mps"; use --device=cpu or --dtype=float32')
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if kind == "cuda" and ranks > torch.cuda.device_count():
        refuse(f"nproc_per_node={ranks} is above the {torch.cuda.device_count()} GPUs of this machine")
    return torch.device(f"cuda:{local_rank}" if kind == "cuda" else kind), reason


def check_compiler(device):
    """Refuses to compile for a CPU without the compiler that torch.compile looks for."""
    name = os.environ.get("CXX") or dict(darwin="clang++", win32="cl").get(sys.platform, "g++")
    if device.type == "cpu" and not shutil.which(name):
        refuse(f"compile=True needs a C++ compiler, and {name!r} is not there; install it, name it by the "
               "variable CXX, or leave --compile out")


def facts(script, device):
    """When, of what code (the commit of the script's folder, or None), and on what: a dict of texts."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=script.resolve().parent, text=True,
                         capture_output=True) if shutil.which("git") else None
    return dict(date=datetime.datetime.now().isoformat(timespec="seconds"),
                commit=git.stdout.strip() or None if git else None, python=platform.python_version(),
                torch=torch.__version__, machine=f"{platform.system()} {platform.machine()}, {device.type}")
