"""Stage 1: its mathematics against references, and its script as a user runs it, on the plays at a very small size."""
import copy
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

import self_ce
from model import GPT, GPTConfig
from watch import Watch, new_track, recovered, track_gold

ROOT = Path(__file__).parent.parent
SMALL = ["--meta_steps=24", "--self_steps=16", "--n_embd=32", "--n_head=2", "--block_size=16", "--eval_windows=4",
         "--eval_interval=4", "--save_interval=5", "--warmup=8", "--batch_size=4", "--device=cpu"]


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
    return subprocess.Popen([sys.executable, *launcher, ROOT / "self_ce.py", *arguments], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(*arguments, **options):
    process = start(*arguments, **options)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    return output


def in_process(monkeypatch, *arguments):
    """Runs the script with fresh globals in this process, which saves the seconds of importing torch."""
    monkeypatch.setattr(sys, "argv", ["self_ce.py", *arguments])
    monkeypatch.setattr(signal, "signal", lambda *a: None)
    runpy.run_path(str(ROOT / "self_ce.py"), run_name="__main__")


def log(folder):
    """The rows of a log without their timing."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tok_per_s"} for row in rows]


def weights(folder):
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    return {**state["pair"], **{f"judges.{k}": v for k, v in state["judges"].items()}}


# ---- the mathematics

def small_gpt():
    torch.manual_seed(0)
    model = GPT(GPTConfig(self_ce.vocab, 1, 2, 2, 16)).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.mark.parametrize("reads", ["obs", "next"])
def test_second_order_equals_finite_differences_of_the_inner_step(monkeypatch, reads):
    monkeypatch.setattr(self_ce, "vocab", 13)
    monkeypatch.setattr(self_ce, "loss_reads", reads)
    model = small_gpt()
    theta = {n: p.detach() for n, p in model.named_parameters()}
    tokens = torch.randint(0, 13, (5, 2, 7))
    x, obs, own, outer_x = *tokens[:3], tokens[3]

    def after_step(phi):
        """O(θ') as a function of φ, by autograd where the script differentiates by hand."""
        th = {n: p.clone().requires_grad_() for n, p in theta.items()}
        call = lambda triples, **options: functional_call(model, phi, (triples,), options)
        teacher = self_ce.critic_logits(call, own, obs).softmax(-1).detach()
        logp, teacher = self_ce.align(functional_call(model, th, (x,)).log_softmax(-1), teacher)
        g = torch.autograd.grad(-(teacher * logp).sum(-1).mean(), list(th.values()))
        norm = sum(t.square().sum() for t in g).sqrt()
        moved = {n: p - self_ce.inner_length * t / norm for (n, p), t in zip(theta.items(), g)}
        return F.cross_entropy(functional_call(model, moved, (outer_x[:, :-1],)).flatten(0, 1), outer_x[:, 1:].flatten())

    dphi, gain = self_ce.second_order(model, model, x, obs, own, outer_x, lambda tensors: None)
    before = F.cross_entropy(model(outer_x[:, :-1]).flatten(0, 1), outer_x[:, 1:].flatten())
    assert abs(gain - (before - after_step(theta))) < 1e-12
    for seed in range(3):
        v = {n: torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).double() for n, p in theta.items()}
        shift = lambda e: after_step({n: p + e * v[n] for n, p in theta.items()})
        numeric = (shift(1e-5) - shift(-1e-5)) / 2e-5
        exact = sum((dphi[n] * v[n]).sum() for n in v)
        assert abs(exact - numeric) < 1e-6 * max(1e-3, abs(numeric)), (exact, numeric)


class Names:
    """A critic that names what it is given, and remembers what it read."""
    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, triples, read):
        self.own, self.obs, self.loss = triples[:, 0::3], triples[:, 1::3], triples[:, 2::3]
        return F.one_hot(self.tokens, self_ce.vocab).float() * 50


def test_a_critic_that_names_the_truth_teaches_as_the_real_arm_does_and_each_arm_reads_what_it_should(monkeypatch):
    monkeypatch.setattr(self_ce, "vocab", 13)
    monkeypatch.setattr(self_ce, "chance", lambda *a: None)
    learner = small_gpt().float()
    w, foreign = torch.randint(0, 13, (2, 8)), torch.randint(0, 13, (2, 7))
    obs = w[:, 1:]
    own, critic = learner(w[:, :-1]).argmax(-1), Names(obs)
    loss = {arm: self_ce.self_loss(None, arm, learner, [critic], w, obs, 0, {})[0] for arm in ("real", "frozen")}
    assert torch.equal(loss["real"], loss["frozen"]) and torch.equal(critic.obs, obs) and torch.equal(critic.own, own)
    assert torch.all(critic.loss == 13)
    self_ce.self_loss(None, "shuffled", learner, [critic], w, foreign, 0, {})
    assert torch.equal(critic.obs, foreign)
    self_ce.self_loss(None, "sharpen", learner, [critic], w, obs, 0, {})
    assert torch.equal(critic.obs, own)


def test_no_gradient_flows_through_the_target(monkeypatch):
    monkeypatch.setattr(self_ce, "vocab", 13)
    monkeypatch.setattr(self_ce, "chance", lambda *a: None)
    for kind in ("argmax", "soft"):
        monkeypatch.setattr(self_ce, "target", kind)
        learner = small_gpt().float()
        w = torch.randint(0, 13, (2, 8))
        x, obs = w[:, :-1], w[:, 1:]
        self_ce.self_loss(None, "self", learner, [learner], w, obs, 0, {})[0].backward()
        named = self_ce.critic_logits(learner, learner(x).argmax(-1), obs).detach()
        told = named.softmax(-1) if kind == "soft" else named.argmax(-1)
        by_hand = torch.autograd.grad(F.cross_entropy(learner(x).flatten(0, 1), told.flatten(0, 1)),
                                      list(learner.parameters()))
        for p, g in zip(learner.parameters(), by_hand):
            assert torch.allclose(p.grad, g, atol=1e-6)


def test_a_hack_is_three_evaluations_above_the_best_and_counts_from_the_first():
    def hack_of(golds):
        track = new_track()
        for i, nats in enumerate(golds):
            track_gold(track, dict(step=10 * i, gold_nats=nats, gold_bpb=nats, proxy=None if i == 0 else 1.0), 0.1)
        return track["steps_to_hack"], track["gold_best"]
    assert hack_of([4, 3.9, 4.05, 4.1, 4.2]) == (20, 3.9)
    assert hack_of([4, 3.9, 4.05, 3.99, 4.2, 4.2]) == (None, 3.9)
    assert hack_of([4, 4.09, 4.09, 4.09]) == (None, 4)
    assert hack_of([4, 4.2, 4.2, 4.2, 3, 4, 4, 4]) == (10, 3)
    assert recovered(dict(gold_start=4, gold_end=3.8), dict(gold_start=4, gold_end=3.6)) == pytest.approx(0.5)
    assert recovered(dict(gold_start=4, gold_end=3.8), None) is None


def test_flips_raise_the_critics_error_on_held_out_text_and_more_than_random_tokens_do(monkeypatch):
    """A critic that has half learned to judge leans on the output too, and that is what a flip finds."""
    monkeypatch.setattr(self_ce, "vocab", 13)
    torch.manual_seed(0)
    critic = GPT(GPTConfig(13, 1, 2, 2, 32))
    optimizer = torch.optim.Adam(critic.parameters(), 3e-3)
    batch = lambda seed: torch.randint(0, 13, (32, 8), generator=torch.Generator().manual_seed(seed))
    own_of = lambda obs, seed: torch.where(torch.rand(32, 8, generator=torch.Generator().manual_seed(seed)) < 0.6, obs,
                                           batch(seed + 1))
    for step in range(70):
        obs = batch(step)
        self_ce.imitation(self_ce.critic_logits(critic, own_of(obs, 1000 + step), obs), obs).backward()
        optimizer.step()
        optimizer.zero_grad()
    obs = batch(5000)
    own, u = own_of(obs, 6000), torch.rand(32, 8, 2, generator=torch.Generator().manual_seed(7))
    monkeypatch.setattr(self_ce, "adversarial", 0.5)
    error = {"none": self_ce.imitation(self_ce.critic_logits(critic, own, obs), obs)}
    for kind in ("random", "flips"):
        monkeypatch.setattr(self_ce, "adversary", kind)
        worse = self_ce.corrupted(critic, own, obs, u)
        assert torch.equal(worse[u[..., 0] >= 0.5], own[u[..., 0] >= 0.5])
        error[kind] = self_ce.imitation(self_ce.critic_logits(critic, worse, obs), obs)
    harm = {kind: (error[kind] - error["none"]).item() for kind in ("random", "flips")}
    assert harm["flips"] > 0.02 and harm["flips"] > 2 * harm["random"], harm


def test_a_rescue_restores_weights_optimizer_and_watch_exactly():
    learner, critic, watch = small_gpt(), small_gpt(), Watch()
    optimizer = torch.optim.AdamW(learner.parameters(), 0.1)
    parts = dict(pair=learner, judges=[critic], optimizer=optimizer, watch=watch)

    def step():
        learner(torch.randint(0, 13, (2, 7))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.state["surprise"]["reference"] = (watch.state["surprise"]["reference"] or 0.0) + 1.0
    step()
    at = dict(track=new_track(), real_targets=0)
    at["good"] = copy.deepcopy({k: parts[k].state_dict() for k in ("pair", "optimizer", "watch")})
    step()
    assert not torch.equal(learner.head.weight, at["good"]["pair"]["head.weight"])
    self_ce.rescue(None, None, at, parts, learner, learner, 7)  # rescue_steps is 0: only the way back
    for module in learner, critic:
        assert all(torch.equal(v, at["good"]["pair"][n]) for n, v in module.state_dict().items())
    for i, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, at["good"]["optimizer"]["state"][i][n]) for n, v in state.items())
    assert watch.state_dict() == at["good"]["watch"] and at["track"]["rescues"] == [7]


def test_a_bounded_step_stays_within_its_bound(monkeypatch):
    run = type("Run", (), dict(average=lambda self, tensors: None))()
    learner, x = small_gpt(), torch.randint(0, 13, (2, 7))
    logits, before = learner(x).detach(), [p.detach().clone() for p in learner.parameters()]
    with torch.no_grad():
        for p in learner.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).double()

    def divergence():
        logp = logits.log_softmax(-1)
        return (logp.exp() * (logp - learner(x).log_softmax(-1))).sum(-1).mean().item()
    monkeypatch.setattr(self_ce, "trust", 0.01 * divergence())
    self_ce.hold_back(run, learner, before, x, logits)
    assert divergence() == pytest.approx(self_ce.trust, rel=0.1)
    held = learner.head.weight.clone()
    self_ce.hold_back(run, learner, before, x, logits)  # within the bound nothing moves
    assert torch.allclose(held, learner.head.weight, atol=1e-3)


def test_the_small_levers_compute_what_their_names_say(monkeypatch):
    monkeypatch.setattr(self_ce, "vocab", 13)
    run = type("Run", (), dict(rank=0, ranks=1, device=torch.device("cpu")))()
    learner, critic, x = small_gpt(), small_gpt(), torch.randint(0, 13, (2, 7))
    # ema: the distance to the learner shrinks by the share that is not kept
    for p in critic.parameters():
        p.data += 1.0
    monkeypatch.setattr(self_ce, "ema_decay", 0.75)
    self_ce.follow(critic, learner)
    assert all(torch.allclose(c - p, torch.full_like(p, 0.75)) for c, p in zip(critic.parameters(), learner.parameters()))
    # anchor: no force at the snapshot, KL away from it
    snapshot = {n: p.detach().clone() for n, p in learner.named_parameters()}
    assert abs(self_ce.leash(learner, snapshot, x, learner(x))) < 1e-12
    p, q = critic(x).softmax(-1), learner(x).softmax(-1)
    assert torch.allclose(self_ce.leash(learner, snapshot, x, critic(x)), (p * (p / q).log()).sum(-1).mean())
    # keep_meta on random strings reads no corpus at all, and every step others
    pairs = [torch.stack(self_ce.kept_pairs(run, None, None, None, step)) for step in (0, 0, 1)]
    assert torch.equal(pairs[0], pairs[1]) and not torch.equal(pairs[0], pairs[2]) and pairs[0].max() == 12
    # n_critic: the judges' mean distribution, and where they are not of one mind
    obs = torch.zeros(1, 3).long()
    judges = [Names(torch.tensor([[1, 2, 3]])), Names(torch.tensor([[1, 2, 4]])), Names(torch.tensor([[1, 5, 4]]))]
    named, disagreement = self_ce.critic_target(judges, obs, obs)
    assert named.tolist() == [[1, 2, 4]] and disagreement == pytest.approx(2 / 3)
    # critic_part: only that part is the critic's own
    monkeypatch.setattr(self_ce, "critic_part", "block")
    role = self_ce.in_critics_role(learner)
    own = {n for (n, p), q in zip(role.named_parameters(), learner.parameters()) if p is not q}
    assert own == {n for n, _ in learner.named_parameters() if n.startswith("blocks.1.") or n == "head.weight"}


# ---- the script

def test_killed_in_each_phase_a_resumed_run_equals_one_without_interruption(tmp_path):
    settings = [*SMALL, "--arms=real,shuffled,ema", "--learning_rate=5e-3", "--pred=sample", "--order=2",
                "--keep_meta=0.1", "--keep=recorded", "--dtype=float64", "--critic_part=head", "--meta_steps=120",
                "--self_steps=40", "--rescue_steps=3"]
    whole = start(*settings, f"--out_dir={tmp_path / 'whole'}")
    broken = tmp_path / "broken"

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

    for arm, step in (("meta", 60), ("shuffled", 32), ("ema", 12)):
        kill_at(start(*settings, f"--out_dir={broken}") if arm == "meta" else start(f"--resume={broken}"), arm, step)
        at = torch.load(broken / "ckpt.pt", weights_only=True)
        assert at["arm"] == arm and step - 5 < at["step"]
    finish(f"--resume={broken}")
    assert whole.wait(60) == 0
    assert log(broken) == log(tmp_path / "whole") and len(log(broken)) == 31 + 3 * 11
    arms = [json.loads((out / "summary.json").read_text())["arms"] for out in (broken, tmp_path / "whole")]
    assert arms[0] == arms[1] and any(0 < step < 32 for arm in arms[0].values() for step in arm["rescues"])
    reports = [sorted(p.name for p in (out / "hacks").iterdir()) for out in (broken, tmp_path / "whole")]
    assert reports[0] == reports[1] and "001.md" in reports[0]
    assert (broken / "samples.txt").read_text() == (tmp_path / "whole" / "samples.txt").read_text()
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(value, weights(broken)[name]), name


def test_two_ranks_compute_what_one_does(tmp_path):
    settings = [*SMALL, "--dtype=float64", "--pred=sample", "--target=soft", "--order=2", "--keep_meta=0.1"]
    finish(*settings, f"--out_dir={tmp_path / '1'}")
    finish(*settings, f"--out_dir={tmp_path / '2'}", ranks=2)
    one, two = log(tmp_path / "1"), log(tmp_path / "2")
    assert len(one) == len(two) == 7 + 6 * 5
    for a, b in zip(one, two):
        for key in a:
            number = isinstance(a[key], float)
            near = pytest.approx(a[key], rel=2e-6) if number else a[key]  # the log keeps six digits
            assert b[key] == near, (a["arm"], a["step"], key)
    w2 = weights(tmp_path / "2")
    assert max((v - w2[n]).abs().max() for n, v in weights(tmp_path / "1").items()) < 1e-9


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_a_checkpoint_that_goes_on(tmp_path, number):
    out = tmp_path / "run"
    process = start(*SMALL, "--meta_steps=100000", f"--out_dir={out}")
    while not (out / "log.jsonl").exists() or (out / "log.jsonl").read_text().count("\n") < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(number)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 128 + number and f"--resume={out}" in output
    step = torch.load(out / "ckpt.pt", weights_only=True)["step"]
    assert step >= max(row["step"] for row in log(out))
    process = start(f"--resume={out}")
    while log(out)[-1]["step"] <= step + 4:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.kill()
    process.wait()
    steps = [row["step"] for row in log(out)]
    assert steps == list(range(0, steps[-1] + 1, 4))


def test_the_defaults_run_on_the_plays_and_leave_what_the_readme_says(tmp_path):
    out = tmp_path / "run"
    began = time.time()
    output = finish("--meta_steps=20", "--self_steps=10", f"--out_dir={out}")
    assert {p.name for p in out.iterdir()} >= {"log.jsonl", "ckpt.pt", "config.json", "samples.txt", "summary.json",
                                               "self_ce.py"}
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["arms"]) == ["real", "self", "frozen", "ema", "shuffled", "sharpen"]
    assert len({arm["gold_start"] for arm in summary["arms"].values()} | {summary["gold_meta_end"]}) == 1
    assert summary["arms"]["real"]["recovered"] == 1 and summary["bpb_meta_end"] < 4.5
    assert all(name in output for name in ("steps to hack", "sharpen", "bits/byte", "tokens/s"))
    assert (out / "samples.txt").read_text().count("critic names") == 2 * 7
    drawn = subprocess.run([sys.executable, ROOT / "plot.py", out], capture_output=True, text=True, timeout=60)
    assert drawn.returncode == 0 and "| sharpen | 1 |" in drawn.stdout and (out / "curves.png").stat().st_size > 10000


def test_a_finished_run_takes_further_arms_and_lends_its_meta_phase(tmp_path, monkeypatch, capsys):
    settings = ["--meta_steps=8", "--self_steps=4", *SMALL[2:]]
    whole, parts, lent = tmp_path / "whole", tmp_path / "parts", tmp_path / "lent"
    in_process(monkeypatch, *settings, "--arms=real,frozen", f"--out_dir={whole}")
    in_process(monkeypatch, *settings, "--arms=real", f"--out_dir={parts}")
    in_process(monkeypatch, f"--resume={parts}", "--arms=frozen")
    in_process(monkeypatch, *settings, "--arms=real,frozen", f"--out_dir={lent}", f"--start={parts}")
    arms = json.loads((whole / "summary.json").read_text())["arms"]
    assert set(arms) == {"real", "frozen"}
    for other in parts, lent:
        assert json.loads((other / "summary.json").read_text())["arms"] == arms
    assert log(lent) == [row for row in log(whole) if row["arm"] != "meta"]
    with pytest.raises(SystemExit):
        in_process(monkeypatch, *settings, "--meta_steps=9", f"--out_dir={tmp_path / 'no'}", f"--start={parts}")
    assert "meta_steps=9 differs from 8" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_wandb_is_imported_only_if_asked(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    tiny = ["--meta_steps=2", "--self_steps=2", "--arms=real", *SMALL[2:]]
    in_process(monkeypatch, *tiny, f"--out_dir={tmp_path / 'a'}")
    assert "wandb" not in sys.modules
    monkeypatch.setenv("WANDB_SILENT", "true")
    finish(*tiny, f"--out_dir={tmp_path / 'b'}", "--wandb_log=offline")
    logged = next((tmp_path / "wandb").glob("offline-run-*"))
    assert list(logged.glob("*.wandb")) and list(logged.glob("files/media/*/*")), "no table or picture"


@pytest.mark.parametrize("arguments, message", [
    (["--meta_step=3"], "unknown setting 'meta_step'; did you mean 'meta_steps'?"),
    (["--arms=self,frosen"], "there is no arm 'frosen'; did you mean 'frozen'?"),
    (["--arms=self,self"], "names an arm twice"),
    (["--n_embd=100", "--n_head=3"], "n_embd=100 must be an even multiple of n_head=3"),
    (["--n_layer=0"], "n_layer=0 must be above 0"),
    (["--order=3"], "order=3 must be 1"),
    (["--rescue_steps=5", "--meta_steps=50"], "needs meta_steps of 100 or more"),
    (["--n_critic=200"], "n_critic=200 must be from 1 to 100"),
    (["--ema_decay=1"], "ema_decay=1.0 must be below 1"),
    (["--target=hard"], "target='hard' is not one of \"argmax\", \"soft\""),
    (["--block_size=10000000"], "block_size=10000000 must be below the"),
    (["--train_tokens=16", "--block_size=16"], "block_size=16 must be below the 16 tokens of the train split"),
    (["--dataset=no/such/file.txt"], "no/such/file.txt"),
    (["--resume=no/such/run"], "holds no ckpt.pt"),
])
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, *arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") <= 2, error
    assert not list(tmp_path.iterdir())


def test_ranks_that_do_not_divide_the_batch_are_refused(monkeypatch, capsys):
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=3).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit):
        in_process(monkeypatch)
    assert "batch_size=8 and eval_windows=64 must both be multiples of the 3 ranks" in capsys.readouterr().err


def test_resuming_with_changed_settings_or_another_tokenizer_is_refused(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    in_process(monkeypatch, "--meta_steps=2", "--self_steps=2", "--arms=", *SMALL[2:], f"--out_dir={out}")
    before = (out / "log.jsonl").read_text()
    state = torch.load(out / "ckpt.pt", weights_only=True)
    for arguments, message in ((["--learning_rate=0.5"], "learning_rate=0.5 differs from 0.001"),
                               ([], "another corpus or tokenizer")):
        if not arguments:
            torch.save(dict(state, corpus=["0" * 64] * 3), out / "ckpt.pt")
        with pytest.raises(SystemExit) as stop:
            in_process(monkeypatch, f"--resume={out}", *arguments)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert (out / "log.jsonl").read_text() == before


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, *SMALL, "--learning_rate=1e30", "--arms=", f"--out_dir={tmp_path / 'run'}")
    output = capsys.readouterr().out
    assert stop.value.code == 3 and "is not finite" in output and f"{tmp_path / 'run' / 'ckpt.pt'}" in output
    state = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    assert all(torch.isfinite(p).all() for p in state["pair"].values())
