"""
Many runs of one script, two at a time, that go on where they were when started again.

    python study.py 1            # stage 1: the grid behind the README's tables
    python study.py 1 --list     # what it would run, and what is done

Each run is a process of its own with one thread, in out/study-1/<name>/<seed>. A finished run has a summary.json and
is not run again; one that was interrupted is resumed from its checkpoint.
"""
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from configurator import refuse

AT_ONCE = 2
ROOT = Path(__file__).resolve().parent
OUT = ROOT / "out"

BASE = "--start={out}/study-1/base/{seed}"  # levers of the self phase share one meta phase a seed
LEVER = "--self_steps=400 --arms=self"
LONG = "--batch_size=2 --meta_steps=1000"
LONG_BASE = "--start={out}/study-1-long/frozen/{seed}"
LAW = "--self_steps=140 --arms=self --eval_interval=2"

GISTS = "--start={out}/study-2/base/{seed} --arms=frozen,random"
SMALL = ("--n_layer=1 --n_head=2 --block_size=16 --batch_size=64 --outer_batch=256 --learning_rate=3e-3 --warmup=10 "
         "--critic_rate=0.2 --self_steps=300 --eval_interval=30 --eval_windows=256")
SYNONYMS = f"--dataset=planted-synonyms --vocab=256 --train_tokens=40000 --pretrain=30 {SMALL}"
SPELLINGS = ("--dataset=plays-spellings --vocab=144 --train_tokens=40000 --n_layer=2 --n_head=2 --block_size=16 "
             "--batch_size=256 --outer_batch=512 --learning_rate=3e-3 --warmup=10 --pretrain=50 --pool_steps=400 "
             "--critic_rate=0.1 --scalar_rate=0.01 --self_steps=300 --eval_interval=30 --eval_windows=256")
BOTTLENECK = "--critic_from={out}/study-2-meaning/critic-256/{seed}"
CHUNKS = "--own=rollout --chunk=4 --n_gist=4"
MEANING = ("--dataset=planted-synonyms --vocab=128 --n_layer=2 --n_embd=64 --block_size=32 --controls= "
           "--eval_windows=256")
LITTLE = (f"{MEANING} --train_tokens=5000 --meta_steps=60 --batch_size=16 --learning_rate=3e-3 --candidates=32 "
          "--every=1 --self_learning_rate=1e-3 --self_steps=200 --eval_interval=20")
SPELLED = "--dataset=plays-spellings --vocab=144"
MUCH = "--n_layer=2 --n_embd=64 --block_size=32 --batch_size=32 --meta_steps=3000 --arms= --controls= --eval_interval=100"
LITTLE_PLAYS = ("--n_layer=2 --n_embd=64 --block_size=32 --controls= --batch_size=16 --learning_rate=3e-3 --every=1 "
                "--self_learning_rate=1e-3 --eval_interval=20 --eval_windows=256 --distance=praise "
                "--arms=real,frozen,forecast,static,random")
READER = "--critic_from={out}/study-2-meaning/critic/{seed}"
SHARE = "--arms= --controls=full,none"

# study: (script, {name of a point: settings that differ from the script's}, seeds)
STUDIES = {
    "1": ("self_ce.py", {
        "base": "",
        # the law: steps to hack against meta steps, rate and vocabulary, read every two steps
        "law-base": f"{BASE} {LAW}",
        "law-meta-250": f"{LAW} --meta_steps=250",
        "law-meta-1000": f"{LAW} --meta_steps=1000",
        "law-meta-2000": f"{LAW} --meta_steps=2000",
        "law-rate-.25": f"{BASE} {LAW} --self_rate=0.25",
        "law-rate-2": f"{BASE} {LAW} --self_rate=2",
        "law-vocab-256": f"{LAW} --vocab=256",
        "law-vocab-1024": f"{LAW} --vocab=1024",
        # levers of the self phase
        "keep-random": f"{BASE} --self_steps=400 --arms=self,ema --keep_meta=0.1",
        "rescue-hacked": f"{BASE} --self_steps=400 --arms=self,ema --rescue_steps=20",
        "rescue-own": f"{BASE} {LEVER} --rescue_steps=20 --rescue_reads=own",
        "anchor": f"{BASE} {LEVER} --anchor=0.3",
        "trust": f"{BASE} {LEVER} --trust=0.001",
        "ema-.99": f"{BASE} --self_steps=400 --arms=ema --ema_decay=0.99",
        "ema-.9999": f"{BASE} --self_steps=400 --arms=ema --ema_decay=0.9999",
        "soft": f"{BASE} --self_steps=400 --arms=self,frozen,ema --target=soft",
        "keep-random+anchor": f"{BASE} {LEVER} --keep_meta=0.1 --anchor=0.3",
        "keep-recorded": f"{BASE} {LEVER} --keep_meta=0.1 --keep=recorded",
        # levers of the meta phase
        "flips": f"{LEVER} --adversarial=0.3 --adversary=flips",
        "random": f"{LEVER} --adversarial=0.3",
        "own-block": f"{LEVER} --critic_part=block",
        "own-head": f"{LEVER} --critic_part=head",
        "order-2": f"{LEVER} --order=2",
        # ensembles, where there is something to disagree about
        "biased": "--meta_steps=300 --self_steps=400 --arms=real,frozen",
        "biased-mean": "--meta_steps=300 --n_critic=3 --self_steps=400 --arms=frozen",
        "biased-weights": "--meta_steps=300 --n_critic=3 --critics=weights --self_steps=400 --arms=frozen",
        "corrupted": f"{LEVER} --adversarial=0.3 --adversary=corrupted",
        "ema-.9999+anchor": f"{BASE} --self_steps=400 --arms=ema --ema_decay=0.9999 --anchor=0.3",
    }, (1, 2, 3, 4, 5)),
    # How long can it go on? 20 times the meta phase, with no real token as a target.
    "1-long": ("self_ce.py", {
        "frozen": f"{LONG} --self_steps=20000 --arms=real,frozen --eval_interval=100 --save_interval=2000",
        "self": f"{LONG} {LONG_BASE} --self_steps=20000 --arms=self --keep_meta=0.1 --eval_interval=100 "
                "--save_interval=2000",
        "sharpen": f"{LONG} {LONG_BASE} --self_steps=1000 --arms=sharpen,self",
    }, (1, 2, 3, 4, 5)),
    # Gists: what they carry, and what a learner recovers from their distance.
    "2": ("gist_bottleneck.py", {
        "base": "--arms=real,frozen,random",
        "energy": f"{GISTS} --distance=energy",
        "plain": f"{GISTS} --distance=plain",
        "rank-16": f"{GISTS} --rank=16",
        "tau-.5": f"{GISTS} --tau=0.5",
        "rank-4": f"{GISTS} --rank=4",
        "span-4": f"{GISTS} --span=4 --path=reinforce --distance=energy",
        "praise": f"{GISTS},forecast --distance=praise",
        "forecast": "--start={out}/study-2/base/{seed} --arms=forecast",
        "forecast-tau-.5": "--start={out}/study-2/base/{seed} --arms=forecast --tau=0.5",
        "forecast-rank-4": "--start={out}/study-2/base/{seed} --arms=forecast --rank=4",
        "share-8": f"{SHARE} --chunk=8",
        "share-16": f"{SHARE} --chunk=16",
        "share-8-long": f"{SHARE} --chunk=8 --meta_steps=2000 --eval_interval=100",
        "share-16-long": f"{SHARE} --chunk=16 --meta_steps=2000 --eval_interval=100",
        "rate-1e-3": "--controls= --arms=real,self,frozen,ema --self_learning_rate=1e-3",
        "rate-1e-3-long": "--start={out}/study-2/rate-1e-3/{seed} --controls= --arms=real,self --self_learning_rate=1e-3 "
                          "--self_steps=1500 --eval_interval=50",
        "order-2": "--start={out}/study-2/base/{seed} --arms=frozen --order=2",
        "share-4-pool": f"{SHARE},pool",
        "long": f"{GISTS},real --self_steps=2500 --eval_interval=100",
        "arms": "--start={out}/study-2/base/{seed} --arms=self,ema,shuffled,sharpen,static",
        "gists-2": "--n_gist=2 --controls= --arms=real,frozen,random",
        "gists-4": "--n_gist=4 --controls= --arms=real,frozen,random",
        "span-2": f"{GISTS} --span=2 --path=reinforce --distance=energy",
        "share-4-spread": f"{SHARE} --n_gist=2 --place=spread",
        "share-4-reconstruct": f"{SHARE} --reconstruct=0.1",
    }, (1, 2, 3, 4, 5)),
    # Where forgetting helps: text full of synonyms, little of it, and a critic that has read more.
    "2-meaning": ("gist_bottleneck.py", {
        "critic": f"{MEANING} --meta_steps=2500 --batch_size=32 --learning_rate=6e-3 --arms= --eval_interval=100",
        "praise": f"{LITTLE} {READER} --distance=praise --arms=real,frozen,forecast,static,random",
        "rank-8": f"{LITTLE} {READER} --start={{out}}/study-2-meaning/praise/{{seed}} --distance=praise --rank=8 "
                  "--arms=forecast,frozen,random",
        "logscore": f"{LITTLE} {READER} --start={{out}}/study-2-meaning/praise/{{seed}} --arms=frozen,forecast,random",
        # what is left of it where spellings are noise and the text is real, and on the plays themselves
        "spellings-critic": f"{SPELLED} {MUCH}",
        "spellings": f"{SPELLED} --train_tokens=20000 --meta_steps=100 --candidates=100 --self_steps=160 {LITTLE_PLAYS} "
                     "--critic_from={out}/study-2-meaning/spellings-critic/{seed}",
        "plays-critic": MUCH,
        "plays": f"--train_tokens=40000 --meta_steps=150 --candidates=32 --self_steps=300 {LITTLE_PLAYS} "
                 "--critic_from={out}/study-2-meaning/plays-critic/{seed}",
        # for study 3: a bottleneck on the text of `synonyms`
        "critic-256": "--dataset=planted-synonyms --vocab=256 --train_tokens=40000 --n_layer=2 --n_head=2 --n_embd=64 "
                      "--block_size=32 --batch_size=32 --meta_steps=1000 --arms= --controls= --eval_interval=100",
        "own": f"{LITTLE} --start={{out}}/study-2-meaning/praise/{{seed}} --distance=praise --arms=frozen,forecast",
    }, (1, 2, 3, 4, 5)),
    # Second order: a critic that starts broad and random, and the same left so, or sharpened by hand.
    "3": ("meta_gist.py", {
        "base": "",
        "synonyms": f"{SYNONYMS} --meta_steps=430 --arms=real,frozen,self,ema,shuffled",
        "synonyms-by-hand": f"{SYNONYMS} --meta_steps=30 --kappa=7 --arms=real,frozen",
        "chunk-4": f"{CHUNKS} --arms=real,first,frozen",
        "chunk-4-by-hand": f"{CHUNKS} --meta_steps=400 --kappa=7 --arms=real,first,frozen",
        "synonyms-10000": f"{SYNONYMS} --meta_steps=430 --arms=real,frozen --train_tokens=10000",
        "synonyms-10000-by-hand": f"{SYNONYMS} --meta_steps=30 --kappa=7 --arms=real,frozen --train_tokens=10000",
        "spellings": f"{SPELLINGS} --meta_steps=1550 --arms=real,frozen,shuffled",
        "spellings-by-hand": f"{SPELLINGS} --meta_steps=50 --kappa=7 --arms=real,frozen",
        "spellings-20000": f"{SPELLINGS} --meta_steps=1550 --arms=real,frozen --train_tokens=20000",
        "spellings-20000-by-hand": f"{SPELLINGS} --meta_steps=50 --kappa=7 --arms=real,frozen --train_tokens=20000",
        "untrained": "--meta_steps=400 --arms=real,frozen",
        "by-hand": "--meta_steps=400 --kappa=7 --arms=real,frozen",
        "next": "--val_chunks=next --arms=real,frozen",
        "similar": "--val_chunks=similar --arms=real,frozen",
        "steps-2": "--inner_steps=2 --arms=real,frozen",
        "steps-4": "--inner_steps=4 --arms=real,frozen",
        **{f"facts-{c}": f"--dataset=planted-facts --val_chunks={c} --arms=real,frozen"
           for c in ("random", "next", "similar")},
        "facts-by-hand": "--dataset=planted-facts --meta_steps=400 --kappa=7 --arms=real,frozen",
        "chunk-4-sharp": f"{CHUNKS} --kappa=7 --arms=real,first,frozen",
        # chunks written alone, where own text may mean what the truth does in other words
        "synonyms-chunk": f"{SYNONYMS} {CHUNKS} --meta_steps=430 --arms=real,first,frozen,frozen_first",
        "synonyms-chunk-by-hand": f"{SYNONYMS} {CHUNKS} --meta_steps=30 --kappa=7 --arms=real,first,frozen,frozen_first",
        "synonyms-chunk-samples": f"{SYNONYMS} {CHUNKS} --samples=4 --meta_steps=430 --arms=real,first,frozen,frozen_first",
        "synonyms-chunk-long": f"{SYNONYMS} {CHUNKS} --train_tokens=0 --meta_steps=430 --self_steps=2000 --eval_interval=100 "
                               "--arms=real,first,frozen,frozen_first,self,ema",
        # a critic that begins with the embeddings of a bottleneck on the same text, as it is and by second order
        "synonyms-bottleneck": f"{SYNONYMS} {BOTTLENECK} --meta_steps=30 --kappa=7 --arms=real,frozen",
        "synonyms-bottleneck-meta": f"{SYNONYMS} {BOTTLENECK} --meta_steps=430 --arms=real,frozen",
    }, (1, 2, 3, 4, 5)),
    # Other forms of stage 3, one seed each.
    "3-forms": ("meta_gist.py", {
        "no-zero-mean": "--zero_mean=false --arms=real,frozen",
        "pool-real": "--pool_self=0 --arms=real,frozen",
        "pool-self": "--pool_self=1 --arms=real,frozen",
        "chunk-4-samples": f"{CHUNKS} --samples=4 --arms=real,first,frozen",
        "chunk-4-layer": f"{CHUNKS} --gist_layer=1 --arms=real,first,frozen",
        "chunk-4-own": f"{CHUNKS} --gist_layer=1 --gist_b=own+truth --arms=real,first,frozen",
        "chunk-4-two": "--own=rollout --chunk=4 --n_gist=2 --arms=real,first,frozen",
        "chunk-8": "--own=rollout --chunk=8 --n_gist=8 --arms=real,first,frozen",
    }, (1,)),
    # Where is a frozen critic hacked only after hundreds of steps, as earlier work saw at 750?
    "hunt": ("self_ce.py", {
        **{f"accuracy-{m}": f"--vocab=4096 --meta_steps={m} --self_steps=1200 --arms=real,frozen --eval_interval=20"
           for m in (450, 500, 550, 600)},
        **{f"accuracy-{m}": f"--vocab=4096 --meta_steps={m} --self_steps=1200 --arms=real,frozen --eval_interval=20 "
                            "--eval_windows=32" for m in (700, 800)},
        **{f"repeated-{n}": f"--train_tokens={n} --self_steps=3000 --arms=real,frozen --eval_interval=20"
           for n in (5000, 30000)},
        "repeated-4096": "--vocab=4096 --train_tokens=30000 --meta_steps=550 --self_steps=1200 --arms=real,frozen "
                         "--eval_interval=20",
        "next": "--loss_reads=next --self_steps=2000 --arms=real,frozen,ema,self --eval_interval=20",
        "next-soft": "--loss_reads=next --target=soft --self_steps=2000 --arms=real,frozen,self --eval_interval=20",
        "slow": "--vocab=4096 --block_size=42 --learning_rate=1e-4 --meta_steps=1000 --self_steps=1200 "
                "--arms=real,frozen,self --eval_interval=20",
    }, (1,)),
}


def jobs(study):
    """(folder, command) of each run of a study, all seeds of a point before the next: the first points matter most."""
    script, points, seeds = STUDIES[study]
    for name, settings in points.items():
        for seed in seeds:
            folder = OUT / f"study-{study}" / name / str(seed)
            words = settings.format(seed=seed, out=OUT).split()
            command = [sys.executable, ROOT / script, f"--seed={seed}", f"--out_dir={folder}", *words]
            if (folder / "ckpt.pt").exists():
                command = [sys.executable, ROOT / script, f"--resume={folder}"]
            yield folder, command


def finished(folder):
    return (folder / "summary.json").exists()


def free(folder):
    """Whether nothing left of an earlier study writes in the folder."""
    if not (folder / ".lock").exists():
        return True
    with open(folder / ".lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def waits_for(command):
    """The folders of the unfinished runs that a run starts from."""
    named = [Path(str(word).split("=", 1)[1]) for word in command if str(word).startswith(("--start=", "--critic_from="))]
    return [folder for folder in named if not finished(folder)]


def launch(folder, command):
    """Starts a run on one thread; what it prints goes to <seed>.txt beside its folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.txt", "a") as f:
        return subprocess.Popen(command, stdout=f, stderr=f, cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"))


def run_all(todo):
    """Runs (folder, command) pairs, AT_ONCE at a time; returns the folders whose run failed."""
    began, total, running, failed = time.time(), len(todo), {}, []
    try:
        while todo or running:
            todo = [job for job in todo if not finished(job[0])]
            can = [(folder, command) for folder, command in todo if free(folder) and not waits_for(command)]
            for folder, command in can[:AT_ONCE - len(running)]:
                todo.remove((folder, command))
                running[folder] = launch(folder, command)
            if todo and not running and all(waits_for(command) for _, command in todo):
                for folder, command in todo:  # a run that failed, or one of a study that has not been run
                    print(f"{folder.relative_to(OUT)} needs {waits_for(command)[0].relative_to(OUT)} first", flush=True)
                return [*failed, *(folder for folder, _ in todo)]
            time.sleep(0.2)
            for folder in [f for f, process in running.items() if process.poll() is not None]:
                note = ""
                if running.pop(folder).returncode:
                    failed.append(folder)
                    note = f"  FAILED, see {folder}.txt"
                done = total - len(todo) - len(running)
                left = (time.time() - began) / done * (total - done) / 60
                print(f"{done}/{total}  {folder.relative_to(OUT)}{note}  {left:.0f} min left", flush=True)
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
    if "--list" in sys.argv:
        print("\n".join(f"{folder.relative_to(OUT)} {'done' if finished(folder) else ''}" for folder, _ in jobs(study)))
    elif run_all([job for job in jobs(study) if not finished(job[0])]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
