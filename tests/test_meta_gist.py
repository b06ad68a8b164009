"""Stage 3: second order against slower references, and its script as a user runs it, on the plays at a very small size."""
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

import meta_gist
from model import GIST, GPT, OWN, OWN_GIST, TRUE, GPTConfig, attention_mask

ROOT = Path(__file__).parent.parent
SMALL = ["--meta_steps=16", "--pretrain=8", "--self_steps=8", "--n_embd=32", "--n_head=2", "--block_size=16",
         "--eval_windows=4", "--eval_interval=4", "--save_interval=3", "--warmup=8", "--batch_size=4", "--outer_batch=8",
         "--pool_steps=3", "--device=cpu"]
ROLLOUT = ["--own=rollout", "--chunk=4", "--n_gist=2", "--gist_layer=1", "--samples=2"]
DENSE = dict(own="dense", chunk=1, n_gist=1, gist_layer=0, samples=1)
CHUNKS = dict(own="rollout", chunk=4, n_gist=2, gist_layer=1, samples=2)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The small models run faster on one thread, and the processes started here inherit it."""
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    del os.environ["OMP_NUM_THREADS"]


def start(*arguments, ranks=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return subprocess.Popen([sys.executable, *launcher, ROOT / "meta_gist.py", *arguments], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(*arguments, **options):
    process = start(*arguments, **options)
    output = process.communicate(timeout=180)[0]
    assert process.returncode == 0, output
    return output


def in_process(monkeypatch, *arguments):
    """Runs the script with fresh globals in this process, which saves the seconds of importing torch."""
    monkeypatch.setattr(sys, "argv", ["meta_gist.py", *arguments])
    monkeypatch.setattr(signal, "signal", lambda *a: None)
    runpy.run_path(str(ROOT / "meta_gist.py"), run_name="__main__")


def log(folder):
    """The rows of a log without their timing."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tok_per_s"} for row in rows]


def weights(folder):
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    return {f"{part}.{k}": v for part in ("learner", "critic") for k, v in state[part].items()}


# ---- second order

def small(settings, seed=0):
    """((learner, critic), theta, phi) in float64 with random weights everywhere, and the script's settings set."""
    for name, value in dict(vocab=13, block_size=8, **settings).items():
        setattr(meta_gist, name, value)
    torch.manual_seed(seed)
    nets = GPT(GPTConfig(13, 1, 2, 2, 16)), GPT(GPTConfig(13, meta_gist.n_gist, 2, 2, 16))
    nets[1].log_kappa, nets[1].log_eta = (torch.nn.Parameter(torch.tensor(x)) for x in (0.5, -0.5))
    for net in nets:
        net.double()
        for p in net.parameters():
            if p.dim():
                torch.nn.init.normal_(p, std=0.3)
    return nets, meta_gist.weights(nets[0]), meta_gist.weights(nets[1], meta_gist.read_by(nets[1]))


def what_is_read(steps, rows=2):
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(0, 13, (steps + 1, rows, 9), generator=generator)
    chances = torch.rand(steps, rows, meta_gist.samples, 8, generator=generator)
    return [(w, w[:, 1:]) for w in texts[:-1]], list(chances), texts[-1]


@pytest.fixture
def settings(monkeypatch):
    """Lets a test set the script's globals; they are put back after it."""
    for name in (*DENSE, "vocab", "block_size", "rule", "mixed", "length", "zero_mean"):
        monkeypatch.setattr(meta_gist, name, getattr(meta_gist, name))


def distance(a, b):
    """‖a − b‖ / ‖b‖ of two dicts of tensors."""
    difference = meta_gist.add(a, b, -1)
    return (meta_gist.dot(difference, difference) / meta_gist.dot(b, b)).sqrt().item()


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("rule", ["fixed", "proportional", "sgd"])
@pytest.mark.parametrize("form", [DENSE, CHUNKS], ids=["dense", "rollout"])
def test_the_three_mixed_products_and_finite_differences_of_the_whole_unroll_agree(settings, form, rule, steps):
    nets, theta, phi = small(dict(form, rule=rule, length=0.02))
    batches, chances, outer = what_is_read(steps)
    found = {}
    for meta_gist.mixed in ("graph", "forward", "difference"):
        found[meta_gist.mixed], judged, moved, _ = meta_gist.meta_step(nets, theta, phi, batches, chances, outer,
                                                                      lambda tensors: None)
    assert distance(found["forward"], found["graph"]) < 1e-12
    assert distance(found["difference"], found["graph"]) < 1e-4
    said, th = [], theta  # the words are drawn once: where they jump there is no derivative
    for batch, u in zip(batches, chances):
        spoken, _, g, _ = meta_gist.inner_gradient(nets, th, phi, batch, u, lambda tensors: None)
        said.append((None, g, batch, spoken))
        th = meta_gist.inner_step(th, g)
    assert distance(th, moved) == 0 and judged == meta_gist.cross_entropy(nets[0], moved, outer)
    after = lambda ph: meta_gist.unrolled(nets, theta, ph, said, outer)
    for seed in range(2):
        v = {n: torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).double() for n, p in phi.items()}
        numeric = (after(meta_gist.add(phi, v, 2e-6)) - after(meta_gist.add(phi, v, -2e-6))) / 4e-6
        exact = meta_gist.dot(found["forward"], v)
        assert abs(exact - numeric) < 1e-5 * max(1e-3, abs(numeric)), (exact, numeric)


def one_of_two_ranks(rank, folder, form, steps):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)

    def average(tensors):
        for t in tensors:
            torch.distributed.all_reduce(t)
            t /= 2

    nets, theta, phi = small(dict(form, mixed="forward"))
    batches, chances, outer = what_is_read(steps, rows=4)
    rows = slice(2 * rank, 2 * rank + 2)
    read = [(w[rows], seen[rows]) for w, seen in batches], [u[rows] for u in chances], outer[rows]
    exact = meta_gist.meta_step(nets, theta, phi, *read, average)[0]
    naive = meta_gist.meta_step(nets, theta, phi, *read, lambda tensors: None)[0]
    average(list(naive.values()))
    if rank == 0:
        torch.save((exact, naive), f"{folder}/found.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("form, steps", [(DENSE, 1), (DENSE, 3), (CHUNKS, 2)], ids=["dense-1", "dense-3", "rollout-2"])
def test_two_ranks_find_the_second_order_of_one_and_the_mean_of_their_own_would_not(settings, tmp_path, form, steps):
    mp.spawn(one_of_two_ranks, (tmp_path, form, steps), nprocs=2)
    exact, naive = torch.load(tmp_path / "found.pt")
    nets, theta, phi = small(dict(form, mixed="forward"))
    whole = meta_gist.meta_step(nets, theta, phi, *what_is_read(steps, rows=4), lambda tensors: None)[0]
    assert distance(exact, whole) < 1e-10
    assert distance(naive, whole) > 0.01
