"""The loop that the three scripts share, through the smallest of them."""
import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import checkpoints
import phases
from conftest import in_process, log, summary
from corpus import open_corpus, val_windows
from model import GPT, GPTConfig
from watch import STREAMS, Gold, Watch

SMALL = ["--meta_steps=8", "--self_steps=12", "--n_embd=32", "--n_head=2", "--block_size=16", "--warmup=8",
         "--batch_size=4", "--eval_windows=4", "--eval_interval=4", "--save_interval=5", "--device=cpu"]


@pytest.fixture
def run_small(monkeypatch, tmp_path):
    """Runs self_ce.py at a very small size with further settings: the folder, of that name."""
    def run_small(name, *settings):
        in_process(monkeypatch, "self_ce.py", *SMALL, *settings, f"--out_dir={tmp_path / name}")
        return tmp_path / name
    return run_small


# ---- arms

def test_every_arm_starts_from_the_snapshot_and_its_end_is_kept(run_small):
    out = run_small("run", "--arms=frozen,real,self")
    found = summary(out)
    assert list(found["arms"]) == ["real", "frozen", "self"]
    assert {arm["gold_start"] for arm in found["arms"].values()} == {found["gold_meta_end"]}
    windows = val_windows(open_corpus("plays", 512).val, 4, 17)
    for arm, kept in found["arms"].items():  # gold of the weights in the file is the arm's last gold
        weights = torch.load(out / "ends" / f"{arm}.pt", weights_only=True)["weights"]
        learner = GPT(GPTConfig(512, 1, 2, 2, 32))
        learner.load_state_dict(weights)
        nats = F.cross_entropy(learner(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()).item()
        assert nats == pytest.approx(kept["gold_end"], abs=1e-5), arm
    last = torch.load(out / "ckpt.pt", weights_only=True)
    assert last["arm"] == "done" and set(last["arms"]) == set(found["arms"])
    assert all(torch.equal(p, weights[n]) for n, p in last["learner"].items())


def test_a_finished_run_takes_further_arms_and_lends_its_meta_phase(run_small, monkeypatch, capsys):
    whole, parts = run_small("whole", "--arms=real,frozen"), run_small("parts", "--arms=real")
    in_process(monkeypatch, "self_ce.py", f"--resume={parts}", "--arms=frozen")
    lent = run_small("lent", "--arms=real,frozen", f"--start={parts}")
    for other in parts, lent:
        assert summary(other)["arms"] == summary(whole)["arms"] and len(summary(whole)["arms"]) == 2
        assert {p.name for p in (other / "ends").iterdir()} == {"real.pt", "frozen.pt"}
    assert log(parts) == log(whole)
    assert log(lent) == [row for row in log(whole) if row["arm"] != "meta"]
    assert summary(lent)["gold_meta_end"] == summary(whole)["gold_meta_end"]
    with pytest.raises(SystemExit):
        run_small("no", "--meta_steps=9", f"--start={parts}")
    assert "meta_steps=9 differs from 8" in capsys.readouterr().err and not (parts.parent / "no").exists()


def test_a_finished_run_takes_more_steps_of_its_arms_as_if_asked_for_at_first(
        run_small, monkeypatch, capsys):
    settings = ["--arms=real,ema,self", "--rescue_steps=0", "--self_rate=0.7"]
    whole = run_small("whole", *settings, "--self_steps=16")
    more = run_small("more", *settings, "--self_steps=8")
    in_process(monkeypatch, "self_ce.py", f"--resume={more}", "--self_steps=16")
    assert summary(more)["arms"] == summary(whole)["arms"]
    order = lambda row: (row["arm"], row["step"])
    assert sorted(log(more), key=order) == sorted(log(whole), key=order)
    for arm in ("real", "ema", "self"):
        a, b = (torch.load(out / f"ends/{arm}.pt", weights_only=True)["weights"] for out in (more, whole))
        assert all(torch.equal(p, b[n]) for n, p in a.items()), arm
    with pytest.raises(SystemExit):
        in_process(monkeypatch, "self_ce.py", f"--resume={more}", "--self_steps=12")
    assert "self_steps=12 differs from 16" in capsys.readouterr().err
    odd = run_small("odd", "--self_steps=7")
    with pytest.raises(SystemExit):
        in_process(monkeypatch, "self_ce.py", f"--resume={odd}", "--self_steps=12")
    assert "there can be more than 7 only where those were a multiple of" in capsys.readouterr().err


def test_killed_between_an_end_and_its_checkpoint_more_steps_begin_at_the_end_before(run_small, monkeypatch):
    settings = ["--arms=real,self"]
    whole = run_small("whole", *settings, "--self_steps=16")
    more = run_small("more", *settings, "--self_steps=8")
    original, resumed = phases.Phases.steps, [f"--resume={more}", "--self_steps=16"]

    def killed(self, n):
        for step in original(self, n):
            if (self.arm, step) == ("self", 10):
                self.run.close()  # the lock ends with a process
                raise MemoryError  # the real arm has ended anew, and no checkpoint was due since
            yield step
    with monkeypatch.context() as patch:
        patch.setattr(phases.Phases, "steps", killed)
        patch.setattr(checkpoints.Writer, "due", lambda self: False)
        with pytest.raises(MemoryError):
            in_process(patch, "self_ce.py", *resumed)
    in_process(monkeypatch, "self_ce.py", *resumed)
    order = lambda row: (row["arm"], row["step"])
    assert sorted(log(more), key=order) == sorted(log(whole), key=order)
    assert summary(more)["arms"] == summary(whole)["arms"]


def test_the_same_command_goes_on_where_its_folder_stands(run_small, capsys):
    first = run_small("first", "--arms=real", "--adversarial=0.1")
    again = ["--arms=real", f"--start={first}", "--self_steps=8", "--resume=auto"]
    started = run_small("second", *again)
    (started / "ckpt.pt").unlink()  # a kill between two renamings leaves the one before
    before = log(started)
    assert run_small("second", *again) == started and log(started) == before
    assert not (started.parent / "second-1").exists()
    with pytest.raises(SystemExit):
        run_small("first", "--arms=real", "--resume=auto")
    assert "adversarial=0.0 differs from 0.1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_small("first", "--arms=real", f"--start={first / 'ends/real.pt'}")
    assert "is out_dir too" in capsys.readouterr().err


def test_an_arm_can_start_from_the_end_of_another(run_small):
    first = run_small("first", "--arms=real")
    second = run_small("second", "--arms=frozen", f"--start={first / 'ends/real.pt'}")
    assert summary(second)["arms"]["frozen"]["gold_start"] == summary(first)["arms"]["real"]["gold_end"]


def test_real_targets_are_counted_where_they_are_used_alone(run_small):
    rows = log(run_small("run", "--arms=real,frozen", "--self_steps=8"))
    counted = {(row["arm"], row["step"]): row["real_targets"] for row in rows}
    assert [counted["real", step] for step in (0, 4, 8)] == [0, 256, 512]
    assert [counted["frozen", step] for step in (0, 4, 8)] == [0, 0, 0]


# ---- hacks and alarms

def test_a_report_of_gold_names_streams_as_they_stand_at_its_own_step(run_small, monkeypatch):
    """The watch reads a step before the report of it is written."""
    def update(watch, step, values, probe, names):
        watch.state["surprise"].update(threshold=1.0, sum=0.5, since=step)
        return []
    golds = iter(range(100))
    monkeypatch.setattr(Watch, "update", update)
    monkeypatch.setattr(Gold, "__call__", lambda self, read: (float(next(golds)), 1.0))
    out = run_small("run", "--arms=self")
    arm = summary(out)["arms"]["self"]
    assert arm["steps_to_hack"] == 4
    assert [(r["step"], r["why"], r["changed"]) for r in arm["reports"]] == [(12, "gold", [[12, "surprise"]])]
    page = (out / "hacks/001.md").read_text()
    assert "# self, step 12: gold rose" in page and "1. surprise, from step 12" in page
    assert (out / "hacks/001.png").stat().st_size > 5000


def test_a_hacked_arm_has_a_report_of_what_changed(run_small):
    out = run_small("run", "--arms=shuffled", "--meta_steps=120", "--self_steps=24", "--learning_rate=5e-3")
    arm = summary(out)["arms"]["shuffled"]
    gold, = [report for report in arm["reports"] if report["why"] == "gold"]
    assert arm["steps_to_hack"] < gold["step"] <= 24 and gold["changed"]
    assert arm["alarms"] and len(arm["reports"]) == 1 + len(arm["alarms"])
    assert set(gold["judged"]) == {f"{c} on {o}" for c in ("then", "now") for o in ("then", "now")}
    assert len(list((out / "hacks").glob("[0-9]*.md"))) == len(arm["reports"])


def test_alarms_close_together_are_one_and_the_real_arm_has_no_critic_to_watch(run_small, monkeypatch):
    heard, levels = set(), []

    def update(watch, step, values, probe, names):
        heard.add(tuple(names))
        return ["entropy"]
    monkeypatch.setattr(Watch, "update", update)
    restart = lambda watch, step, values, probe: levels.append((step, len(values)))
    monkeypatch.setattr(Watch, "restart", restart)
    monkeypatch.setattr(phases, "MEMORY", 8)
    arms = summary(run_small("run", "--arms=real,frozen"))["arms"]
    assert [arm["alarms"] for arm in arms.values()] == [[4, 12], [4, 12]]
    assert [report["why"] for report in arms["real"]["reports"]] == ["entropy"] * 2
    assert levels == [(4, 4), (8, 4), (12, 4)] * 2  # every one of them begins the watch anew
    assert heard == {("surprise", "entropy"), tuple(STREAMS)}


# ---- a step

def of_a_run(**settings):
    settings = dict(settings, grad_accum=1)
    run = SimpleNamespace(average=lambda tensors: None, autocast=nullcontext)
    return SimpleNamespace(settings=settings, tally={}, run=run)


def test_a_step_is_clipped_and_the_same_from_gradients_by_name():
    ends, loop = [], of_a_run(grad_clip=0.5)
    for named in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 2)
        optimizer, before = torch.optim.SGD(net.parameters(), 1.0), net.weight.detach().clone()
        loss = net(torch.ones(1, 3)).sum()
        if named:
            g = dict(zip(("weight", "bias"), torch.autograd.grad(loss, list(net.parameters()))))
            phases.Phases.take_step(loop, net, optimizer, g)
        else:
            loss.backward()
            phases.Phases.take_step(loop, net, optimizer, noted=False)
            assert not loop.tally
        ends.append(net.weight.detach())
        assert all(p.grad is None for p in net.parameters())
    assert torch.equal(*ends) and loop.tally["grad_norm"].item() == pytest.approx(8 ** 0.5)
    assert torch.allclose(before - ends[0], torch.full((2, 3), 0.5 / 8 ** 0.5))


def test_ranks_and_their_pieces_share_the_chances_and_the_texts_of_one():
    class Loop(phases.Phases):
        def __init__(self, rank, ranks, pieces=1):
            self.run, self.piece = SimpleNamespace(rank=rank, ranks=ranks, device="cpu"), None
            self.corpus = SimpleNamespace(train=torch.arange(1000).numpy().astype("uint16"))
            self.settings = dict(seed=1, batch_size=8, block_size=8, grad_accum=pieces)
    for take in (lambda p: p.chance(3, (2, 5), stream=1), lambda p: p.text(3, stream=1)):
        whole, ranks = take(Loop(0, 1)), [Loop(rank, 2, 2) for rank in range(2)]
        assert torch.equal(whole, torch.cat([take(p) for p in ranks])) and len(whole) == 8
        assert torch.equal(whole, torch.cat([take(p) for p in ranks for _ in p.pieces()]))
        assert [p.piece for p in ranks] == [None, None]
    assert whole.shape == (8, 9)
    chance = lambda step, stream: Loop(0, 1).chance(step, (5,), stream)
    assert not torch.equal(chance(3, 1), chance(3, 2)) and not torch.equal(chance(3, 1), chance(4, 1))


def test_the_rate_of_an_arm_falls_to_the_share_that_decay_names_and_that_of_the_meta_phase_stays(run_small):
    rows = log(run_small("run", "--arms=real,self", "--decay=0.25", "--learning_rate=0.01"))
    rates = {(row["arm"], row["step"]): row["lr"] for row in rows}
    assert rates["meta", 8] == pytest.approx(0.01)
    for arm in ("real", "self"):
        assert [rates[arm, step] for step in (0, 4, 8, 12)] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


def test_where_the_peak_is_known_the_log_has_the_share_of_it_that_is_used(run_small, monkeypatch):
    whole = phases.Phases.begin

    def begin(self, *given):
        whole(self, *given)
        self.run.progress.peak = 1e12
    assert all(row["mfu"] is None for row in map(json.loads, open(run_small("no") / "log.jsonl")))
    monkeypatch.setattr(phases.Phases, "begin", begin)
    rows = [json.loads(line) for line in open(run_small("yes", "--arms=real,frozen") / "log.jsonl")]
    n = 12 * 32 ** 2 * 2 + 512 * 32  # weights of matrices; a pass costs two FLOPs for each, and attention
    for arm, least, most in (("real", 2.99, 3.3), ("frozen", 4, 6), ("meta", 7, 9)):  # its critic reads 3 T
        row = [row for row in rows if row["arm"] == arm][-1]
        passes = row["mfu"] * 1e12 / row["tok_per_s"] / 2 / n
        assert least < passes < most, (arm, passes)
    assert all(row["peak_gb"] > 0.05 for row in rows)
