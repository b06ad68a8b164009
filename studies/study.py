"""
Many runs of one script, two at a time, that go on where they were when started again.

    python studies/study.py 1            # stage 1: the grid behind the tables of results/stage-1.md
    python studies/study.py 1 --list     # what it would run, and what is done

Each run is a process of its own with one thread, in out/study-1/<name>/<seed>. A finished run has a
summary.json and is not run again; one that was interrupted is resumed from its checkpoint.
"""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's modules
from configurator import nearest, refuse
from locks import lock

AT_ONCE = 2
ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out"

# ---- stage 1
BASE = "--start={out}/study-1/base/{seed}"  # levers of the self phase share one meta phase a seed
LEVER = "--self_steps=400 --arms=self"
LAW = "--self_steps=140 --arms=self --eval_interval=2"
LONG = "--batch_size=2 --meta_steps=1000"
LONG_BASE = "--start={out}/study-1-long/frozen/{seed}"
LONG_STEPS = "--self_steps=20000 --eval_interval=100 --save_interval=2000"
HUNT = "--eval_interval=20 --arms=real,frozen"

# ---- stage 2
GISTS = "--start={out}/study-2/base/{seed} --arms=frozen,random"
FORECAST = "--start={out}/study-2/base/{seed} --arms=forecast"
SHARE = "--arms= --controls=full,none"
RATE = "--controls= --self_learning_rate=1e-3"
MEANING = ("--dataset=planted-synonyms --vocab=128 --n_layer=2 --n_embd=64 --block_size=32 --controls= "
           "--eval_windows=256")
LITTLE = (f"{MEANING} --train_tokens=5000 --meta_steps=60 --batch_size=16 --learning_rate=3e-3 "
          "--candidates=32 --every=1 --self_learning_rate=1e-3 --self_steps=200 --eval_interval=20")
READER = "--critic_from={out}/study-2-meaning"
SPELLED = "--dataset=plays-spellings --vocab=144"
MUCH = ("--n_layer=2 --n_embd=64 --block_size=32 --batch_size=32 --meta_steps=3000 --arms= --controls= "
        "--eval_interval=100")
LITTLE_PLAYS = ("--n_layer=2 --n_embd=64 --block_size=32 --controls= --batch_size=16 --learning_rate=3e-3 "
                "--every=1 --self_learning_rate=1e-3 --eval_interval=20 --eval_windows=256 "
                "--arms=real,frozen,forecast,random")

WORDS_2 = ("--dataset=kjv-asv --vocab=1024 --n_layer=2 --n_embd=64 --block_size=32 --controls= "
           "--batch_size=16 --learning_rate=3e-3 --eval_interval=50 --eval_windows=512")

# ---- stage 3
# one step of a set length judges, and the form of the settings that were defaults then
ONE_STEP = "--inner_steps=1 --inner_length=0.05 --scalar_rate=0.03 --outer_batch=64"
DENSE = f"--chunk=1 --kappa=1 --meta_steps=600 {ONE_STEP}"
MATCHED = f"{ONE_STEP} --kappa=1 --kappa_a=20 --nu=0.95 --meta_steps=600"
SMALL = (f"{DENSE} --n_head=2 --block_size=16 --learning_rate=3e-3 --warmup=10 --self_steps=300 "
         "--eval_interval=30 --eval_windows=256 --train_tokens=40000")
SYNONYMS = (f"{SMALL} --dataset=planted-synonyms --vocab=256 --n_layer=1 --batch_size=64 --outer_batch=256 "
            "--pretrain=30 --critic_rate=0.2")
SPELLINGS = (f"{SMALL} {SPELLED} --n_layer=2 --batch_size=256 --outer_batch=512 --pretrain=50 "
             "--scalar_rate=0.01")
LEARNED, BY_HAND = "--meta_steps=430", "--meta_steps=30 --kappa=7"
SPELLINGS_LEARNED, SPELLINGS_BY_HAND = "--meta_steps=1550", "--meta_steps=50 --kappa=7"
TWO = "--arms=real,frozen"
CHUNKS = f"{MATCHED} --chunk=4 --arms=real,first,frozen"
OWN = "--chunk=4 --kappa_a=20 --nu=0.95 --arms=real,first,frozen,frozen_first"
FACTS = (f"{DENSE} --dataset=planted-facts --train_tokens=40000 --pretrain=100 --learning_rate=3e-3 "
         "--self_steps=1200 --eval_interval=100 --arms=real,frozen")
SHIFT = (f"{ONE_STEP} --dataset=planted-shift --vocab=68 --chunk=8 --n_layer=1 --n_head=2 --n_embd=64 "
         "--pretrain=150 --meta_steps=150 --self_steps=200 --learning_rate=3e-3")

SHARP = "--kappa=7 --kappa_a=20 --nu=0.8"
BROAD = "--kappa=3 --kappa_a=5 --nu=0.5 --arms=real,frozen"
PLACES = "--arms=real,first,frozen,frozen_first,same_place"
FROM_HAND = "--start={out}/study-3-shift/by-hand/{seed} " + PLACES
OWN_STEPS = "--inner_length=0 --inner_steps=15 --scalar_rate=0.3 --outer_batch=256"  # AdamW's, as today

WORDS = (f"{DENSE} --dataset=kjv-asv --vocab=1024 --n_layer=1 --learning_rate=3e-3 --pretrain=1000 "
         "--self_steps=600 --eval_interval=50 --eval_windows=512 --save_interval=1000")
ALIGNED = f"{WORDS} --val_chunks=aligned --outer_batch=16 --kappa=7"
WORDS_ARMS = "--arms=real,oracle,frozen,shuffled"
# κ, κ_a, ν of a dozen critics, E random: does what a critic gains in H steps tell what it recovers in 500?
CRITICS = ((7, 20, 0.8), (3, 5, 0.5), (2, 30, 0.9), (12, 3, 0), (5, 10, 0.2), (20, 20, 0.6), (4, 2, 0.9),
           (10, 40, 0.95), (7, 6, 0), (15, 8, 0.8), (3, 15, 0.7), (8, 3, 0.5))
RANKS = "--arms=frozen --self_steps=500 --eval_interval=1 --eval_windows=256 --save_interval=1000"
SHIFT_MODEL, SHIFT_STEPS = SHIFT.replace("--self_steps=200 ", ""), "--eval_interval=100 --save_interval=2000"
SIZES, PLAYS = {"bytes": 256, "bpe": 512}, f"{ONE_STEP} --meta_steps=400"  # the plays in chunks

FIVE = (1, 2, 3, 4, 5)
THREE = (1, 2, 3)

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
        "ema-.99": f"{BASE} --self_steps=400 --arms=ema --ema_decay=0.99",
        "ema-.9999": f"{BASE} --self_steps=400 --arms=ema --ema_decay=0.9999",
        "soft": f"{BASE} --self_steps=400 --arms=self,frozen,ema --target=soft",
        # levers of the meta phase
        "flips": f"{LEVER} --adversarial=0.3 --adversary=flips",
        "random": f"{LEVER} --adversarial=0.3",
        "order-2": f"{LEVER} --order=2",
        # a critic that is half right
        "biased": f"--meta_steps=300 --self_steps=400 {TWO}",
    }, FIVE),
    # How long can it go on? 20 times the meta phase, with no real token as a target.
    "1-long": ("self_ce.py", {
        "frozen": f"{LONG} {LONG_STEPS} {TWO}",
        "self": f"{LONG} {LONG_BASE} {LONG_STEPS} --arms=self --keep_meta=0.1",
        "sharpen": f"{LONG} {LONG_BASE} --self_steps=1000 --arms=sharpen,self",
    }, FIVE),
    # Where is a frozen critic hacked only after hundreds of steps, as earlier work saw at 750?
    "hunt": ("self_ce.py", {
        **{f"accuracy-{m}": f"{HUNT} --vocab=4096 --meta_steps={m} --self_steps=1200"
           for m in (450, 500, 550, 600)},
        **{f"accuracy-{m}": f"{HUNT} --vocab=4096 --meta_steps={m} --self_steps=1200 --eval_windows=32"
           for m in (700, 800)},
        **{f"repeated-{n}": f"{HUNT} --train_tokens={n} --self_steps=3000" for n in (5000, 30000)},
        "repeated-4096": f"{HUNT} --vocab=4096 --train_tokens=30000 --meta_steps=550 --self_steps=1200",
        "slow": f"{HUNT},self --vocab=4096 --block_size=42 --learning_rate=1e-4 --meta_steps=1000 "
                "--self_steps=1200",
    }, (1,)),
    # Gists: what they carry, and what a learner recovers from their distance.
    "2": ("gist_bottleneck.py", {
        "base": "--arms=real,frozen,random",
        "energy": f"{GISTS} --distance=energy",
        "plain": f"{GISTS} --distance=plain",
        "tau-.5": f"{GISTS} --tau=0.5",
        "span-4": f"{GISTS} --span=4 --distance=energy",
        "forecast": FORECAST,
        "forecast-tau-.5": f"{FORECAST} --tau=0.5",
        "share-8": f"{SHARE} --chunk=8",
        "share-16": f"{SHARE} --chunk=16",
        "share-8-long": f"{SHARE} --chunk=8 --meta_steps=2000 --eval_interval=100",
        "share-16-long": f"{SHARE} --chunk=16 --meta_steps=2000 --eval_interval=100",
        "rate-1e-3": f"{RATE} --arms=real,self,frozen,ema",
        "rate-1e-3-long": f"{RATE} --start={{out}}/study-2/rate-1e-3/{{seed}} --arms=real,self "
                          "--self_steps=1500 --eval_interval=50",
        "long": f"{GISTS},real --self_steps=2500 --eval_interval=100",
        "arms": "--start={out}/study-2/base/{seed} --arms=self,ema,shuffled,sharpen",
        "gists-2": "--n_gist=2 --controls= --arms=real,frozen,random",
        "gists-4": "--n_gist=4 --controls= --arms=real,frozen,random",
        "span-2": f"{GISTS} --span=2 --distance=energy",
    }, FIVE),
    # Where forgetting helps: text full of synonyms, little of it, and a critic that has read more.
    "2-meaning": ("gist_bottleneck.py", {
        "critic": f"{MEANING} --meta_steps=2500 --batch_size=32 --learning_rate=6e-3 --arms= "
                  "--eval_interval=100",
        "praise": f"{LITTLE} {READER}/critic/{{seed}} --arms=real,frozen,forecast,random",
        # what is left of it where spellings are noise and the text is real, and on the plays themselves
        "spellings-critic": f"{SPELLED} {MUCH}",
        "spellings": f"{SPELLED} --train_tokens=20000 --meta_steps=100 --candidates=100 --self_steps=160 "
                     f"{LITTLE_PLAYS} {READER}/spellings-critic/{{seed}}",
        "plays-critic": MUCH,
        "plays": f"--train_tokens=40000 --meta_steps=150 --candidates=32 --self_steps=300 {LITTLE_PLAYS} "
                 f"{READER}/plays-critic/{{seed}}",
        "own": f"{LITTLE} --start={{out}}/study-2-meaning/praise/{{seed}} --arms=frozen,forecast",
    }, FIVE),
    # Gists of a text in other words: a learner of KJV observes ASV, and its critic has read both.
    "2-words": ("gist_bottleneck.py", {
        "critic": f"{WORDS_2} --both_wordings=true --meta_steps=3000 --arms=",
        "learner": f"{WORDS_2} --meta_steps=1000 --self_learning_rate=1e-3 --self_steps=400 --candidates=32 "
                   "--critic_from={out}/study-2-words/critic/{seed} "
                   "--arms=real,oracle,frozen,forecast,random,shuffled",
    }, FIVE),
    # Second order: a critic that starts broad and random, and the same left so, or sharpened by hand.
    "3": ("meta_gist.py", {
        "chunks": "",  # the default: chunks, judged by 15 own steps
        "dense-own": "--chunk=1 --arms=real,frozen,self,ema,shuffled,sharpen",
        "dense": f"{DENSE} --arms=real,frozen,self,ema,shuffled,sharpen",
        "synonyms": f"{SYNONYMS} {LEARNED} --arms=real,frozen,self,ema,shuffled",
        "synonyms-by-hand": f"{SYNONYMS} {BY_HAND} {TWO}",
        "chunk-4": CHUNKS,
        "chunk-4-by-hand": f"{CHUNKS} --meta_steps=400 --kappa=7",
        "synonyms-10000": f"{SYNONYMS} {LEARNED} {TWO} --train_tokens=10000",
        "synonyms-10000-by-hand": f"{SYNONYMS} {BY_HAND} {TWO} --train_tokens=10000",
        "spellings": f"{SPELLINGS} {SPELLINGS_LEARNED} {TWO},shuffled",
        "spellings-by-hand": f"{SPELLINGS} {SPELLINGS_BY_HAND} {TWO}",
        "spellings-20000": f"{SPELLINGS} {SPELLINGS_LEARNED} {TWO} --train_tokens=20000",
        "spellings-20000-by-hand": f"{SPELLINGS} {SPELLINGS_BY_HAND} {TWO} --train_tokens=20000",
        "untrained": f"{DENSE} --meta_steps=400 {TWO}",
        "by-hand": f"{DENSE} --meta_steps=400 --kappa=7 {TWO}",
        "steps-2": f"{DENSE} --inner_steps=2 {TWO}",
        "steps-4": f"{DENSE} --inner_steps=4 {TWO}",
        "chunk-4-sharp": f"{CHUNKS} --kappa=7",
        # chunks written alone, where own text may mean what the truth does in other words
        "synonyms-chunk": f"{SYNONYMS} {OWN} {LEARNED}",
        "synonyms-chunk-by-hand": f"{SYNONYMS} {OWN} {BY_HAND}",
        "synonyms-chunk-long": f"{SYNONYMS} {OWN},self,ema {LEARNED} --train_tokens=0 --self_steps=2000 "
                               "--eval_interval=100",
    }, FIVE),
    # Other forms of chunks, one seed each.
    "3-forms": ("meta_gist.py", {
        "chunk-8": f"{MATCHED} --chunk=8 --arms=real,first,frozen",
    }, (1,)),
    # Chunks aligned by gists, where two texts say the same at different places.
    "3-shift": ("meta_gist.py", {
        "by-hand": f"{SHIFT} {SHARP} {PLACES},shuffled",
        # `first` has an eighth of the targets: each is to be compared at its best rate
        "rate-.3": f"{SHIFT} {SHARP} {FROM_HAND} --self_rate=0.3",
        "rate-.1": f"{SHIFT} {SHARP} {FROM_HAND} --self_rate=0.1",
        # E random, scalars broad: left so, and judged by one own step, and by 15
        "broad": f"{SHIFT} {BROAD}",
        "own-1": f"{SHIFT} {BROAD} {OWN_STEPS} --inner_steps=1 --meta_steps=190",
        "own-15": f"{SHIFT} {BROAD},shuffled {OWN_STEPS} --meta_steps=190",
        "long": f"{SHIFT} {SHARP} --arms=real,frozen --self_steps=800",
        "own-15-long": f"{SHIFT} {BROAD} {OWN_STEPS} --meta_steps=190 --self_steps=800 "
                       "--start={out}/study-3-shift/own-15/{seed}",
        "own-15-longer": f"{SHIFT} {BROAD} {OWN_STEPS} --meta_steps=190 --self_steps=5000 "
                         "--eval_interval=100 --start={out}/study-3-shift/own-15/{seed}",
    }, FIVE),
    # The same on the plays, at the best of three rates for each arm.
    "3-chunks": ("meta_gist.py", {
        **{f"{name}-{k}": f"{PLAYS} --chunk={k} --vocab={vocab} {SHARP} {PLACES},shuffled"
           for name, vocab in SIZES.items() for k in (4, 8)},
        **{f"{name}-{k}-rate-{rate}": f"{PLAYS} --chunk={k} --vocab={vocab} {SHARP} {PLACES} "
                                      f"--self_rate={rate} --start={{out}}/study-3-chunks/{name}-{k}/{{seed}}"
           for name, vocab in SIZES.items() for k in (4, 8) for rate in (0.3, 0.1)},
        # from a broad start, judged by 15 own steps, or 60
        **{f"{name}-{k}-own-{n}": f"--chunk={k} --vocab={vocab} {BROAD.replace('real,', 'real,first,')} "
                                  f"{OWN_STEPS} --inner_steps={n} --meta_steps=440 --self_rate={rate}"
           for k, rate in ((4, 1), (8, 0.3)) for name, vocab in SIZES.items() for n in (15, 60)},
        # a match that asks for more
        **{f"{name}-4-nu-.95": f"{PLAYS} --chunk=4 --vocab={vocab} --kappa=7 --kappa_a=20 --nu=0.95 "
                               "--arms=real,first,frozen" for name, vocab in SIZES.items()},
    }, FIVE),
    # Which objective knows what a critic will recover?
    "3-ranks": ("meta_gist.py", {
        f"{name}-{i}": f"{model} --kappa={kappa} --kappa_a={kappa_a} --nu={nu} {RANKS}"
        for name, model in (("shift", SHIFT_MODEL), ("plays", f"{PLAYS} --chunk=4"))
        for i, (kappa, kappa_a, nu) in enumerate(CRITICS)
    }, (1,)),
    # Text in other words: a learner of KJV that observes ASV.
    "3-words": ("meta_gist.py", {
        "learned": f"{ALIGNED} --meta_steps=2200 {WORDS_ARMS}",
        # the same text for its arms: κ = 7 and random E, held
        "held": f"{ALIGNED} --meta_steps=2200 --critic_rate=0 --scalar_rate=0 --arms=real,oracle,frozen",
        "known": f"{ALIGNED} --meta_steps=2200 --critic_rate=0 --scalar_rate=0 --arms=oracle,table,mask "
                 "--start={out}/study-3-words/held/{seed}",
        "by-hand": f"{WORDS} --meta_steps=1000 --kappa=7 {WORDS_ARMS}",
        "by-hand-10": f"{WORDS} --meta_steps=1000 --kappa=10 --arms=oracle,frozen",
        "from-1": f"{ALIGNED.replace('--kappa=7', '--kappa=1')} --meta_steps=2200 {WORDS_ARMS}",
        "random-judge": f"{WORDS} --meta_steps=2200 --kappa=7 --outer_batch=64 --arms=oracle,frozen",
        "learned-long": f"{ALIGNED} --meta_steps=5000 --arms=oracle,frozen",
        # E judged over several steps: normalised ones, and the learner's own
        "steps-4-all": f"{ALIGNED} --meta_steps=2200 --inner_steps=4 --outer_batch=64 --arms=oracle,frozen",
        "own-8": f"{ALIGNED} --meta_steps=1400 --inner_length=0 --inner_steps=8 --outer_batch=128 "
                 "--arms=oracle,frozen",
    }, FIVE),
    # Facts told some eight times, thousands of tokens apart: does a judge that is near find them sooner?
    "3-facts": ("meta_gist.py", {
        "random": f"{FACTS} --meta_steps=500",
        "by-hand": f"{FACTS} --meta_steps=100 --kappa=7",
    }, FIVE),
    # No end: many times the meta phase, with no real token as a target.
    "3-long": ("meta_gist.py", {
        "dense": f"{DENSE} --self_steps=12000 --eval_interval=200 --save_interval=2000 --arms=real,frozen",
        "dense-self": f"{DENSE} --self_steps=12000 --eval_interval=200 --save_interval=2000 --arms=self,ema "
                      "--start={out}/study-3-long/dense/{seed}",
        "dense-shuffled": f"{DENSE} --self_steps=1000 --arms=shuffled,sharpen "
                          "--start={out}/study-3-long/dense/{seed}",
        "plays-nu-.95": f"{PLAYS} --chunk=4 --kappa=7 --kappa_a=20 --nu=0.95 "
                        f"--arms=real,first,frozen --self_steps=5000 {SHIFT_STEPS}",
    }, THREE),
}


def refuse_other_settings(folder, words):
    """Refuses a run of a point whose settings have changed since."""
    try:
        saved = dict(json.loads((folder / "config.json").read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        refuse(f"{folder / 'config.json'} is unreadable ({type(error).__name__}); move the run away")
    asked = dict(word[2:].split("=", 1) for word in words)
    for name, value in asked.items():
        kept = saved.get(name)
        same = float(value) == kept if isinstance(kept, float) else value.lower() == str(kept).lower()
        if not same and name not in ("out_dir", "start", "critic_from"):
            refuse(f"{folder} was run with {name}={kept}, the study says {value}: move it away, or run anew")


def jobs(study):
    """(folder, command) of each run of a study, point by point: the first matter most."""
    script, points, seeds = STUDIES[study]
    for name, settings in points.items():
        for seed in seeds:
            folder = OUT / f"study-{study}" / name / str(seed)
            words = settings.format(seed=seed, out=OUT).split()
            command = [sys.executable, ROOT / script, f"--seed={seed}", f"--out_dir={folder}", *words]
            if (folder / "config.json").exists():
                refuse_other_settings(folder, words)
            if (folder / "ckpt.pt").exists():
                command = [sys.executable, ROOT / script, f"--resume={folder}"]
            yield folder, command


def finished(folder):
    return (folder / "summary.json").exists()


def free(folder):
    """Whether nothing left of an earlier study writes in the folder."""
    if not (folder / ".lock").exists():
        return True
    with open(folder / ".lock", "a", encoding="utf-8") as file:
        try:
            lock(file, wait=False)
        except OSError:
            return False
    return True


def waits_for(command):
    """The folders of the unfinished runs that a run starts from."""
    others = [str(word) for word in command if str(word).startswith(("--start=", "--critic_from="))]
    return [folder for folder in (Path(word.split("=", 1)[1]) for word in others) if not finished(folder)]


def launch(folder, command):
    """Starts a run on one thread; what it prints goes to <seed>.txt beside its folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.txt", "a") as f:
        one_thread = dict(os.environ, OMP_NUM_THREADS="1")
        return subprocess.Popen(command, stdout=f, stderr=f, cwd=ROOT, env=one_thread)


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
                    first = waits_for(command)[0]
                    print(f"{folder.relative_to(OUT)} needs {first.relative_to(OUT)} first", flush=True)
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
    words = [word for word in sys.argv[1:] if word != "--list"]
    if not words or {"-h", "--help"} & set(words):
        print(f"{__doc__.strip()}\n\nThe studies are {', '.join(STUDIES)}.")
        raise SystemExit(0 if words else 2)
    study, *more = words
    if study not in STUDIES:
        instead = nearest(study, STUDIES) or f"; the studies are {', '.join(STUDIES)}"
        refuse(f"there is no study {study!r}{instead}")
    if more:
        refuse(f"{more[0]!r} is not --list; one study is run at a time")
    signal.signal(signal.SIGTERM, lambda *a: sys.exit(143))  # so that the runs under way are stopped too
    if "--list" in sys.argv:
        for folder, _ in jobs(study):
            print(folder.relative_to(OUT), "done" if finished(folder) else "")
        return
    todo = [job for job in jobs(study) if not finished(job[0])]
    OUT.mkdir(parents=True, exist_ok=True)
    with open(OUT / ".study.lock", "a", encoding="utf-8") as file:
        try:
            lock(file, wait=False)
        except OSError:
            refuse(f"another study is running in {OUT}; one runs at a time, two runs of it at once")
        if run_all(todo):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
