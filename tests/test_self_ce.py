"""Stage 1: its mathematics against references, and its script as a user runs it, on the plays at a very small
size."""
import copy
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

import self_ce
from conftest import ROOT, finish, in_process, kill_at, log, small_gpt, start, summary
from equations import by_name, dot
from model import GPT, GPTConfig
from watch import Watch, new_track

V = 13
TINY = ["--meta_steps=2", "--self_steps=2", "--n_embd=32", "--n_head=2", "--block_size=16", "--batch_size=4",
        "--eval_windows=4", "--eval_interval=4", "--save_interval=5", "--warmup=8", "--device=cpu"]
SMALL = ["--meta_steps=24", "--self_steps=16", *TINY[2:]]


@pytest.fixture(autouse=True)
def of_a_toy(monkeypatch):
    monkeypatch.setattr(self_ce, "vocab", V)


def tokens(*shape, seed=0):
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


# ---- second order

def test_second_order_equals_finite_differences_of_the_inner_step():
    model, (text, outer_text), own = small_gpt(), tokens(2, 2, 8), tokens(2, 7, seed=1)
    theta = by_name(model)
    ce = lambda weights, w: F.cross_entropy(functional_call(model, weights, (w[:, :-1],)).flatten(0, 1),
                                            w[:, 1:].flatten())

    def after_step(phi):
        """O(θ') as a function of φ, by autograd where the script differentiates by hand."""
        th = {n: p.clone().requires_grad_() for n, p in theta.items()}
        call = lambda triples, **options: functional_call(model, phi, (triples,), options)
        teacher = self_ce.critic_logits(call, own, text[:, 1:]).softmax(-1).detach()
        loss = -(teacher * functional_call(model, th, (text[:, :-1],)).log_softmax(-1)).sum(-1).mean()
        g = torch.autograd.grad(loss, list(th.values()))
        norm = sum(t.square().sum() for t in g).sqrt()
        moved = {n: p - self_ce.inner_length * t / norm for (n, p), t in zip(theta.items(), g)}
        return ce(moved, outer_text)

    dphi, gain = self_ce.second_order(model, model, text, own, outer_text, lambda tensors: None)
    assert abs(gain - (ce(theta, outer_text) - after_step(theta))) < 1e-12
    for seed in range(3):
        rng = torch.Generator().manual_seed(seed)
        v = {n: torch.randn(p.shape, generator=rng).double() for n, p in theta.items()}
        shift = lambda e: after_step({n: p + e * v[n] for n, p in theta.items()})
        numeric = (shift(1e-5) - shift(-1e-5)) / 2e-5
        assert abs(dot(dphi, v) - numeric) < 1e-6 * max(1e-3, abs(numeric))


# ---- the signal

class Names:
    """A critic that names what it is given, and remembers what it read."""
    def __init__(self, named):
        self.named = named

    def __call__(self, triples, read):
        self.own, self.obs, self.loss = triples[:, 0::3], triples[:, 1::3], triples[:, 2::3]
        return F.one_hot(self.named, V).float() * 50


def test_a_critic_that_names_the_truth_teaches_as_the_real_arm_does_and_each_arm_reads_what_it_should():
    learner, text, foreign = small_gpt(), tokens(2, 8), tokens(2, 7, seed=1)
    obs, own = text[:, 1:], learner(text[:, :-1]).argmax(-1)
    critic, tally = Names(obs), {}
    loss = {arm: self_ce.self_loss(arm, learner, critic, text, obs, tally) for arm in ("real", "frozen")}
    assert torch.equal(loss["real"], loss["frozen"]) and tally["agreement"] == 2
    assert torch.equal(critic.obs, obs) and torch.equal(critic.own, own) and (critic.loss == V).all()
    phases = SimpleNamespace(text=lambda step, stream: torch.cat((text[:, :1], foreign), 1))
    for arm, expected in (("frozen", obs), ("shuffled", foreign), ("sharpen", own)):
        seen = self_ce.observed(phases, arm, text, 0)
        self_ce.self_loss(arm, learner, critic, text, seen, tally)
        assert torch.equal(critic.obs, expected), arm


@pytest.mark.parametrize("kind", ["argmax", "soft"])
def test_no_gradient_flows_through_the_target(monkeypatch, kind):
    monkeypatch.setattr(self_ce, "target", kind)
    learner, text = small_gpt(), tokens(2, 8)
    x, obs = text[:, :-1], text[:, 1:]
    self_ce.self_loss("self", learner, learner, text, obs, {}).backward()
    named = self_ce.critic_logits(learner, learner(x).argmax(-1), obs).detach()
    told = named.softmax(-1) if kind == "soft" else named.argmax(-1)
    loss = F.cross_entropy(learner(x).flatten(0, 1), told.flatten(0, 1))
    for p, g in zip(learner.parameters(), torch.autograd.grad(loss, list(learner.parameters()))):
        assert torch.allclose(p.grad, g, atol=1e-12)


def test_the_meta_phase_trains_both_roles_on_real_tokens_and_after_a_hack_on_hacked_outputs_too():
    learner, hacked, text = small_gpt(), small_gpt(), tokens(2, 8)
    with torch.no_grad():
        hacked.head.weight.neg_()
    x, obs = text[:, :-1], text[:, 1:]
    ce = lambda logits: F.cross_entropy(logits.flatten(0, 1), obs.flatten())
    judged = lambda model: ce(self_ce.critic_logits(learner, model(x).argmax(-1), obs))
    plain, own = self_ce.meta_loss(None, learner, text, 0, {})
    assert torch.allclose(plain, ce(learner(x)) + judged(learner)) and torch.equal(own, learner(x).argmax(-1))
    both, _ = self_ce.meta_loss(None, learner, text, 0, {}, hacked)
    assert torch.allclose(both, plain + judged(hacked)) and not torch.equal(judged(hacked), judged(learner))


def test_flips_raise_the_critics_error_on_held_out_text_and_more_than_random_tokens_do(monkeypatch):
    """A critic that has half learned to judge leans on the output too, and that is what a flip finds."""
    torch.manual_seed(0)
    critic = GPT(GPTConfig(V, 1, 2, 2, 32))
    optimizer = torch.optim.Adam(critic.parameters(), 3e-3)
    chance = lambda seed, *more: torch.rand(32, 8, *more, generator=torch.Generator().manual_seed(seed))
    own_of = lambda obs, seed: torch.where(chance(seed) < 0.6, obs, tokens(32, 8, seed=seed + 1))
    error = lambda own, obs: self_ce.cross_entropy(self_ce.critic_logits(critic, own, obs), obs)
    for step in range(25):
        obs = tokens(32, 8, seed=step)
        error(own_of(obs, 1000 + step), obs).backward()
        optimizer.step()
        optimizer.zero_grad()
    obs, u = tokens(32, 8, seed=5000), chance(7, 2)
    own, harm = own_of(obs, 6000), {}
    monkeypatch.setattr(self_ce, "adversarial", 0.5)
    for kind in ("random", "flips"):
        monkeypatch.setattr(self_ce, "adversary", kind)
        worse = self_ce.replaced(critic, own, obs, u)
        assert torch.equal(worse[u[..., 0] >= 0.5], own[u[..., 0] >= 0.5]) and worse.max() < V
        harm[kind] = (error(worse, obs) - error(own, obs)).item()
    assert harm["flips"] > 0.02 and harm["flips"] > 2 * harm["random"], harm


def test_practice_is_on_random_strings_that_change_with_the_step():
    class Keeps:
        def __call__(self, triples, read):
            self.triples = triples
            return torch.zeros(*triples[:, 2::3].shape, V)
    learner, told = Keeps(), []

    def chance(step, shape, stream):
        rng = np.random.default_rng([stream, step])
        return torch.from_numpy(rng.random((50, *shape)))
    for step in (0, 0, 1):
        self_ce.practice(SimpleNamespace(chance=chance), learner, step)  # it is given no corpus
        told.append(learner.triples)
    assert torch.equal(told[0], told[1]) and not torch.equal(told[0], told[2])
    own, obs = told[0][:, 0::3], told[0][:, 1::3]
    for strings in own, obs:
        assert strings.unique().tolist() == list(range(V))
    assert abs((own == obs).float().mean() - 1 / V) < 0.02


def test_a_rescue_restores_weights_optimizer_and_watch_exactly():
    learner, critic, watch = small_gpt(), small_gpt(), Watch()
    optimizer = torch.optim.AdamW(learner.parameters(), 0.1)
    parts = dict(learner=learner, critic=critic, optimizer=optimizer, watch=watch)
    run = SimpleNamespace(autocast=nullcontext, say=lambda text: None)
    loop = SimpleNamespace(parts=parts, watch=watch, run=run, arm="self", kept={},
                           at=dict(track=new_track(), real_targets=0))

    def step():
        learner(tokens(2, 7)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.state["surprise"]["reference"] = (watch.state["surprise"]["reference"] or 0.0) + 1.0
    step()
    self_ce.keep_good(loop, 0)
    good = copy.deepcopy(loop.kept["good"])
    step()
    assert not torch.equal(learner.head.weight, good["learner"]["head.weight"])
    watch.state["probe"].update(sum=1.0, threshold=2.0)  # on its way to an alarm: these weights are not good
    self_ce.keep_good(loop, 4)
    self_ce.rescue(loop, 7)  # rescue_steps is 0: only the way back
    for module in learner, critic:
        assert all(torch.equal(v, good["learner"][n]) for n, v in module.state_dict().items())
    for i, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, good["optimizer"]["state"][i][n]) for n, v in state.items())
    for name, state in watch.state_dict().items():
        assert state == dict(good["watch"][name], sum=0.0, since=7)
    assert loop.at["track"]["rescues"] == [7]
    step()  # what is kept does not move with the weights
    kept = lambda: loop.kept["good"]["learner"]
    assert all(torch.equal(v, good["learner"][n]) for n, v in kept().items())
    self_ce.keep_good(loop, 8)
    assert all(torch.equal(v, kept()[n]) for n, v in learner.state_dict().items())


# ---- the script

def test_killed_in_each_phase_a_resumed_run_equals_one_without_interruption(tmp_path, monkeypatch):
    settings = [*SMALL, "--arms=real,ema", "--learning_rate=5e-3", "--keep_meta=0.1", "--adversarial=0.2",
                "--dtype=float64", "--meta_steps=104", "--self_steps=40", "--rescue_steps=3"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    running = start("self_ce.py", *settings, f"--out_dir={whole}")
    for arm, step in (("meta", 60), ("ema", 8)):
        which = [*settings, f"--out_dir={broken}"] if arm == "meta" else [f"--resume={broken}"]
        kill_at(start("self_ce.py", *which), broken, arm, step)
        at = torch.load(broken / "ckpt.pt", weights_only=True)
        assert at["arm"] == arm and step - 11 < at["step"]  # the last one may still be being written
    in_process(monkeypatch, "self_ce.py", f"--resume={broken}")
    printed = running.communicate(timeout=60)[0]
    assert running.returncode == 0, printed
    assert log(broken) == log(whole) and len(log(broken)) == 27 + 2 * 11
    assert summary(broken)["arms"] == summary(whole)["arms"]
    assert summary(whole)["arms"]["ema"]["rescues"][0] > 8  # after the kill
    files = [{p.name for p in (out / "hacks").iterdir()} for out in (broken, whole)]
    assert files[0] == files[1] and "001.md" in files[0]
    for name in ("samples.txt", "texts.jsonl", "hacks/index.md"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
    ends = [torch.load(out / "ckpt.pt", weights_only=True) for out in (broken, whole)]
    for part in ("learner", "critic"):
        assert all(torch.equal(p, ends[1][part][n]) for n, p in ends[0][part].items())


RANDOM_START = """import runpy, sys
import torch
sys.path.insert(0, {root!r})
from model import GPT
GPT.initialise = lambda model: [torch.nn.init.normal_(p, std=0.3) for p in model.parameters()]
runpy.run_path({root!r} + "/self_ce.py", run_name="__main__")
"""


def test_two_ranks_compute_what_one_does(tmp_path):
    """From random weights: tokens that were never seen tie in a new model, and rounding decides which is the
    likeliest."""
    script = tmp_path / "script.py"
    script.write_text(RANDOM_START.format(root=str(ROOT)))
    settings = [*SMALL, "--dtype=float64", "--target=soft", "--order=2", "--keep_meta=0.1",
                "--adversarial=0.2", "--arms=real,ema,shuffled", "--meta_steps=16", "--self_steps=8"]
    one, two = tmp_path / "1", tmp_path / "2"
    finish(script, *settings, f"--out_dir={one}")
    finish(script, *settings, f"--out_dir={two}", ranks=2)
    assert len(log(one)) == 5 + 3 * 3
    for a, b in zip(log(one), log(two), strict=True):
        for key in a:
            number = isinstance(a[key], float)
            near = pytest.approx(a[key], rel=1e-5, abs=1e-9) if number else a[key]  # the log keeps six digits
            assert b[key] == near, (a["arm"], a["step"], key)
    ends = [torch.load(out / "ckpt.pt", weights_only=True)["learner"] for out in (one, two)]
    assert max((p - ends[1][n]).abs().max() for n, p in ends[0].items()) < 1e-9


def test_levers_of_the_critic_move_the_arms_whose_critic_is_made_of_the_learner_alone(tmp_path, monkeypatch):
    plain, ends = tmp_path / "plain", []
    run = lambda out, *more: in_process(monkeypatch, "self_ce.py", *TINY, f"--out_dir={out}", *more)
    run(plain)
    for out, levers in ((tmp_path / "kept", ["--keep_meta=1"]), (tmp_path / "slower", ["--self_rate=0.5"])):
        run(out, f"--start={plain}", *levers)
        end = lambda folder, arm: torch.load(folder / "ends" / f"{arm}.pt", weights_only=True)["weights"]
        arms = [arm for arm in self_ce.ARMS if any(
            not torch.equal(p, end(out, arm)[n]) for n, p in end(plain, arm).items())]
        ends.append(arms)
    assert ends == [["self", "ema"], ["self", "frozen", "ema", "shuffled", "sharpen"]]


def test_signals_end_a_run_with_a_checkpoint_that_goes_on(tmp_path):
    out, which = tmp_path / "run", [*SMALL, "--meta_steps=100000", f"--out_dir={tmp_path / 'run'}"]
    for number in (signal.SIGTERM, signal.SIGINT):
        process, before = start("self_ce.py", *which), log(out)[-1]["step"] if out.exists() else -1
        while not (out / "log.jsonl").exists() or not log(out) or log(out)[-1]["step"] <= before + 8:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        process.send_signal(number)
        output = process.communicate(timeout=30)[0]
        assert process.returncode == 128 + number and f"--resume={out}" in output
        assert torch.load(out / "ckpt.pt", weights_only=True)["step"] >= log(out)[-1]["step"]
        which = [f"--resume={out}"]
    steps = [row["step"] for row in log(out)]
    assert steps == list(range(0, steps[-1] + 1, 4))


def test_the_defaults_run_on_the_plays_and_leave_what_the_readme_says(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    in_process(monkeypatch, "self_ce.py", "--meta_steps=20", "--self_steps=5", "--eval_windows=16",
               f"--out_dir={out}")
    assert {p.name for p in out.iterdir() if not p.name.startswith(".")} == {
        "config.json", "log.jsonl", "samples.txt", "texts.jsonl", "summary.json", "curves.png", "report.html",
        "ckpt.pt", "ckpt-before.pt", "ends", "sources"}
    arms, printed = summary(out)["arms"], capsys.readouterr().out
    assert list(arms) == ["real", "self", "frozen", "ema", "shuffled", "sharpen"]
    assert arms["real"]["recovered"] == 1 and summary(out)["bpb_meta_end"] < 4.5
    shown = "hacked at", "sharpen", "bits/byte", "tokens/s", "plot: ", "page: "
    assert all(name in printed for name in shown)
    samples = (out / "samples.txt").read_text()
    assert samples.count("==== after") == 7 and samples.count("output  ") == samples.count("target  ")
    assert {"self_ce.py", "phases.py", "model.py"} <= {p.name for p in (out / "sources").iterdir()}


def test_wandb_is_imported_only_if_asked_and_is_shown_rows_table_and_picture(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    in_process(monkeypatch, "self_ce.py", *TINY, "--arms=real", f"--out_dir={tmp_path / 'a'}")
    assert "wandb" not in sys.modules
    shown, began, left = [], [], []

    class Artifact:
        def __init__(self, name, type):
            left.append(name)
        add_file = add_dir = lambda self, path, name=None: left.append(Path(path).name)
    account = SimpleNamespace(log=shown.append, finish=lambda: shown.append("end"),
                              log_artifact=lambda a: None, define_metric=lambda name, step_metric=None: None)
    wandb = SimpleNamespace(init=lambda **given: began.append(given) or account,
                            Table=lambda columns, data: (columns, data), Artifact=Artifact)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    out = tmp_path / "b"
    in_process(monkeypatch, "self_ce.py", *TINY, "--arms=real", f"--out_dir={out}", "--wandb_log=offline")
    assert [(run["name"], run["job_type"], run["mode"]) for run in began] == [
        ("b meta", "meta", "offline"), ("b real", "real", "offline")]
    group, = {run["group"] for run in began}
    assert [run["id"] for run in began] == [f"{group}-meta", f"{group}-real"]  # arms lie over each other
    ends = [k for k, row in enumerate(shown) if row == "end"]
    assert [row["step"] for row in shown[ends[0] + 1:-2]] == [0, 2] and len(ends) == 2
    columns, data = shown[-2]["arms"]
    assert data[0][0] == "real" and len(columns) == len(data[0])
    assert left == [f"{group}-report", "report.html", "curves.png", "samples.txt", "summary.json"]
    in_process(monkeypatch, "self_ce.py", f"--resume={out}", "--arms=frozen")
    assert [run["id"] for run in began[2:]] == [f"{group}-meta", f"{group}-frozen"]


@pytest.mark.parametrize("arguments, message", [
    (["--meta_step=3"], "unknown setting 'meta_step'; did you mean 'meta_steps'?"),
    (["--arms=self,frosen"], "there is no arm 'frosen'; did you mean 'frozen'?"),
    (["--arms=self,self"], "names an arm twice"),
    (["--n_embd=100", "--n_head=3"], "n_embd=100 must be an even multiple of n_head=3"),
    (["--n_layer=0"], "n_layer=0 must be above 0"),
    (["--order=3"], "order=3 must be 1"),
    (["--order=2", "--compile=true"], "order=2 needs compile=False"),
    (["--rescue_steps=5", "--meta_steps=50"], "rescue_steps=5 waits for the watch's alarm"),
    (["--ema_decay=1"], "ema_decay=1.0 must be below 1"),
    (["--adversarial=1.5"], "adversarial=1.5 must be at most 1"),
    (["--target=hard"], "target='hard' is not one of \"argmax\", \"soft\""),
    (["--block_size=1000000"], "block_size=1000000 asks for texts"),
    (["--block_size=100000000"], "batch_size=8, block_size=100000000, vocab=512: 1,638 GB at least"),
    (["--train_tokens=16", "--block_size=16"], "block_size=16 asks for texts of 17 tokens"),
    (["--dataset=no/such/file.txt"], "no/such/file.txt"),
    (["--resume=no/such/run"], "holds no ckpt.pt"),
    (["--start=no/such/run"], "holds no ckpt.pt"),
])
def test_bad_settings_are_refused_before_anything_is_written(
        tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, "self_ce.py", *arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") <= 2, error
    assert not list(tmp_path.iterdir())


def test_ranks_that_do_not_divide_the_batch_are_refused(monkeypatch, capsys):
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=3).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit):
        in_process(monkeypatch, "self_ce.py")
    assert "batch_size=8 must be a multiple of the 3 ranks times grad_accum=1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        in_process(monkeypatch, "self_ce.py", "--batch_size=9")
    assert "eval_windows=64 must be a multiple of the 3 ranks" in capsys.readouterr().err


def test_resuming_with_changed_settings_or_another_tokenizer_is_refused(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    in_process(monkeypatch, "self_ce.py", *TINY, "--arms=", f"--out_dir={out}")
    before = {p: p.read_bytes() for p in out.iterdir() if p.is_file() and p.name != "ckpt.pt"}
    state = torch.load(out / "ckpt.pt", weights_only=True)
    for arguments, message in ((["--learning_rate=0.5"], "learning_rate=0.5 differs from 0.001"),
                               ([], "another corpus or tokenizer")):
        if not arguments:
            torch.save(dict(state, corpus=["0" * 64] * 3), out / "ckpt.pt")
        with pytest.raises(SystemExit) as stop:
            in_process(monkeypatch, "self_ce.py", f"--resume={out}", *arguments)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert {p: p.read_bytes() for p in before} == before


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, "self_ce.py", *SMALL, "--learning_rate=1e30", "--arms=", f"--out_dir={out}")
    printed = capsys.readouterr().out
    assert stop.value.code == 3 and "is not finite" in printed
    assert f"python self_ce.py --resume={out} --learning_rate=" in printed
    state = torch.load(out / "ckpt.pt", weights_only=True)
    assert all(torch.isfinite(p).all() for p in state["learner"].values())
