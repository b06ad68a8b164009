"""
Many runs of one script, two at a time, that go on where they were when started again.

    python study.py 1            # stage 1: the grid behind the README's table, about MINUTES on two cores
    python study.py 1 --list     # what it would run, and what is done

Each run is a process of its own with one thread, in out/study-1/<name>/seed-<n>. A finished run has a summary.json and
is not run again; one that was interrupted is resumed from its checkpoint.
"""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from configurator import refuse

AT_ONCE = 2
ROOT = Path(__file__).resolve().parent

# study: (script, {name of a point: settings that differ from the script's}, seeds)
STUDIES = {
    "hunt": ("self_ce.py", {
        # Where is the frozen critic hacked after hundreds of steps, as earlier work saw at 750?
        **{f"accuracy-{m}": f"--vocab=4096 --meta_steps={m} --self_steps=1200 --arms=real,frozen --eval_interval=20"
           for m in (450, 500, 550, 600)},
        **{f"repeated-{n}": f"--train_tokens={n} --meta_steps={m} --self_steps=3000 --arms=real,frozen --eval_interval=20"
           for n, m in ((5000, 500), (30000, 500))},
        "repeated-4096": "--vocab=4096 --train_tokens=30000 --meta_steps=550 --self_steps=1200 --arms=real,frozen --eval_interval=20",
        "next": "--loss_reads=next --self_steps=2000 --arms=real,frozen,ema,self --eval_interval=20",
        "next-soft": "--loss_reads=next --target=soft --self_steps=2000 --arms=real,frozen,self --eval_interval=20",
        "slow": "--vocab=4096 --block_size=42 --learning_rate=1e-4 --meta_steps=1000 --self_steps=1200 --arms=real,frozen,self --eval_interval=20",
    }, (1,)),
}


def jobs(study):
    """(folder, command) of each run of a study, the seeds outermost: an interrupted study has whole grids."""
    script, points, seeds = STUDIES[study]
    for seed in seeds:
        for name, settings in points.items():
            folder = Path("out") / f"study-{study}" / name / f"seed-{seed}"
            command = [sys.executable, ROOT / script, f"--seed={seed}", f"--out_dir={folder}", *settings.split()]
            if (folder / "ckpt.pt").exists():
                command = [sys.executable, ROOT / script, f"--resume={folder}"]
            yield folder, command


def launch(folder, command):
    log = ROOT / folder.parent / f"{folder.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as f:
        return subprocess.Popen(command, stdout=f, stderr=f, cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"))


def run_all(todo):
    """Runs (folder, command) pairs, AT_ONCE at a time; returns the folders whose run failed."""
    began, done, running, failed = time.time(), 0, {}, []
    total, todo = len(todo), list(todo)
    try:
        while todo or running:
            while todo and len(running) < AT_ONCE:
                folder, command = todo.pop(0)
                running[folder] = launch(folder, command)
            time.sleep(0.5)
            for folder, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[folder]
                done += 1
                left = (time.time() - began) / done * (total - done)
                note = "" if process.returncode == 0 else f"  FAILED, see {folder.parent / folder.name}.txt"
                failed += [folder] if process.returncode else []
                print(f"{done}/{total}  {folder}{note}  {left / 60:.0f} min left", flush=True)
    finally:
        for process in running.values():
            process.terminate()
            process.wait()
    return failed


def main():
    signal.signal(signal.SIGTERM, lambda *a: sys.exit(143))  # so that the runs under way are stopped too
    study = sys.argv[1] if len(sys.argv) > 1 else ""
    if study not in STUDIES:
        refuse(f"there is no study {study!r}; the studies are {', '.join(STUDIES)}")
    todo = [(f, c) for f, c in jobs(study) if not (ROOT / f / "summary.json").exists()]
    if "--list" in sys.argv:
        for folder, _ in jobs(study):
            print(folder, "" if (folder, _) in todo else "done")
        return
    if run_all(todo):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
