"""A study that is killed goes on where it was."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROGRAM = """
import sys, study
from pathlib import Path
study.OUT = Path(sys.argv[1])
small = "--self_steps=4 --n_embd=32 --n_head=2 --block_size=16 --batch_size=4 --eval_windows=4 --arms=real --device=cpu"
study.STUDIES = {"tiny": ("self_ce.py", {"first": small + " --meta_steps=60 --save_interval=10",
                 "second": small + " --meta_steps=60 --save_interval=10 --start={out}/study-tiny/first/{seed}"}, (1, 2))}
sys.argv = ["study.py", "tiny"]
study.main()
"""


def test_a_study_killed_by_sigkill_continues_and_repeats_nothing(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    first = tmp_path / "study-tiny" / "first" / "1"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    while not (first / "ckpt.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # the study and the runs under way
    process.wait()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("min left") == 4, done.stdout + done.stderr
    assert "go on with" not in done.stdout and len(list(tmp_path.glob("study-tiny/*/*/summary.json"))) == 4
    assert not list(tmp_path.glob("study-tiny/*/*-1")), "a run was begun anew instead of resumed"
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and again.stdout == ""


def test_a_study_says_which_run_it_needs_first(tmp_path):
    program = PROGRAM.replace('"first": small + " --meta_steps=60 --save_interval=10",', "")
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "study-tiny/second/1 needs study-tiny/first/1 first" in done.stdout
