"""A study that is killed goes on where it was."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from locks import lock

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
    words = command(*arguments, **options)
    return subprocess.run(words, cwd=STUDIES, capture_output=True, text=True, timeout=120)


def test_a_study_killed_by_sigkill_continues_and_repeats_nothing(tmp_path):
    first = tmp_path / "study-tiny" / "first" / "1"
    quiet = dict(stdout=subprocess.DEVNULL, start_new_session=True)
    process = subprocess.Popen(command(tmp_path), cwd=STUDIES, **quiet)
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
    other = run(tmp_path, PROGRAM.replace("--batch_size=4", "--batch_size=8"))
    assert other.returncode == 2 and "was run with batch_size=4, the study says 8" in other.stderr


def test_a_study_says_which_run_it_needs_first(tmp_path):
    done = run(tmp_path, PROGRAM.replace('{"first": small,', "{"))
    assert done.returncode == 1 and "study-tiny/second/1 needs study-tiny/first/1 first" in done.stdout


def test_a_study_that_is_not_there_and_a_second_word_are_refused(tmp_path):
    for words, says in ((["tini"], "did you mean 'tiny'?"), (["tiny", "5"], "'5' is not --list")):
        done = run(tmp_path, words=words)
        assert done.returncode == 2 and says in done.stderr and not list(tmp_path.iterdir())


def test_ranks_say_whether_what_is_gained_early_tells_what_is_gained_late(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDIES))
    import report
    early = dict(zip("abc", (1, 2, 3)))
    gold = lambda point, step: -step * early[point[-1]] * (1 if step > 4 else -1)  # at first the other way
    rows = lambda point: [dict(arm="frozen", step=s, gold_nats=gold(point, s))
                          for s in (0, 1, 4, 15, 60, 250, 500)]
    monkeypatch.setattr(report, "points_of", lambda study, name: "a b c" if name == "plays" else "d")
    monkeypatch.setattr(report, "load", lambda point: {} if point == "d" else {1: (None, rows(point))})
    found = report.ranks()
    assert "| plays | 1 | -1.00 | -1.00 | 1.00 | 1.00 | 1.00 |" in found and "shift" not in found


TABLE = """before
<!-- levers -->
| lever | arm | seeds | recovered |
|---|---|---|---|
| none | `self` | 5 | 0.5 ± 0.1 |
| none | `ema` | 3 | |
<!-- /levers -->
after
"""


def test_a_table_is_replaced_by_one_of_as_many_rows_and_seeds_and_by_no_other(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDIES))
    import report
    row = lambda seeds: ["none", "`self`", seeds, "1.0"]
    new = lambda *seeds: report.table("lever | arm | seeds | recovered", [row(n) for n in seeds])
    for fewer in (new(8), new(5, 2)):
        assert report.put(TABLE, "levers", fewer)[0] == TABLE
    page, _ = report.put(TABLE, "levers", new(5, 3))
    assert page.count("1.0") == 2 and "0.5" not in page and page.endswith("<!-- /levers -->\nafter\n")
    assert report.put(page, "levers", new(5, 3))[0] == page
    assert report.put(page, "law", new(9, 9))[0] == page  # it has no place for it


def test_two_studies_do_not_run_at_once(tmp_path):
    with open(tmp_path / ".study.lock", "w") as file:
        lock(file, wait=False)
        done = run(tmp_path)
    assert done.returncode == 2 and "another study is running" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == [".study.lock"]
