"""Stage 2: its mathematics against references, and its script as a user runs it, on the plays at a very small size."""
import contextlib
import itertools
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gist_bottleneck as gb
import probe
from model import GIST, GPT, TRUE, GPTConfig, bottleneck_mask

ROOT = Path(__file__).parent.parent
SMALL = ["--meta_steps=16", "--self_steps=8", "--n_embd=32", "--n_head=2", "--n_layer=2", "--block_size=16",
         "--eval_windows=4", "--eval_interval=4", "--save_interval=3", "--warmup=4", "--batch_size=4", "--candidates=4",
         "--device=cpu"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The small models run faster on one thread, and the processes started here inherit it."""
    before, os.environ["OMP_NUM_THREADS"] = torch.get_num_threads(), "1"
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    del os.environ["OMP_NUM_THREADS"]


@pytest.fixture
def tiny(monkeypatch):
    """Settings of a toy, and a learner on it whose every part shows in what it says, in float64."""
    for name, value in dict(vocab=7, chunk=4, n_gist=2, block_size=12, n_layer=3, n_head=2, n_embd=16, batch_size=2,
                            candidates=3, span=1, every=1, place="end").items():
        monkeypatch.setattr(gb, name, value)
    torch.manual_seed(0)
    model = GPT(GPTConfig(7, 3, 3, 2, 16)).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model


def in_process(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gist_bottleneck.py", *arguments])
    monkeypatch.setattr(signal, "signal", lambda *a: None)
    runpy.run_path(str(ROOT / "gist_bottleneck.py"), run_name="__main__")


def launch(*arguments, ranks=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return subprocess.run([sys.executable, *launcher, ROOT / "gist_bottleneck.py", *arguments], text=True, timeout=170,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def log(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tok_per_s"} for row in rows]


# ---- layout and masks

def test_gists_stand_at_the_end_or_behind_their_spans(tiny, monkeypatch):
    assert gb.layout(8, "cpu").template.tolist() == [0, 0, 0, 0, 7, 8, 0, 0, 0, 0, 7, 8]
    assert gb.layout(8, "cpu").pos.tolist() == [0, 1, 2, 3, 3, 3, 4, 5, 6, 7, 7, 7]
    monkeypatch.setattr(gb, "place", "spread")
    lay = gb.layout(8, "cpu")
    assert lay.template.tolist() == [0, 0, 7, 0, 0, 8, 0, 0, 7, 0, 0, 8]
    assert lay.text.tolist() == [0, 1, 3, 4, 6, 7, 9, 10] and lay.gists.tolist() == [[2, 5], [8, 11]]
    assert lay.blend[2].tolist() == [.25, .25, 0, .25, .25, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("how", ["gist", "full", "none"])
def test_the_past_is_seen_through_the_mask_alone(tiny, how):
    """Changing a token of the first chunk moves later logits only as the mask allows."""
    lay, x = gb.layout(12, "cpu", torch.float64), torch.randint(0, 7, (1, 12))
    other = x.clone()
    other[0, 1] = (x[0, 1] + 1) % 7
    moved = (gb.read(tiny, lay, x, how) - gb.read(tiny, lay, other, how)).abs().amax(-1)[0] > 1e-12
    assert moved.tolist() == [False] + [True] * 3 + [how != "none"] * 8
    if how == "gist":  # the path runs through the gists: with their keys hidden nothing arrives
        hidden = lay._replace(mask={how: lay.mask[how] & ((lay.template == 0) | (lay.chunk[:, None] == lay.chunk))})
        moved = (gb.read(tiny, hidden, x) - gb.read(tiny, hidden, other)).abs().amax(-1)[0] > 1e-12
        assert not moved[4:].any()


# ---- branches and caches against full forwards

@pytest.mark.parametrize("place", ["end", "spread"])
def test_gists_of_own_spans_equal_a_masked_forward_of_each(tiny, monkeypatch, place):
    """Each own span and its gists in a sequence of its own, behind the true past, under one plain mask."""
    monkeypatch.setattr(gb, "span", 2)
    monkeypatch.setattr(gb, "place", place)
    lay, x = gb.layout(12, "cpu"), torch.randint(0, 7, (2, 12))
    starts = gb.starts_of("cpu")
    assert starts.tolist() == [1, 2, 4, 5, 6, 8, 9, 10]
    spans = torch.randint(0, 7, (2, len(starts), 3, 2))
    critic = gb.Critic(tiny, None, None)
    got = gb.gists(critic, lay, gb.past_of(critic, lay, x), starts, spans)
    for n, s in enumerate(starts.tolist()):
        for b, m in itertools.product(range(2), range(3)):
            at = lay.text[s].item()
            tokens = lay.template.clone()
            tokens[lay.text] = x[b]
            tokens = torch.cat((tokens[:at], spans[b, n, m], torch.tensor([7, 8])))
            kind = torch.where(tokens >= 7, GIST, TRUE)
            chunks = torch.cat((lay.chunk[:at], torch.full((4,), s // 4)))
            pos = torch.cat((lay.pos[:at], torch.tensor([s, s + 1, s + 1, s + 1])))
            want = tiny(tokens[None], pos, bottleneck_mask(chunks, kind, "gist"), residual=2)[0, -2:].flatten()
            assert torch.allclose(got[b, n, m].double(), want, atol=1e-6)


def test_a_forecast_is_what_a_full_forward_expects_after_the_span(tiny, monkeypatch):
    monkeypatch.setattr(gb, "span", 2)
    lay, x = gb.layout(12, "cpu"), torch.randint(0, 7, (2, 12))
    starts, critic = gb.starts_of("cpu"), gb.Critic(tiny, None, None, forecast=True)
    spans = torch.randint(0, 7, (2, len(starts), 3, 2))
    got = gb.gists(critic, lay, gb.past_of(critic, lay, x), starts, spans)
    for n, s in enumerate(starts.tolist()):
        for b, m in itertools.product(range(2), range(3)):
            text = x[b].clone()
            text[s:s + 2] = spans[b, n, m]
            want = gb.read(tiny, lay, text[None])[0, s + 1].log_softmax(-1)
            assert torch.allclose(got[b, n, m].double(), want - want.mean(), atol=1e-5)


def test_spans_written_from_caches_equal_naive_writing(tiny, monkeypatch):
    """Sampled tokens and their log probabilities, against full forwards of true prefix and own tokens."""
    monkeypatch.setattr(gb, "span", 3)
    lay, x = gb.layout(12, "cpu"), torch.randint(0, 7, (2, 12))
    starts, past = gb.starts_of("cpu"), {}
    logits = gb.read(tiny, lay, x, cache=past)
    u = torch.rand(2, len(starts), 2, 3)
    spans, logp = gb.write_spans(tiny, lay, past, logits[:, starts - 1], starts, u)
    for b, n, m in itertools.product(range(2), range(len(starts)), range(2)):
        text, total = x[b].clone(), 0.0
        for j in range(3):
            at = starts[n] + j
            said = gb.read(tiny, lay, text[None])[0, at - 1]
            token = gb.sample_tokens(said, u[b, n, m, j])
            assert token == spans[b, n, m, j]
            total, text[at] = total + said.log_softmax(-1)[token], token
        assert torch.allclose(logp[b, n, m], total, atol=1e-9)


@pytest.mark.parametrize("how", ["gist", "full"])
@pytest.mark.parametrize("length", [3, 9, 12])
def test_a_text_goes_on_from_kept_gists_as_in_a_masked_full_forward(tiny, how, length):
    class Here:
        device = "cpu"
    ids = torch.randint(0, 7, (length,))
    written, _, kept = gb.go_on(Here, tiny, how, ids, 9)
    text = torch.cat((ids, torch.tensor(written)))
    whole = torch.cat((text, torch.zeros(-len(text) % 4).long()))
    said = gb.read(tiny, gb.layout(len(whole), "cpu", torch.float64), whole[None], how)[0]
    assert said[length - 1:len(text) - 1].argmax(-1).tolist() == written
    read = len(text) - 1  # the last own token is not read again
    assert kept == (read // 4 * (2 if how == "gist" else 6) + read % 4)


def test_rewriting_sees_the_gists_alone(tiny):
    lay, x = gb.layout(12, "cpu"), torch.randint(0, 7, (2, 12))
    cache = {}
    gb.read(tiny, lay, x, cache=cache)
    value = gb.rewriting_loss(tiny, lay, x, cache)
    is_text = torch.ones(len(lay.pos), dtype=torch.bool).index_fill(0, lay.gists.flatten(), False)
    spoil = lambda where: {m: tuple(t.masked_fill(where[:, None], 9.0) for t in kv) for m, kv in cache.items()}
    assert torch.equal(gb.rewriting_loss(tiny, lay, x, spoil(is_text)), value)  # what stands at the text is never read
    cache = spoil(~is_text)
    assert not torch.allclose(gb.rewriting_loss(tiny, lay, x, cache), value)


# ---- scores

def toy(M, seed=0):
    """(squared distances [M, M] of M outcomes, their true probabilities [M])."""
    torch.manual_seed(seed)
    return gb.squared_distances(torch.randn(M, 3).double() * 0.5), torch.rand(M).double().add(0.2)


def expected_loss(logits, d2, true):
    """The loss of p = softmax(logits) in expectation over truths drawn from `true`, every outcome a candidate."""
    M = len(d2)
    logp = torch.cat((logits.log_softmax(-1), torch.tensor([-40.0]).double()))  # "none" has no mass
    total = 0
    for x in range(M):
        order = [*range(M), x]
        here = d2[order][:, order]
        total = total + true[x] * gb.exact_loss(logp, here, gb.target_mass(here))
    return total


@pytest.mark.parametrize("distance, proper", [("logscore", True), ("energy", True), ("plain", False)])
def test_proper_scores_are_lowest_at_the_true_distribution(monkeypatch, distance, proper):
    monkeypatch.setattr(gb, "distance", distance)
    monkeypatch.setattr(gb, "tau", 0.3)
    d2, true = toy(5)
    true = true / true.sum()
    logits = true.log().requires_grad_()
    slope = torch.autograd.grad(expected_loss(logits, d2, true), logits)[0]
    assert (slope.abs().max() < 1e-9) == proper
    if proper:
        at_truth = expected_loss(true.log(), d2, true)
        for seed in range(20):
            other = true.log() + 0.5 * torch.randn(5, generator=torch.Generator().manual_seed(seed)).double()
            assert expected_loss(other, d2, true) > at_truth


def test_praise_vanishes_at_the_true_distribution_and_spreads_over_what_is_alike(monkeypatch):
    monkeypatch.setattr(gb, "distance", "praise")
    monkeypatch.setattr(gb, "tau", 0.3)
    d2, true = toy(5)
    true = true / true.sum()
    slope = lambda logits: torch.autograd.grad(expected_loss(logits, d2, true), logits)[0]
    assert slope(true.log().requires_grad_()).abs().max() < 1e-12
    assert slope(torch.zeros(5).double().requires_grad_()).abs().max() > 1e-3
    # two tokens at distance 0 are praised alike, whichever of them was observed
    point = torch.tensor([[0.0, 0], [0, 0], [3, 0], [0, 0]]).double()  # three own spans, and the truth
    d2, logp = gb.squared_distances(point), torch.tensor([0.1, 0.5, 0.3, 0.1]).double().log().requires_grad_()
    a = -torch.autograd.grad(gb.exact_loss(logp, d2, gb.target_mass(d2)), logp)[0]
    assert torch.allclose(a, torch.tensor([0.2, 0.2, -0.3, -0.1]).double(), atol=1e-6)


def test_an_outcome_that_no_own_span_meets_counts_as_none_of_them(monkeypatch):
    monkeypatch.setattr(gb, "distance", "logscore")
    d2, _ = toy(4)
    logp = torch.tensor([0.2, 0.3, 0.1, 0.4]).double().log()
    assert torch.allclose(gb.exact_loss(logp, d2, gb.target_mass(d2)), -logp[-1])  # the truth, last, is none of the three
    assert gb.target_mass(d2).tolist() == [0, 0, 0, 1]


def test_small_tau_is_cross_entropy_through_own_candidates(monkeypatch):
    monkeypatch.setattr(gb, "distance", "logscore")
    monkeypatch.setattr(gb, "tau", 1e-4)
    d2, _ = toy(3)
    logp = torch.tensor([0.2, 0.3, 0.1, 0.4]).double().log()
    order = [0, 1, 2, 1]
    d2 = d2[order][:, order]
    assert torch.allclose(gb.exact_loss(logp, d2, gb.target_mass(d2)), -logp[1])


@pytest.mark.parametrize("distance", ["energy", "plain"])
def test_the_score_function_is_unbiased(monkeypatch, distance):
    """Its mean over every triple of samples, against the gradient of the expectation written out."""
    monkeypatch.setattr(gb, "distance", distance)
    d2, _ = toy(4)
    d, x = d2.sqrt(), 2
    logits = torch.tensor([0.3, -0.2, 0.5, 0.0]).double().requires_grad_()
    p = logits.softmax(-1)
    exact = (p * d[x]).sum() - (0.5 * p @ d @ p if distance == "energy" else 0)
    want = torch.autograd.grad(exact, logits)[0]
    got = torch.zeros(4).double()
    for ys in itertools.product(range(4), repeat=3):
        logp = logits.log_softmax(-1)[list(ys)]
        order = [*ys, x]
        _, weight = gb.sampled_loss(d2[order][:, order])
        got += logp.sum().exp().detach() * torch.autograd.grad((weight * logp).mean(), logits)[0]
    assert torch.allclose(got, want, atol=1e-5)


def test_second_order_equals_finite_differences(tiny, monkeypatch):
    """Along a random direction of the critic's weights, in float64: the outer loss after the inner step."""
    monkeypatch.setattr(gb, "tau", 0.5)
    lay = gb.layout(12, "cpu", torch.float64)
    judge = GPT(tiny.config).double()
    judge.load_state_dict(tiny.state_dict())
    critic = gb.Critic(judge, None, torch.eye(32).double() * 0.2)
    w, outer_w = torch.randint(0, 7, (2, 2, 13))
    theta = {n: p.detach() for n, p in tiny.named_parameters()}
    after = lambda: gb.second_order(tiny, theta, critic, lay, w, outer_w, lambda t: None)
    dphi, moved, gain = after()
    step = sum((moved[n] - theta[n]).square().sum() for n in theta).sqrt()
    assert torch.allclose(step, torch.tensor(gb.inner_length).double())
    along = {n: torch.randn_like(p) for n, p in judge.named_parameters()}
    slope = sum((along[n] * dphi[n]).sum() for n in dphi)
    eps, values = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            for n, p in judge.named_parameters():
                p.add_(along[n], alpha=sign * eps if sign == 1 else -2 * eps)
        values.append(after()[2])
    assert slope.abs() > 1e-6
    assert torch.allclose(-(values[0] - values[1]) / (2 * eps), slope, rtol=1e-5)  # the gain falls as the loss rises


@pytest.mark.parametrize("values, rank", [((2, 2, 2, 0), 3), ((1, 1, -1e-9), 2), ((-2e-20, 1e-20), 1), ((0, 0), 1)])
def test_effective_rank_counts_directions_and_is_finite_of_rounding_alone(values, rank):
    assert gb.effective_rank(torch.tensor(values, dtype=torch.float32)) == pytest.approx(rank, rel=1e-6)


def test_gists_of_the_first_step_which_are_all_alike_have_a_rank(monkeypatch):
    """In float32 LAPACK makes NaN of their eigenvalues, at some seeds, this one among them."""
    monkeypatch.setattr(gb, "n_gist", 2)
    torch.manual_seed(6)
    model = GPT(GPTConfig(gb.vocab, 3, gb.n_layer, gb.n_head, gb.n_embd))
    run = type("Run", (), dict(device=torch.device("cpu"), autocast=staticmethod(contextlib.nullcontext)))
    probe = torch.randint(gb.vocab, (3, 4, gb.block_size))
    found = gb.examine(run, gb.Critic(model, None, None), gb.layout(gb.block_size, run.device), probe)
    assert found["gist_std"] < 1e-7 and found["gist_rank"] == pytest.approx(1, rel=1e-7)


def test_whitened_gists_are_at_distance_one_on_average():
    class Alone:
        def average(self, tensors):
            pass
    torch.manual_seed(0)
    g = torch.randn(4, 50, 6, 10) * torch.tensor([5.0, 3, 2, 1, 1, 1, .5, .1, .1, .1]) + torch.randn(4, 50, 1, 10) * 9
    matrix, found = gb.whitening(Alone(), g, 4)
    d2 = gb.squared_distances(g @ matrix)
    off = ~torch.eye(6, dtype=torch.bool)
    assert matrix.shape == (10, 4) and abs(d2[..., off].mean() - 1) < 1e-3
    assert 2 < found < 4  # 25, 9, 4 and ones: most of it in two or three directions
    kept, _ = gb.whitening(Alone(), g, 4, level=False)
    assert abs(gb.squared_distances(g @ kept)[..., off].mean() - 1) < 1e-3
    assert torch.allclose(kept.norm(dim=0), kept.norm(dim=0)[:1].expand(4))  # projected, and all scaled alike


# ---- the script

def test_the_script_runs_on_the_plays_and_goes_on_bit_for_bit(tmp_path, monkeypatch, capsys):
    """An interruption in an arm and in the meta phase: log, weights and summary as without."""
    settings = [*SMALL, "--arms=real,self,ema"]
    in_process(monkeypatch, *settings, f"--out_dir={tmp_path}/whole")
    summary = json.loads((tmp_path / "whole/summary.json").read_text())
    assert set(summary["arms"]) == {"real", "self", "ema"}
    assert summary["stage"] == "gist_bottleneck" and summary["arms"]["self"]["recovered"] is not None
    assert {"gist", "full", "none"} == set(summary["later"]) and len(summary["gist_share_by_place"]) == 4
    assert "nearest chunks" in (tmp_path / "whole/samples.txt").read_text()
    rows = log(tmp_path / "whole")
    assert all(r["real_targets"] == 0 for r in rows if r["arm"] in ("self", "ema"))
    assert {"agreement", "gist_std", "gist_rank", "agreement_probe", "outside"} <= set(rows[-1])
    for at, name in (("meta", 6), ("self", 3)):
        from configurator import Run
        original = Run.checkpoint

        def checkpoint(self, step, at_, tally, _original=original, _arm=at, _step=name, **parts):
            if at_["arm"] == _arm and step == _step:
                self.stop_signal = signal.SIGTERM
            return _original(self, step, at_, tally, **parts)

        monkeypatch.setattr(Run, "checkpoint", checkpoint)
        folder = tmp_path / f"cut-{at}"
        with pytest.raises(SystemExit):
            in_process(monkeypatch, *settings, f"--out_dir={folder}")
        monkeypatch.setattr(Run, "checkpoint", original)
        in_process(monkeypatch, f"--resume={folder}")
        assert log(folder) == rows
        a, b = (torch.load(tmp_path / f / "ckpt.pt", weights_only=True)["learner"] for f in ("whole", folder.name))
        assert all(torch.equal(a[k], b[k]) for k in a)
    (tmp_path / "prompt.txt").write_text("Now is the winter of our discontent")
    in_process(monkeypatch, f"--resume={tmp_path}/whole", "--arms=", f"--prompt={tmp_path}/prompt.txt")
    said = capsys.readouterr().out
    # 35 tokens of prompt and 63 of 64 own ones are read: 24 whole chunks of 4 and their gists, and 2 tokens more
    assert "full: keys and values of 122 tokens kept for 98 read" in said and "gist: keys and values of 26 tokens" in said
    again = json.loads((tmp_path / "whole/summary.json").read_text())
    assert again["arms"] == summary["arms"]


def test_a_critic_of_another_size_judges_and_its_run_goes_on_bit_for_bit(tmp_path, monkeypatch, capsys):
    in_process(monkeypatch, *SMALL, "--arms=", "--n_layer=3", "--n_embd=16", f"--out_dir={tmp_path}/critic")
    settings = [*SMALL, "--distance=praise", "--arms=real,frozen,forecast", f"--critic_from={tmp_path}/critic"]
    in_process(monkeypatch, *settings, f"--out_dir={tmp_path}/whole")
    from configurator import Run
    original = Run.checkpoint

    def checkpoint(self, step, at, tally, **parts):
        if at["arm"] == "forecast" and step == 3:
            self.stop_signal = signal.SIGTERM
        return original(self, step, at, tally, **parts)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "checkpoint", checkpoint)
        with pytest.raises(SystemExit):
            in_process(monkeypatch, *settings, f"--out_dir={tmp_path}/cut")
    (tmp_path / "critic").rename(tmp_path / "moved")  # what the run needs of it is in its checkpoint
    in_process(monkeypatch, f"--resume={tmp_path}/cut")
    (tmp_path / "moved").rename(tmp_path / "critic")
    assert log(tmp_path / "cut") == log(tmp_path / "whole")
    judge = torch.load(tmp_path / "whole/ckpt.pt", weights_only=True)["judge"]
    theirs = torch.load(tmp_path / "critic/ckpt.pt", weights_only=True)["snapshot"]["learner"]
    assert all(torch.equal(judge[k], theirs[k]) for k in theirs)
    for wrong, says in (("--chunk=2", "chunk=2 differs from 4"),
                        ("--rank=17", "rank=17 must be at most n_gist * n_embd = 16")):
        with pytest.raises(SystemExit):
            in_process(monkeypatch, *settings, wrong, f"--out_dir={tmp_path}/none")
        assert says in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_the_probe_finds_the_synonyms_of_a_model_to_which_they_are_one(tmp_path, monkeypatch):
    in_process(monkeypatch, *SMALL, "--dataset=planted-synonyms", "--vocab=64", "--arms=", "--controls=",
               f"--out_dir={tmp_path}/run")
    for name in vars(gb).copy():
        monkeypatch.setattr(gb, name, getattr(gb, name))  # the probe sets them to those of the run
    state = torch.load(tmp_path / "run/ckpt.pt", weights_only=True)
    assert probe.alike(tmp_path / "run")["embeddings"] < 0.2  # random; a token is not its own synonym
    table = state["snapshot"]["learner"]["embed.weight"]
    table[:64] = table[:64:4].repeat_interleave(4, 0)
    torch.save(state, tmp_path / "run/ckpt.pt")
    assert probe.alike(tmp_path / "run") == dict(gists=1, forecasts=1, embeddings=1)


def test_two_ranks_compute_what_one_does(tmp_path):
    settings = [*SMALL, "--dtype=float64", "--arms=real,frozen,shuffled,forecast", "--save_interval=100"]
    for ranks in (1, 2):
        done = launch(*settings, f"--out_dir={tmp_path}/{ranks}", ranks=ranks)
        assert done.returncode == 0, done.stdout
    for a, b in zip(log(tmp_path / "1"), log(tmp_path / "2"), strict=True):
        assert a["arm"] == b["arm"] and abs(a["gold_nats"] - b["gold_nats"]) < 1e-5, (a, b)


@pytest.mark.parametrize("path, distance, span", [("reinforce", "energy", 4), ("reinforce", "logscore", 2),
                                                  ("exact", "praise", 1)])
def test_every_path_trains(tiny, monkeypatch, path, distance, span):
    """A gradient reaches the learner's own tokens through each path."""
    for name, value in dict(path=path, distance=distance, span=span).items():
        monkeypatch.setattr(gb, name, value)
    lay, w, u = gb.layout(12, "cpu"), torch.randint(0, 7, (2, 13)), torch.rand(2, 12, 3, span)
    judge = GPT(tiny.config).double().requires_grad_(False)
    judge.load_state_dict(tiny.state_dict())
    critic = gb.Critic(judge, None, torch.eye(32))
    gb.self_loss("frozen", 0, tiny, critic, lay, w, None, u, {}).backward()
    assert tiny.head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("arguments, says", [
    (["--chunk=5"], "chunk=5 does not divide block_size=128"),
    (["--n_gist=5"], "n_gist=5 must be from 1 to chunk=4"),
    (["--span=2"], "use --path=reinforce"),
    (["--span=9", "--path=reinforce"], "span=9 must be from 1 to chunk=4"),
    (["--arms=frosen"], "did you mean 'frozen'"),
    (["--controls=half"], "'half' is not one of full, none, pool"),
    (["--n_layer=1"], "n_layer=1 must be 2 or more"),
    (["--candidates=1"], "candidates=1 must be 2 or more"),
    (["--prompt=nowhere.txt"], "prompt='nowhere.txt' is no file"),
    (["--path=reinforce", "--distance=praise"], "goes with path='exact'"),
    (["--order=2", "--arms=forecast"], "leave it out with order=2"),
    (["--critic_from=out/other", "--arms=self"], "leave them out with critic_from"),
    (["--arms=forecast", "--vocab=50257"], "it needs vocab of 4096 or less"),
    (["--critic_from=nowhere"], "nowhere holds no ckpt.pt"),
    (["--order=2", "--path=reinforce"], "it goes with path='exact'"),
])
def test_what_cannot_be_is_refused_in_one_line(monkeypatch, capsys, tmp_path, arguments, says):
    with pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, *arguments, f"--out_dir={tmp_path}/run")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and error.count("\n") <= 2
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_stage_is_refused(monkeypatch, capsys, tmp_path):
    torch.save(dict(format="metalearn-1", stage="self_ce"), tmp_path / "ckpt.pt")
    with pytest.raises(SystemExit):
        in_process(monkeypatch, f"--resume={tmp_path}")
    assert "is a checkpoint of self_ce.py" in capsys.readouterr().err
