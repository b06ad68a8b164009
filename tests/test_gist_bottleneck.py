"""Stage 2: its losses against references, and its script as a user runs it, on the plays, very small."""
import signal
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import finish, in_process, log, small_gpt, summary

import checkpoints
import gist_bottleneck as gb
import phases
import watch
from gists import Space, layout, spans_at, squared_distances
from model import GPT, GPTConfig

SCRIPT = "gist_bottleneck.py"
SMALL = ["--meta_steps=8", "--self_steps=4", "--n_embd=16", "--n_head=2", "--n_layer=2", "--block_size=16",
         "--batch_size=4", "--eval_windows=4", "--eval_interval=2", "--save_interval=3", "--warmup=2",
         "--candidates=4", "--device=cpu"]
TOY = dict(vocab=13, chunk=4, n_gist=2, block_size=12, batch_size=2, candidates=3, span=1, every=1, tau=0.3)


@pytest.fixture
def toy(monkeypatch):
    """Settings of a toy, and (learner, critic, layout, text, foreign text) on it, in float64."""
    for name, value in TOY.items():
        monkeypatch.setattr(gb, name, value)
    learner, critic = (small_gpt(special=3, layers=3) for _ in range(2))
    text, foreign = torch.randint(0, 13, (2, 2, 13))
    return learner, critic.requires_grad_(False), layout(12, 4, 2, 13, "cpu"), text, foreign


def own_chance(step, shape, stream, rows=None):
    """What Phases.chance is to a toy."""
    return torch.rand(2, *shape, generator=torch.Generator().manual_seed(step))


PHASES = SimpleNamespace(chance=own_chance, run=SimpleNamespace(average=lambda tensors: None),
                         settings=dict(dataset="plays"))


# ---- the losses

def outcomes(M):
    """(squared distances [M, M] of M outcomes, their true probabilities [M])."""
    torch.manual_seed(0)
    true = torch.rand(M).double() + 0.2
    return squared_distances(torch.randn(M, 3).double() * 0.5), true / true.sum()


def expected_loss(logits, d2, true):
    """The loss of p = softmax(logits) in mean over truths drawn from `true`; every outcome is an own span."""
    M, total = len(d2), 0.0
    logp = torch.cat((logits.log_softmax(-1), torch.tensor([-40.0]).double()))  # "none" has no mass
    for x in range(M):
        here = d2[[*range(M), x]][:, [*range(M), x]]
        total = total + true[x] * gb.LOSS[gb.distance](logp, here, gb.target_of(here))
    return total


def slope(logits, d2, true):
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(expected_loss(logits, d2, true), logits)[0]


@pytest.mark.parametrize("distance, proper", [("energy", True), ("plain", False)])
def test_energy_is_lowest_at_the_true_distribution_and_plain_is_not(toy, monkeypatch, distance, proper):
    monkeypatch.setattr(gb, "distance", distance)
    d2, true = outcomes(5)
    assert (slope(true.log(), d2, true).abs().max() < 1e-9) == proper
    at_truth = expected_loss(true.log(), d2, true)
    others = [expected_loss(true.log() + 0.5 * torch.randn(5).double(), d2, true) for _ in range(20)]
    assert (min(others) > at_truth) == proper


def test_praise_vanishes_at_the_true_distribution_and_treats_what_is_alike_alike(toy, monkeypatch):
    monkeypatch.setattr(gb, "distance", "praise")
    d2, true = outcomes(5)
    assert slope(true.log(), d2, true).abs().max() < 1e-12
    assert slope(torch.zeros(5).double(), d2, true).abs().max() > 1e-3
    # tokens 0 and 1 are one in gist, and so is the truth; token 2 is far from all
    d2 = squared_distances(torch.tensor([[0.0, 0], [0, 0], [3, 0], [0, 0]]).double())
    logp = torch.tensor([0.1, 0.5, 0.3, 0.1]).double().log().requires_grad_()
    a = -torch.autograd.grad(gb.praise_loss(logp, d2, gb.target_of(d2)), logp)[0]
    assert torch.allclose(a, torch.tensor([0.2, 0.2, -0.3, -0.1]).double(), atol=1e-6)


def test_an_outcome_that_no_own_span_meets_counts_as_none_of_them(toy):
    d2, _ = outcomes(4)
    assert gb.target_of(d2).tolist() == [0, 0, 0, 1]
    logp = torch.tensor([0.2, 0.3, 0.1, 0.4]).double().log().requires_grad_()
    a = -torch.autograd.grad(gb.praise_loss(logp, d2, gb.target_of(d2)), logp)[0]
    assert a[-1] == pytest.approx(0.6) and (a[:3] < 0).all()  # praise of none, by the mass that it lacks
    met = d2[[0, 1, 2, 1]][:, [0, 1, 2, 1]]
    assert torch.equal(gb.target_of(met), torch.cat((gb.kernel(d2[:3, :3])[1], torch.zeros(1).double())))


@pytest.mark.parametrize("span", [2, 4])
def test_sampled_spans_train_by_the_distance_that_is_asked_for(toy, monkeypatch, span):
    """A gradient reaches the head, and no distance stands for another: losses and gradients differ."""
    learner, critic, lay, text, foreign = toy
    monkeypatch.setattr(gb, "span", span)
    found = []
    for distance in gb.LOSS:
        monkeypatch.setattr(gb, "distance", distance)
        learner.zero_grad()
        loss = gb.self_loss(PHASES, "frozen", learner, critic, Space("gist"), lay, text, 0, {})
        loss.backward()
        found.append((round(loss.item(), 6), round(learner.head.weight.grad.abs().sum().item(), 6)))
    losses, gradients = map(set, zip(*found))
    assert len(losses) == 3 == len(gradients) and min(gradients) > 0


def test_each_arm_reads_what_its_name_says(toy):
    """Gists are at distance 0 where spans are the same: of the observation with own candidates."""
    learner, critic, lay, text, foreign = toy
    starts = gb.own_starts("cpu")
    for arm, seen in (("frozen", text), ("shuffled", foreign), ("sharpen", None)):
        phases = SimpleNamespace(**vars(PHASES), text=lambda step, stream: foreign)
        own, _, d2, *_ = gb.hear(phases, arm, learner, critic, Space("gist"), lay, text, starts, 0)
        seen = own[:, :, 0] if seen is None else spans_at(seen, starts, 1)
        same = (own == seen.unsqueeze(2)).all(-1)
        assert torch.equal(d2[..., -1, :-1] < 1e-10, same) and same.any() and not same.all()


def test_gists_of_the_first_step_which_are_all_alike_have_a_rank(monkeypatch):
    """In float32 LAPACK makes NaN of their eigenvalues, at some seeds, this one among them."""
    monkeypatch.setattr(gb, "n_gist", 2)
    torch.manual_seed(6)
    critic = GPT(GPTConfig(gb.vocab, 3, gb.n_layer, gb.n_head, gb.n_embd))
    run = SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext)
    corpus = SimpleNamespace(val=torch.randint(gb.vocab, (4 * gb.block_size,)).numpy())
    lay = layout(gb.block_size, gb.chunk, 2, gb.vocab, "cpu")
    found = gb.examine(run, corpus, critic, Space("gist"), lay)
    assert found["gist_std"] < 1e-7 and found["gist_rank"] == pytest.approx(1, rel=1e-7)


# ---- the script

@pytest.fixture
def quick(monkeypatch):
    """No picture, and the watch's thresholds by decree: they would take longer than these runs."""
    monkeypatch.setattr(phases, "draw_runs", lambda folders: (None, None))
    monkeypatch.setattr(watch, "threshold", lambda *a: 30.0)


def interrupted(monkeypatch, arm, step, *arguments):
    """Runs the script until it is asked to stop before a step of an arm."""
    original = phases.Phases.steps

    def steps(self, n):
        for at_step in original(self, n):
            if (self.arm, at_step + 1) == (arm, step):
                self.run.stop_signal = signal.SIGTERM
            yield at_step
    with monkeypatch.context() as patch:
        patch.setattr(phases.Phases, "steps", steps)
        with pytest.raises(SystemExit) as stop:
            in_process(patch, SCRIPT, *arguments)
    assert stop.value.code == 128 + signal.SIGTERM


def load(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Whether two states are equal bit for bit: tensors in dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def assert_equal_runs(a, b):
    """Log, summary, checkpoint and the ends of the arms; all but paths, timings and the length of a log."""
    without = lambda state, *names: {k: v for k, v in state.items() if k not in names}
    assert log(a) == log(b) and without(summary(a), "config") == without(summary(b), "config")
    ends = [f"ends/{arm}.pt" for arm in summary(b)["arms"]]
    assert {f"ends/{path.name}" for path in (a / "ends").iterdir()} == set(ends)
    for name in ("ckpt.pt", *ends):
        assert same(*(without(load(folder / name), "config", "files", "seconds") for folder in (a, b))), name


def test_the_script_runs_on_the_plays_and_goes_on_bit_for_bit(tmp_path, monkeypatch, quick):
    """Interrupted in the meta phase and in an arm; an arm may be added to a finished run."""
    arms, whole, added = ["real", "ema", "shuffled", "sharpen"], tmp_path / "whole", tmp_path / "added"
    settings = [*SMALL, f"--arms={','.join(arms)}"]
    in_process(monkeypatch, SCRIPT, *settings, f"--out_dir={whole}")
    found, rows = summary(whole), log(whole)
    assert list(found["arms"]) == arms and found["stage"] == "gist_bottleneck"
    assert set(found["later"]) == {"gist", "full", "none"} and isinstance(found["gist_share"], float)
    assert len({arm["gold_start"] for arm in found["arms"].values()} | {found["gold_meta_end"]}) == 1
    assert {row["real_targets"] for row in rows if row["arm"] not in ("meta", "real")} == {0}
    assert {"gist_std", "gist_rank", "agreement_probe", "outside", "agreement", "echo"} <= set(rows[-1])
    assert {"gold_full", "gold_none"} <= set(rows[0]) and "gold_full" not in rows[-1]
    assert {"full", "none", "optimizer", "learner", "critic"} <= set(load(whole / "ckpt.pt")["snapshot"])
    for arm, step in (("meta", 5), ("ema", 1)):
        folder = tmp_path / arm
        interrupted(monkeypatch, arm, step, *settings, f"--out_dir={folder}")
        controls = {"full", "none", "optimizer_full", "optimizer_none"} & set(load(folder / "ckpt.pt"))
        assert len(controls) == (4 if arm == "meta" else 0)  # an arm needs them no more
        in_process(monkeypatch, SCRIPT, f"--resume={folder}")
        assert_equal_runs(folder, whole)
    in_process(monkeypatch, SCRIPT, *SMALL, "--arms=real", f"--start={whole}", f"--out_dir={added}")
    in_process(monkeypatch, SCRIPT, f"--resume={added}", "--arms=real,forecast")
    assert list(summary(added)["arms"]) == ["real", "forecast"]
    assert log(added)[:3] == [row for row in rows if row["arm"] == "real"]
    forecast = log(added)[3:]
    assert [row["step"] for row in forecast] == [0, 2, 4]
    assert forecast[0]["gold_nats"] == rows[-3]["gold_nats"]


def test_a_critic_of_another_size_judges_and_goes_on_bit_for_bit(tmp_path, monkeypatch, quick, capsys):
    critic, whole, cut, lent = (tmp_path / name for name in ("critic", "whole", "cut", "lent"))
    small = [*SMALL, "--controls="]
    in_process(monkeypatch, SCRIPT, *small, "--arms=", "--n_layer=3", "--n_head=1", f"--out_dir={critic}")
    theirs = load(critic / "ckpt.pt")["snapshot"]["learner"]
    settings = [*small, "--arms=real,frozen,random"]
    judged = [*settings, f"--critic_from={critic}"]
    in_process(monkeypatch, SCRIPT, *judged, f"--out_dir={whole}")
    assert same(dict(load(whole / "ckpt.pt")["critic"]), dict(theirs))
    interrupted(monkeypatch, "meta", 3, *judged, f"--out_dir={cut}")
    in_process(monkeypatch, SCRIPT, f"--resume={cut}")
    assert_equal_runs(cut, whole)
    interrupted(monkeypatch, "random", 3, *judged, f"--out_dir={cut}")
    critic.rename(tmp_path / "moved")  # what the arms need of it is in their checkpoint
    in_process(monkeypatch, SCRIPT, f"--resume={cut}")
    assert_equal_runs(cut, whole)
    (tmp_path / "moved").rename(critic)
    # a meta phase with one critic may be started from with another
    in_process(monkeypatch, SCRIPT, *settings, f"--start={whole}", f"--out_dir={lent}")
    assert same(dict(load(lent / "ckpt.pt")["critic"]), dict(load(whole / "ckpt.pt")["snapshot"]["learner"]))
    in_process(monkeypatch, SCRIPT, *judged, f"--start={lent}", f"--out_dir={tmp_path / 'again'}")
    assert log(tmp_path / "again") == [row for row in log(whole) if row["arm"] != "meta"] != log(lent)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        in_process(monkeypatch, SCRIPT, *judged, "--chunk=2", f"--out_dir={tmp_path / 'none'}")
    assert "chunk=2 differs from 4" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_two_ranks_compute_what_one_does(tmp_path, monkeypatch):
    settings = [*SMALL, "--arms=real,frozen,shuffled,forecast", "--dtype=float64"]
    one, two = tmp_path / "1", tmp_path / "2"
    in_process(monkeypatch, SCRIPT, *settings, f"--out_dir={one}")
    finish(SCRIPT, *settings, f"--out_dir={two}", ranks=2)
    for a, b in zip(log(one), log(two), strict=True):
        for key in a:
            near = pytest.approx(a[key], rel=1e-4, abs=1e-5) if isinstance(a[key], float) else a[key]
            assert b[key] == near, (a["arm"], a["step"], key)
    for part in ("learner", "critic"):
        a, b = (load(folder / "ckpt.pt")[part] for folder in (one, two))
        assert max((a[n] - b[n]).abs().max() for n in a) < 1e-5, part


@pytest.mark.parametrize("arguments, says", [
    ("--arms=frosen", "there is no arm 'frosen'; did you mean 'frozen'"),
    ("--controls=half", "there is no control 'half'"),
    ("--controls=full,full", "names a control twice"),
    ("--chunk=5", "chunk=5 must cut block_size=128"),
    ("--chunk=128", "chunk=128 must cut block_size=128"),
    ("--n_gist=5", "n_gist=5 must be from 1 to chunk=4"),
    ("--span=5", "span=5 must be from 1 to chunk=4"),
    ("--n_layer=1", "n_layer=1 must be 2 or more"),
    ("--every=128", "every=128 must be from 1 to 127"),
    ("--candidates=1", "candidates=1 must be"),
    ("--candidates=256", "candidates=256 must be"),
    ("--meta_steps=0", "meta_steps=0 must be above 0"),
    ("--tau=0", "tau=0.0 must be above 0"),
    ("--both_wordings=true", "both_wordings and the arm oracle need 'kjv-asv'"),
    ("--arms=oracle", "both_wordings and the arm oracle need 'kjv-asv'"),
    ("--span=2 --arms=sharpen", "sharpen"),
    ("--arms=forecast --vocab=50257", "4096"),
    ("--ema_decay=1", "ema_decay=1.0 must be below 1"),
    ("--critic_from=out/other --arms=self", "leave them out with critic_from"),
    ("--critic_from=out/other --arms=ema", "leave them out with critic_from"),
    ("--critic_from=nowhere", "nowhere holds no ckpt.pt"),
    ("--resume=OTHER", "is a checkpoint of self_ce.py"),
])
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, monkeypatch, capsys, arguments, says):
    torch.save(dict(format=checkpoints.FORMAT, stage="self_ce"), tmp_path / "ckpt.pt")
    out = [] if "resume" in arguments else [f"--out_dir={tmp_path / 'run'}"]
    with pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, SCRIPT, *arguments.replace("OTHER", str(tmp_path)).split(), *out)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and error.count("\n") == 1, error
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]
