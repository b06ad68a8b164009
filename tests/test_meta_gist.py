"""Stage 3: second order against slower references, and its script as a user runs it, on the plays at a very small size."""
import copy
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
import torch.nn.functional as F

import meta_gist
import prepare_data
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
    before, os.environ["OMP_NUM_THREADS"] = torch.get_num_threads(), "1"
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
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
        said.append((None, g, batch, spoken[0]))
        th = meta_gist.inner_step(th, g)
    assert distance(th, moved) == 0 and judged == meta_gist.cross_entropy(nets[0], moved, outer)
    after = lambda ph: meta_gist.unrolled(nets, theta, ph, said, outer)
    for seed in range(2):
        v = {n: torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).double() for n, p in phi.items()}
        numeric = (after(meta_gist.add(phi, v, 2e-6)) - after(meta_gist.add(phi, v, -2e-6))) / 4e-6
        exact = meta_gist.dot(found["forward"], v)
        assert abs(exact - numeric) < 1e-5 * max(1e-3, abs(numeric)), (exact, numeric)


RANKED = [(DENSE, 1), (DENSE, 3), (CHUNKS, 2)]


def one_of_two_ranks(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)

    def average(tensors):
        for t in tensors:
            torch.distributed.all_reduce(t)
            t /= 2

    rows, found = slice(2 * rank, 2 * rank + 2), []
    for form, steps in RANKED:
        nets, theta, phi = small(dict(form, mixed="forward"))
        batches, chances, outer = what_is_read(steps, rows=4)
        read = [(w[rows], seen[rows]) for w, seen in batches], [u[rows] for u in chances], outer[rows]
        exact = meta_gist.meta_step(nets, theta, phi, *read, average)[0]
        naive = meta_gist.meta_step(nets, theta, phi, *read, lambda tensors: None)[0]
        average(list(naive.values()))
        found.append((exact, naive))
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may still hold tensors, and then the end of an interpreter aborts


def test_two_ranks_find_the_second_order_of_one_and_the_mean_of_their_own_would_not(settings, tmp_path):
    mp.spawn(one_of_two_ranks, (tmp_path,), nprocs=2)
    for (form, steps), (exact, naive) in zip(RANKED, torch.load(tmp_path / "found.pt")):
        nets, theta, phi = small(dict(form, mixed="forward"))
        whole = meta_gist.meta_step(nets, theta, phi, *what_is_read(steps, rows=4), lambda tensors: None)[0]
        assert distance(exact, whole) < 1e-10
        assert distance(naive, whole) > 0.01


def test_between_inner_steps_nothing_is_kept_but_weights_gradients_and_words(settings, monkeypatch):
    nets, theta, phi = small(dict(DENSE, mixed="difference"))
    seen = []
    real = meta_gist.inner_gradient
    monkeypatch.setattr(meta_gist, "inner_gradient", lambda *a: seen.append(real(*a)) or seen[-1])
    meta_gist.meta_step(nets, theta, phi, *what_is_read(4), lambda tensors: None)
    kept = [t for said, a, g, loss in seen for t in (*filter(torch.is_tensor, said), a, loss, *g.values())]
    assert len(seen) == 4 and all(t.grad_fn is None and not t.requires_grad for t in kept)


# ---- the signal

def test_the_mean_of_the_signal_over_what_the_learner_says_is_zero_for_any_critic(settings):
    for form in (DENSE, CHUNKS):
        nets, theta, phi = small(form)
        w = torch.randint(0, 13, (2, 9))
        y, p = meta_gist.speak(nets[0], theta, w[:, :-1], torch.rand(2, meta_gist.samples, 8).double())
        spoken, weight = (w[:, 1:], p) if y is None else (y, p)
        if y is None:  # every token in the observation's place, weighted by its probability
            mean = sum(p[..., v, None] * meta_gist.signal(nets[1], phi, w, torch.full_like(spoken, v), (y, p))
                       for v in range(13))
            assert mean.abs().max() < 1e-14
        a = meta_gist.signal(nets[1], phi, w, w[:, 1:], (y, p))
        assert a.shape == p.shape and a.sum(-1).abs().max() < 1e-14  # both distributions sum to one


def test_an_observation_is_trusted_while_the_own_text_is_like_it_and_less_after_they_part(settings):
    nets, theta, phi = small(dict(CHUNKS, n_gist=4, gist_layer=0, samples=1))
    w = torch.arange(9)[None] % 13
    y = w[:, None, 1:].clone()
    assert torch.allclose(meta_gist.trust(nets[1], phi, w, y), torch.ones(1, 1, 8, 1).double())
    y[0, 0, 1] = 12  # the second token of the first chunk differs
    trust = meta_gist.trust(nets[1], phi, w, y)[0, 0, :, 0]
    assert torch.allclose(trust[[0, 1, 4, 5, 6, 7]], torch.ones(6).double()) and (trust[2:4] < 0.9).all()
    # a gist that has context knows of it too: only gists after the token change
    nets, theta, phi = small(dict(CHUNKS, samples=1))
    w, other = torch.randint(0, 13, (2, 9)), torch.randint(0, 13, (2, 1, 8))
    (b, a), changed = meta_gist.gists(nets[1], phi, w, other), other.clone()
    changed[:, :, 5] = (other[:, :, 5] + 1) % 13
    b2, a2 = meta_gist.gists(nets[1], phi, w, changed)
    assert torch.equal(b, b2) and torch.equal(a[:, :, :2], a2[:, :, :2]) and not torch.allclose(a[:, :, 2:], a2[:, :, 2:])


def test_a_rollout_is_what_the_learner_says_without_the_truth_of_its_chunk(settings):
    nets, theta, phi = small(CHUNKS)
    x, u = torch.randint(0, 13, (2, 8)), torch.rand(2, 2, 8)
    y, p = meta_gist.speak(nets[0], theta, x, u)
    for r in range(2):
        for s in (0, 4):
            text = torch.cat((x[:, :1], y[:, r, :4]), 1) if s == 0 else torch.cat((x[:, :5], y[:, r, 4:]), 1)
            alone = torch.cat([nets[0](text)], 1).softmax(-1)[:, s:s + 4]
            assert torch.allclose(alone, p[:, r, s:s + 4], atol=1e-12)


def test_the_mask_of_two_chunks_with_gists_of_own_and_true_text_equals_the_table():
    table = """x0 1 . . . . . . . . . . .
               x1 1 1 . . . . . . . . . .
               x2 1 1 1 . . . . . . . . .
               x3 1 1 1 1 . . . . . . . .
               y0 . . . . 1 . . . . . . .
               y1 . . . . 1 1 . . . . . .
               y2 1 1 . . . . 1 . . . . .
               y3 1 1 . . . . 1 1 . . . .
               A0 . . . . 1 1 . . 1 . . .
               A1 1 1 . . . . 1 1 . 1 . .
               B0 1 1 . . o o . . . . 1 .
               B1 1 1 1 1 . . o o . . . 1"""
    cells = [line.split()[1:] for line in table.splitlines()]
    kind = torch.tensor([TRUE] * 4 + [OWN] * 4 + [OWN_GIST] * 2 + [GIST] * 2)
    chunk, pos = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1, 0, 1, 0, 1]), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 1, 3, 1, 3])
    for beside in (False, True):
        expected = torch.tensor([[c == "1" or beside and c == "o" for c in row] for row in cells])
        assert torch.equal(attention_mask(kind, chunk, pos, beside), expected)


# ---- which text judges

def test_similar_finds_planted_twins_and_never_overlaps_the_text_that_asks(settings):
    meta_gist.vocab, meta_gist.block_size = 50, 32
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50, (20_000,), generator=rng)
    twins = {160: 12_800, 6_400: 960, 9_600: 19_200}
    for a, b in twins.items():
        tokens[b:b + 32] = tokens[a:a + 32]
    tokens = tokens.numpy().astype("uint16")
    index = meta_gist.make_index(tokens, torch.randn(50, 16, generator=rng))
    starts = torch.tensor(list(twins))
    for block in (65536, 100):
        found = meta_gist.nearest(index, starts, 2, len(tokens), block)
        assert all(abs(f - b) <= 32 for row, b in zip(found.tolist(), twins.values()) for f in row), found
    starts = torch.arange(0, 19_960, 7)
    found = meta_gist.nearest(index, starts, 3, len(tokens), 333)
    assert ((found - starts[:, None]).abs() > 32).all() and found.min() >= 0 and found.max() + 33 <= 20_000


def test_the_arm_first_trains_on_the_first_token_of_each_chunk_alone(settings):
    nets, theta, _ = small(CHUNKS)
    w = what_is_read(1)[2]
    logp = torch.func.functional_call(nets[0], theta, (w[:, :-1],)).log_softmax(-1)
    nats = -logp.gather(-1, w[:, 1:, None])[..., 0]
    assert torch.allclose(meta_gist.cross_entropy(nets[0], theta, w, 4), nats[:, [0, 4]].mean())
    assert torch.allclose(meta_gist.cross_entropy(nets[0], theta, w), nats.mean())


def test_the_arm_frozen_first_reads_the_signal_at_the_first_token_of_each_chunk_alone(settings):
    nets, theta, phi = small(CHUNKS)
    (batch,), (u,), _ = what_is_read(1)
    (y, p), a, g, loss = meta_gist.inner_gradient(nets, theta, phi, batch, u, lambda tensors: None, every=4)
    logp = lambda th: meta_gist.log_p(nets[0], th, batch[0][:, :-1], y)
    first = lambda th: -(a * logp(th)).sum(-1)[..., [0, 4]].mean()
    assert distance(g, torch.func.grad(first)(theta)) < 1e-12 and torch.allclose(loss, first(theta))
    assert a.shape == p.shape == (2, 2, 8, 13)


def test_forward_mode_keeps_its_digits_in_bfloat16_and_the_difference_does_not(settings):
    nets, _, _ = small(dict(DENSE, mixed="forward"))
    for net in nets:
        net.float()
    theta, phi = meta_gist.weights(nets[0]), meta_gist.weights(nets[1], meta_gist.read_by(nets[1]))
    batches, chances, outer = what_is_read(2)

    def found(mixed, low):
        meta_gist.mixed = mixed
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            return meta_gist.meta_step(nets, theta, phi, batches, chances, outer, lambda tensors: None)[0]
    exact = found("forward", False)
    assert distance(found("forward", True), exact) < min(0.05, distance(found("difference", True), exact) / 2)


def test_precision_counts_tokens_by_how_often_they_occur(monkeypatch):
    for name, value in dict(vocab=6, train_tokens=0).items():
        monkeypatch.setattr(meta_gist, name, value)
    E = torch.tensor([[1, 0, 0], [1, .1, 0], [0, 1, 0], [0, 0, 1], [0, 1, .1], [0, .1, 1.]])  # 0 and 1 alike; 2, 4; 3, 5
    corpus = type("Corpus", (), dict(encoding=type("Encoding", (), dict(spellings=2)),
                                     train=torch.tensor([0, 0, 0, 1, 2, 3, 4, 5]).numpy()))
    assert meta_gist.precision({"embed.weight": E}, corpus)["precision"] == 4 / 8
    corpus.train = torch.tensor([2, 3]).numpy()  # only what occurs can be a neighbour
    assert meta_gist.precision({"embed.weight": E}, corpus)["precision"] == 1


def test_questions_end_at_the_answer_of_a_fact_that_stands_far_before(tmp_path, monkeypatch):
    prepare_data.prepare("planted-facts", 512, tmp_path)
    corpus = prepare_data.open_corpus("planted-facts", 512, tmp_path)
    for name, value in dict(dataset="planted-facts", vocab=512, block_size=16, train_tokens=60_000).items():
        monkeypatch.setattr(meta_gist, name, value)
    asked = meta_gist.questions(type("Run", (), dict(device="cpu")), corpus)
    assert asked.shape == (512, 17)
    text = prepare_data.decode(corpus, corpus.train[:60_000])
    for row in asked[::50].tolist():
        *_, where, _, name, _, _, thing, _, place = prepare_data.decode(corpus, row).split()
        assert where == "where" and f"{name} keeps the {thing} in {place} ." in text
    told = lambda x: F.one_hot(asked[:, 1:], 512).float()  # a learner that knows the answers, and one that is sure of id 0
    assert meta_gist.answered(told, asked)["answers"] == 1
    nobody = meta_gist.answered(lambda x: torch.zeros(*x.shape, 512), asked)
    assert nobody["answers"] < 0.1 and abs(nobody["answers_nats"] - math.log(512)) < 1e-5


# ---- the script

@pytest.mark.parametrize("form", [["--val_chunks=similar", "--index_every=4"], ROLLOUT])
def test_killed_in_each_phase_a_resumed_run_equals_one_without_interruption(tmp_path, form):
    settings = [*SMALL, *form, "--arms=real,ema,shuffled", "--dtype=float64"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(*settings, f"--out_dir={whole}")

    def kill_at(process, arm, step):
        path = broken / "log.jsonl"
        while process.poll() is None:
            rows = path.read_text().splitlines() if path.exists() else []
            if any(f'"arm": "{arm}", "step": {step},' in row for row in rows):
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                return
            time.sleep(0.002)
        raise AssertionError("ended before it was killed: " + process.communicate()[0])

    for arm, step in (("meta", 12), ("ema", 4)):
        kill_at(start(*settings, f"--out_dir={broken}") if arm == "meta" else start(f"--resume={broken}"), arm, step)
        at = torch.load(broken / "ckpt.pt", weights_only=True)
        assert at["arm"] == arm and step - 3 <= at["step"] <= step
    finish(f"--resume={broken}")
    assert log(broken) == log(whole) and len(log(broken)) == 5 + 3 * 3
    summaries = [json.loads((out / "summary.json").read_text()) for out in (broken, whole)]
    assert summaries[0]["arms"] == summaries[1]["arms"] and summaries[0]["gain"] == summaries[1]["gain"]
    assert (broken / "samples.txt").read_text() == (whole / "samples.txt").read_text()
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(broken)[name]), name


def test_two_ranks_compute_what_one_does(tmp_path):
    settings = [*SMALL, *ROLLOUT, "--arms=frozen,ema,sharpen", "--dtype=float64", "--inner_steps=2", "--val_chunks=next"]
    finish(*settings, f"--out_dir={tmp_path / '1'}")
    finish(*settings, f"--out_dir={tmp_path / '2'}", ranks=2)
    for a, b in zip(log(tmp_path / "1"), log(tmp_path / "2"), strict=True):
        for key in a:
            number = isinstance(a[key], float)
            near = pytest.approx(a[key], rel=1e-5, abs=1e-9) if number else a[key]  # the log keeps six digits
            assert b[key] == near, (a["arm"], a["step"], key)
    w2 = weights(tmp_path / "2")
    assert max((v - w2[n]).abs().max() for n, v in weights(tmp_path / "1").items()) < 1e-9


def test_every_arm_starts_from_the_same_snapshot_and_leaves_what_the_readme_says(tmp_path, monkeypatch):
    out = tmp_path / "run"
    in_process(monkeypatch, *SMALL, f"--out_dir={out}")
    assert {p.name for p in out.iterdir()} >= {"log.jsonl", "ckpt.pt", "config.json", "samples.txt", "summary.json",
                                               "meta_gist.py", "curves.png"}
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["arms"]) == ["real", "frozen", "self", "ema", "shuffled", "sharpen"]
    assert len({arm["gold_start"] for arm in summary["arms"].values()} | {summary["gold_meta_end"]}) == 1
    assert all(math.isfinite(summary[k]) for k in ("gain", "gain_shuffled", "gain_real", "cosine_real", "cos_bb"))
    meta = [row for row in log(out) if row["arm"] == "meta" and "gain" in row]
    assert summary["gain"] == pytest.approx(meta[-1]["gain"], rel=1e-4) and meta[-1]["kappa"] != meta[0]["kappa"]
    assert meta[-1]["restarts"] == 0 and (out / "samples.txt").read_text().count("critic praises") == 2 * 7
    lent = tmp_path / "lent"
    in_process(monkeypatch, *SMALL, "--arms=real,frozen", f"--start={out}", f"--out_dir={lent}")
    assert log(lent) == [row for row in log(out) if row["arm"] in ("real", "frozen")]


def test_a_critic_begins_with_what_the_bottleneck_learned(tmp_path, monkeypatch, capsys):
    subprocess.run([sys.executable, ROOT / "gist_bottleneck.py", "--meta_steps=2", "--n_layer=2", "--n_head=2", "--n_embd=32",
                    "--block_size=16", "--eval_windows=4", "--batch_size=4", "--vocab=512", "--arms=", "--controls=",
                    "--device=cpu", f"--out_dir={tmp_path}/gists"], check=True, stdout=subprocess.DEVNULL)
    settings = [*SMALL, *ROLLOUT, "--pretrain=16", "--arms=", f"--critic_from={tmp_path}/gists"]
    in_process(monkeypatch, *settings, f"--out_dir={tmp_path}/run")
    theirs = torch.load(tmp_path / "gists/ckpt.pt", weights_only=True)["snapshot"]["learner"]
    critic = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)["critic"]
    assert torch.equal(critic["embed.weight"][:512], theirs["embed.weight"][:512])
    same = {n: torch.equal(p, critic[n]) for n, p in theirs.items() if n.startswith("blocks")}
    assert {n for n, alike in same.items() if alike} == {n for n in same if n.startswith("blocks.0.")}, same
    with pytest.raises(SystemExit):
        in_process(monkeypatch, *settings, "--n_embd=64", f"--out_dir={tmp_path}/no")
    assert "n_embd=64 differs from 32" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_learners_of_the_pool_step_as_the_arms_do_and_start_again_when_they_are_old_or_hacked(settings, monkeypatch):
    nets, theta, phi = small(DENSE)
    for name, value in dict(pool=2, pool_self=0.5, pool_steps=3, val_chunks="random", outer_batch=4, grad_clip=1.0).items():
        monkeypatch.setattr(meta_gist, name, value)
    batches, chances, outer = what_is_read(1)
    monkeypatch.setattr(meta_gist, "meta_batch", lambda *a: (batches, chances, outer))
    run = type("Run", (), dict(average=staticmethod(lambda tensors: None), mean=staticmethod(lambda v: v.item())))
    at = dict(critic_step=0, restarts=0, pool=[{}, {}])
    optimizers, mover = (meta_gist.adamw(nets[0], 1e-3), torch.optim.Adam(nets[1].parameters())), copy.deepcopy(nets[0])
    library = dict(index=None, mover=(mover, meta_gist.adamw(mover, 1.0)))  # its rate must not be the one that counts
    meta_gist.take_step(run, nets[0], optimizers[0], meta_gist.real_gradient(run, nets[0], theta, batches[0][0])[0])
    pretrained = copy.deepcopy(nets[0].state_dict())
    step = lambda: meta_gist.train_critic(run, None, nets, optimizers, at, library, {})
    arms = [(copy.deepcopy(nets[0]), copy.deepcopy(optimizers[0].state_dict())) for _ in range(2)]
    for turn, (learner, state) in enumerate(arms):  # what an arm does from the same snapshot: first signal, then real
        mind, theta = meta_gist.adamw(learner, 1e-3), meta_gist.weights(learner)
        mind.load_state_dict(state)
        g = (meta_gist.real_gradient(run, learner, theta, batches[0][0])[0] if turn else meta_gist.inner_gradient(
            nets, theta, meta_gist.weights(nets[1], meta_gist.read_by(nets[1])), batches[0], chances[0], run.average)[2])
        step()
        meta_gist.take_step(run, learner, mind, g)
        assert distance(at["pool"][turn]["learner"], meta_gist.weights(learner)) < 1e-12
        assert distance(meta_gist.weights(learner), pretrained) > 1e-5
    assert distance(nets[0].state_dict(), pretrained) == 0  # the pretrained one stays, for the others start from it
    step(), step()
    assert [m["age"] for m in at["pool"]] == [2, 2] and at["restarts"] == 0
    step()
    assert at["pool"][0] == {} and at["pool"][1]["age"] == 2 and at["restarts"] == 0  # old
    at["pool"][1]["best"] = -1.0
    step()
    assert at["pool"][1] == {}  # age 3 is old too; now one that is young and hacked
    step(), step()
    at["pool"][0]["best"] = -1.0
    step()
    assert at["pool"][0] == {} and at["restarts"] == 1


def test_the_critic_of_self_is_the_learner_plus_what_it_differed_by_and_that_of_ema_follows_slowly(settings, monkeypatch):
    nets, theta, phi = small(CHUNKS)
    monkeypatch.setattr(meta_gist, "ema_decay", 0.75)
    snapshot = dict(learner={n: p.clone() for n, p in theta.items()}, critic={n: p.clone() for n, p in phi.items()})
    with torch.no_grad():
        for p in nets[0].parameters():
            p += 1
    meta_gist.follow("ema", nets, snapshot)
    moved = {n: dict(nets[1].named_parameters())[n] - p for n, p in snapshot["critic"].items()}
    assert all(torch.allclose(m, torch.full_like(m, 0.25)) for n, m in moved.items() if n.startswith("blocks"))
    assert torch.allclose(moved["embed.weight"][:13], torch.full((13, 16), 0.25).double())
    assert (moved["embed.weight"][13:] == 0).all() and moved["log_kappa"] == 0 == moved["log_eta"]
    meta_gist.follow("self", nets, snapshot)
    moved = dict(nets[1].named_parameters())["embed.weight"][:13] - snapshot["critic"]["embed.weight"][:13]
    assert torch.allclose(moved, torch.ones(13, 16).double())


@pytest.mark.parametrize("arguments, message", [
    (["--arms=self,frosen"], "there is no arm 'frosen'; did you mean 'frozen'?"),
    (["--pretrain=601"], "pretrain=601 must be at most meta_steps="),
    (["--chunk=4"], "own='dense' is exact for single tokens"),
    (["--own=rollout", "--chunk=5"], "chunk=5 must divide block_size="),
    (["--own=rollout", "--chunk=4", "--n_gist=3"], "n_gist=3 must divide chunk=4"),
    (["--own=rollout", "--chunk=4", "--gist_layer=2"], "gist_layer=2 must be below n_layer=2"),
    (["--own=rollout", "--chunk=4", "--gist_b=own+truth"], "needs gist_layer of 1 or more"),
    (["--inner_steps=9"], "inner_steps=9 must be from 1 to 8"),
    (["--outer_batch=7"], "outer_batch=7 must be a multiple of batch_size="),
    (["--mixed=exact"], "mixed='exact' is not one of"),
    (["--mixed=difference", "--dtype=bfloat16"], "use --mixed=forward"),
    (["--arms=real,first"], "arm 'first' needs a chunk of 2 or more"),
    (["--critic_from=no/such/run"], "no/such/run holds no ckpt.pt"),
    (["--kappa=0"], "kappa=0.0"),
    (["--eta=0"], "eta=0.0"),
    (["--samples=2"], "samples=2 must be 1 with own='dense'"),
    (["--val_chunks=similar", "--block_size=24"], "block_size=24 must be a multiple of 16"),
    (["--train_tokens=20"], "asks for texts of"),
    (["--resume=no/such/run"], "holds no ckpt.pt"),
])
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, *arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") <= 2, error
    assert not list(tmp_path.iterdir())
