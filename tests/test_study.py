"""A study that is killed goes on where it was."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

STUDIES = Path(__file__).parent.parent / "studies"
PROGRAM = """
import sys, study
from pathlib import Path
study.OUT = Path(sys.argv.pop(1))
small = ("--self_steps=4 --meta_steps=60 --save_interval=10 --n_embd=32 --n_head=2 --block_size=16 "
         "--batch_size=4 --eval_windows=4 --arms=real --device=cpu")
study.STUDIES = {"tiny": ("self_ce.py", {"first": small,
                                         "second": small + " --start={out}/study-tiny/first/{seed}"}, (1,))}
study.main()
"""


def command(folder, program=PROGRAM, words=("tiny",)):
    """The command line of a study of two points, in a folder."""
    return [sys.executable, "-c", program, str(folder), *words]


def run(*arguments, **options):
    return subprocess.run(command(*arguments, **options), cwd=STUDIES, capture_output=True, text=True, timeout=120)


def test_a_study_killed_by_sigkill_continues_and_repeats_nothing(tmp_path):
    first = tmp_path / "study-tiny" / "first" / "1"
    process = subprocess.Popen(command(tmp_path), cwd=STUDIES, stdout=subprocess.DEVNULL, start_new_session=True)
    while not (first / "ckpt.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # the study and the runs under way
    process.wait()
    done = run(tmp_path)
    assert done.returncode == 0 and done.stdout.count("min left") == 2, done.stdout + done.stderr
    assert "go on with" not in done.stdout and len(list(tmp_path.glob("study-tiny/*/*/summary.json"))) == 2
    assert not list(tmp_path.glob("study-tiny/*/*-1")), "a run was begun anew instead of resumed"
    again = run(tmp_path)
    assert again.returncode == 0 and again.stdout == ""


def test_a_study_says_which_run_it_needs_first(tmp_path):
    done = run(tmp_path, PROGRAM.replace('{"first": small,', "{"))
    assert done.returncode == 1 and "study-tiny/second/1 needs study-tiny/first/1 first" in done.stdout


def test_a_study_that_is_not_there_and_a_second_word_are_refused(tmp_path):
    for words, says in ((["tini"], "did you mean 'tiny'?"), (["tiny", "5"], "'5' is not --list")):
        done = run(tmp_path, words=words)
        assert done.returncode == 2 and says in done.stderr and not list(tmp_path.iterdir())
