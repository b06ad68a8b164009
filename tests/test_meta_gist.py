"""Stage 3: second order and the signal against slower references, and its script as a user runs it."""
import copy
import itertools
import math
import os
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import finish, in_process, kill_at, log, small_gpt, start, summary
from torch.func import functional_call

import meta_gist as mg
import pool
from equations import add, by_name, dot
from gists import Said, say_chunks, write_chunks
from model import adamw, sample_tokens
from phases import Phases
from pool import Pool

SCRIPT = "meta_gist.py"
SMALL = ["--meta_steps=12", "--pretrain=6", "--self_steps=6", "--n_embd=16", "--n_head=2", "--block_size=16",
         "--batch_size=4", "--outer_batch=8", "--eval_windows=4", "--eval_interval=3", "--save_interval=2",
         "--warmup=4", "--device=cpu", "--chunk=1", "--inner_steps=1",
         "--inner_length=0.05"]
TOY = dict(vocab=13, n_embd=16, block_size=8, SAMPLES=2, batch_size=2, outer_batch=4, inner_length=0.02,
           inner_steps=1)


@pytest.fixture(autouse=True)
def toy_settings(monkeypatch):
    """Settings of a toy; `set_toy` may change them, and they are put back."""
    changed = "chunk", "val_chunks", "grad_clip", "self_rate", "grad_accum", "EXACT", "common"
    for name in (*TOY, *changed):
        monkeypatch.setattr(mg, name, TOY.get(name, getattr(mg, name)))


def set_toy(**settings):
    for name, value in settings.items():
        setattr(mg, name, value)


def toy():
    """(learner, θ, φ) in float64, random weights everywhere."""
    learner = small_gpt(vocab=mg.vocab)
    phi = dict(E=torch.randn(mg.vocab, 16), log_kappa=torch.tensor(0.8), log_kappa_a=torch.tensor(1.5),
               nu=torch.tensor(0.3))
    return learner, by_name(learner), {n: t.double() for n, t in phi.items()}


def critic_of(phi):
    return torch.nn.ParameterDict({n: t.clone() for n, t in phi.items()})


def what_is_read(steps, rows=2):
    """(texts, chances, the text that judges) of a meta step."""
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(0, mg.vocab, (steps + 1, rows, mg.block_size + 1), generator=generator)
    R = mg.SAMPLES if mg.chunk > 1 else 1
    chances = torch.rand(steps, rows, R, mg.block_size, generator=generator)
    return list(texts[:-1]), list(chances), texts[-1]


def alone(tensors):
    """The average over one rank."""


def apart(a, b):
    """‖a − b‖ / ‖b‖ of two dicts of tensors."""
    off = add(a, b, -1)
    return (dot(off, off) / dot(b, b)).sqrt().item()


def keep_words(monkeypatch):
    """The list that will hold the own tokens of each inner step."""
    ys = []
    monkeypatch.setattr(mg, "write_chunks", lambda *a: ys.append(write_chunks(*a)) or ys[-1])
    return ys


def toy_phases(learner, critic, **parts):
    """Phases of one rank on random text, without a folder."""
    phases = Phases.__new__(Phases)
    phases.run = SimpleNamespace(average=alone, mean=lambda v: v.item(), rank=0, ranks=1, device="cpu")
    phases.piece = None
    tokens = torch.randint(0, 13, (2000,), generator=torch.Generator().manual_seed(0)).numpy()
    phases.corpus, phases.tally = SimpleNamespace(train=tokens, train_other=tokens, val=tokens), {}
    phases.corpus.val_other = tokens
    phases.judge = lambda: phases.parts["critic"]
    phases.settings = dict(batch_size=2, block_size=8, seed=1, grad_clip=1.0, grad_accum=1)
    phases.parts = dict(learner=learner, critic=critic, pool=Pool("cpu"), **parts)
    phases.at = dict(kept=dict(found=[]))
    return phases


# ---- second order

def said_plainly(learner, th, text, y):
    """What `say_chunks` gives, each chunk read in a plain sequence of its own behind the true text."""
    x, k, L = text[:, :-1], mg.chunk, learner.config.n_layer
    run = lambda s: functional_call(learner, th, (s,), dict(until=L, fused=False))
    speak = lambda h: (h @ th["head.weight"].T).log_softmax(-1)
    true = run(x).unflatten(1, (-1, k))
    own = [[run(torch.cat((x[:, :m * k + 1], y[:, r, m]), 1))[:, -k:] for m in range(x.size(1) // k)]
           for r in range(y.size(1))]
    own = torch.stack([torch.stack(chunks, 1) for chunks in own], 1)
    return Said(speak(own), speak(true), own, true)


def signal_plainly(phi, obs, said):
    """A by the formulas of the docstring, place by place."""
    E, k, own, true = phi["E"], mg.chunk, said.gists, said.gists_true
    T = (phi["log_kappa"].exp() * F.cosine_similarity(E[:, None], E[None], dim=-1)).softmax(-1)
    r = T[obs].unflatten(1, (-1, k)) - said.logp_true.exp() @ T
    sigmoid = lambda c: 1 / (1 + (-phi["log_kappa_a"].exp() * (c - phi["nu"])).exp())
    weight = lambda c: sigmoid(c) / sigmoid(torch.ones(()).double())
    w = lambda j, i: weight(F.cosine_similarity(own[..., j, :], true[:, None, :, i], dim=-1))[..., None]
    return torch.stack([sum(w(j, i) * r[:, None, :, i] for i in range(k)) for j in range(k)], 3)


def unrolled(learner, theta, phi, texts, ys, outer):
    """O(θ_S) as a function of φ, by autograd: A is data to each inner gradient, and depends on θ_k and φ."""
    for text, y in zip(texts, ys):
        moves = {n: t.clone().requires_grad_() for n, t in theta.items()}
        a = signal_plainly(phi, text[:, 1:], said_plainly(learner, theta, text, y))
        loss = -(a * said_plainly(learner, moves, text, y).logp).sum(-1).mean()
        g = dict(zip(moves, torch.autograd.grad(loss, list(moves.values()), create_graph=True)))
        size = sum(t.square().sum() for t in g.values()).sqrt()
        theta = {n: theta[n] - mg.inner_length * g[n] / size for n in theta}
    logits = functional_call(learner, theta, (outer[:, :-1],), dict(fused=False))
    return F.cross_entropy(logits.flatten(0, 1), outer[:, 1:].flatten())


@pytest.mark.parametrize("chunk, steps", [*itertools.product((1, 4), (1, 2, 4))])
def test_the_meta_gradient_is_that_of_the_whole_unroll_and_of_finite_differences(monkeypatch, chunk, steps):
    set_toy(chunk=chunk)
    learner, theta, phi = toy()
    texts, chances, outer = what_is_read(steps)
    ys = keep_words(monkeypatch)  # drawn once: where words jump there is no derivative
    dphi, judged, _ = mg.meta_step(learner, theta, phi, texts, chances, outer, alone)
    leaves = {n: t.clone().requires_grad_() for n, t in phi.items()}
    loss = unrolled(learner, theta, leaves, texts, ys, outer)
    exact = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))
    assert judged.item() == pytest.approx(loss.item(), rel=1e-12)
    assert apart(dphi, exact) < 1e-10
    torch.manual_seed(1)
    v = {n: torch.randn_like(t) for n, t in phi.items()}
    after = [unrolled(learner, theta, add(phi, v, e), texts, ys, outer).item() for e in (1e-4, -1e-4)]
    assert (after[0] - after[1]) / 2e-4 == pytest.approx(dot(dphi, v).item(), rel=1e-5)


RANKED = ((1, 1), (1, 3), (4, 2), (4, -2))  # chunk, inner steps, below zero own ones


def of_moments(steps):
    """(moments, count) where steps are own ones, and then they are."""
    if steps > 0:
        return ()
    set_toy(inner_length=0)
    return tuple({n: torch.full_like(p, 1e-4) for n, p in toy()[1].items()} for _ in range(2)), 5


def one_of_two_ranks(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)

    def average(tensors):
        for t in tensors:
            torch.distributed.all_reduce(t)
            t /= 2
    rows, found = slice(2 * rank, 2 * rank + 2), []
    for chunk, steps in RANKED:
        set_toy(**TOY, chunk=chunk)
        texts, chances, outer = what_is_read(abs(steps), rows=4)
        mine = [t[rows] for t in texts], [u[rows] for u in chances], outer[rows]
        exact, naive = (mg.meta_step(*toy(), *mine, how, *of_moments(steps))[0] for how in (average, alone))
        average(list(naive.values()))
        found.append((exact, naive))
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may still hold tensors, and then the end of an interpreter aborts


def test_two_ranks_find_the_second_order_of_one_and_the_mean_of_their_own_would_not(tmp_path):
    mp.spawn(one_of_two_ranks, (tmp_path,), nprocs=2)
    for (chunk, steps), (exact, naive) in zip(RANKED, torch.load(tmp_path / "found.pt"), strict=True):
        set_toy(**TOY, chunk=chunk)
        whole = mg.meta_step(*toy(), *what_is_read(abs(steps), rows=4), alone, *of_moments(steps))[0]
        assert apart(exact, whole) < 1e-10
        assert apart(naive, whole) > 0.01


def test_between_inner_steps_nothing_is_kept_that_has_a_graph(monkeypatch):
    set_toy(chunk=4)
    kept, real = [], mg.signal_gradient
    keep = lambda *a, **how: kept.append(real(*a, **how)) or kept[-1]
    monkeypatch.setattr(mg, "signal_gradient", keep)
    learner, theta, phi = toy()
    *found, first = mg.meta_step(learner, theta, phi, *what_is_read(3), alone)
    of = lambda *what: [t for t in torch.utils._pytree.tree_leaves(what) if torch.is_tensor(t)]
    graphs = [any(t.requires_grad or t.grad_fn for t in of(*call)) for call in kept]
    assert graphs == [False, False, True, True, True]  # two steps, the last one, and the two made again
    told = of(found, first)
    assert len(told) > len(theta) and not any(t.requires_grad or t.grad_fn for t in told)


@pytest.mark.parametrize("chunk", [1, 4])
def test_the_meta_step_keeps_its_digits_in_bfloat16(monkeypatch, chunk):
    set_toy(chunk=chunk)
    learner, theta, phi = toy()
    theta, phi = ({n: t.float() for n, t in weights.items()} for weights in (theta, phi))
    texts, chances, outer = what_is_read(2)
    said = keep_words(monkeypatch)
    exact = mg.meta_step(learner.float(), theta, phi, texts, chances, outer, alone)[0]
    monkeypatch.setattr(mg, "write_chunks", lambda *a: said.pop(0))  # other digits would draw other words
    with torch.autocast("cpu", torch.bfloat16):
        rough = mg.meta_step(learner, theta, phi, texts, chances, outer, alone)[0]
    assert 0 < apart(rough, exact) < (0.05 if chunk == 1 else 0.1)  # a match sharpens the digits of gists


@pytest.mark.parametrize("form", [dict(chunk=4, grad_accum=2), dict(chunk=1, grad_accum=4, EXACT=5)])
def test_in_pieces_a_meta_step_and_what_is_measured_are_those_of_the_whole_batch(form):
    set_toy(batch_size=4, outer_batch=8, **form)
    mg.common = torch.arange(mg.EXACT) if mg.EXACT < mg.vocab else slice(None)
    learner, theta, phi = toy()
    texts, _, _ = what_is_read(2, rows=4)
    chances, outer = list(torch.rand(2, 4, 2, mg.block_size)), what_is_read(1, rows=8)[2]
    phases, found = toy_phases(learner, critic_of(phi)), []
    for pieces in (1, form["grad_accum"]):
        set_toy(grad_accum=pieces)
        dphi, judged, g = mg.meta_step(learner, theta, phi, texts, chances, outer, alone)
        found.append((dphi | g, dict(mg.measure(phases, theta, 3), judged=judged.item())))
    assert apart(found[1][0], found[0][0]) < 1e-12 and found[1][1] == pytest.approx(found[0][1], rel=1e-9)


# ---- own steps

def run_on(learner, theta, moments, phi, texts, ys, outer):
    """O(θ_H) after own steps with AdamW written out (arXiv 1711.05101), as a function of φ."""
    (m, v), loss = moments, None
    for k, (text, y) in enumerate(zip(texts, ys), 6):
        moves = {n: p.clone().requires_grad_() for n, p in theta.items()}
        a = signal_plainly(phi, text[:, 1:], said_plainly(learner, theta, text, y))
        loss = -(a * said_plainly(learner, moves, text, y).logp).sum(-1).mean()
        g = dict(zip(moves, torch.autograd.grad(loss, list(moves.values()))))
        size = sum(p.square().sum() for p in g.values()).sqrt()
        g = {n: p * min(1.0, mg.grad_clip / (size + 1e-6)) for n, p in g.items()}
        m = {n: 0.9 * m[n] + 0.1 * g[n] for n in g}
        v = {n: 0.95 * v[n] + 0.05 * g[n] ** 2 for n in g}
        theta = {n: p * (1 - 0.01 * (0.0 if n == "embed.weight" else 0.1))
                 - 0.01 * (m[n] / (1 - 0.9 ** k)) / ((v[n] / (1 - 0.95 ** k)).sqrt() + 1e-8)
                 for n, p in theta.items()}
    logits = functional_call(learner, theta, (outer[:, :-1],), dict(fused=False))
    return F.cross_entropy(logits.flatten(0, 1), outer[:, 1:].flatten())


@pytest.mark.parametrize("steps", [1, 8, 64])
def test_through_own_steps_the_meta_gradient_is_that_of_the_whole_run(monkeypatch, steps):
    """By finite differences, through AdamW and its clipping, of all of φ."""
    set_toy(chunk=4, grad_clip=0.05, inner_length=0)
    learner, theta, phi = toy()
    texts, chances, outer = what_is_read(steps)
    moments = tuple({n: 1e-4 * torch.rand_like(p) for n, p in theta.items()} for _ in range(2))
    ys = keep_words(monkeypatch)  # drawn once: where words jump there is no derivative
    monkeypatch.setattr(mg, "rate", lambda arm, step: 0.01)
    found, judged, _ = mg.meta_step(learner, theta, phi, texts, chances, outer, alone, moments, 5)
    after = lambda changed: run_on(learner, theta, moments, changed, texts, ys, outer).item()
    assert judged.item() == pytest.approx(after(phi), rel=1e-9)
    torch.manual_seed(1)
    for n in phi:
        way = torch.randn_like(phi[n])
        up, down = ({**phi, n: phi[n] + e * way} for e in (1e-5, -1e-5))
        differs = (after(up) - after(down)) / 2e-5
        assert abs((found[n] * way).sum() - differs) < 1e-5 * max(1e-2, abs(differs)), (n, differs)


def test_own_steps_are_those_of_the_optimizer():
    set_toy(chunk=1)
    learner, theta, _ = toy()
    optimizer, zero = adamw(learner, 0.01), {n: torch.zeros_like(p) for n, p in theta.items()}
    theta, moments = {n: p.clone() for n, p in theta.items()}, (zero, zero)
    for k in range(3):
        g = {n: torch.randn_like(p) for n, p in theta.items()}
        theta, moments = mg.adamw_step(theta, moments, g, 0.01, k + 1, 0.5)
        phases = SimpleNamespace(settings=dict(grad_clip=0.5, grad_accum=1), tally={})
        Phases.take_step(phases, learner, optimizer, g)
    assert apart(theta, by_name(learner)) < 1e-7


# ---- the signal

@pytest.mark.parametrize("chunk", [1, 4])
def test_a_draw_stands_for_all_tokens_that_are_not_common_without_bias(monkeypatch, chunk):
    """In mean over draws it is the exact signal, and so is what is derived of it by θ and φ."""
    set_toy(chunk=chunk, common=torch.tensor([2, 3, 5, 7, 12]))
    learner, theta, phi = toy()
    text, y = what_is_read(1)[2], torch.randint(0, 13, (2, 1, 8 // chunk, chunk - 1))
    weights = torch.randn(2, 1, 8 // chunk, chunk, 13).double()
    monkeypatch.setattr(mg, "write_chunks", lambda *a: y)

    def found(u):
        mg.EXACT = 13 if u is None else 5
        _, drawn = mg.write(learner, theta, text, torch.full((2, 2, 8), u or 0.0))
        assert drawn is None or not torch.isin(drawn, mg.common).any()
        if u is None:
            mg.common = slice(None)
        held = {n: t.clone().requires_grad_() for n, t in (theta | phi).items()}
        said = say_chunks(learner, held, text[:, :-1], y, fused=False)
        a = mg.signal(held, text[:, 1:], said, drawn)
        slopes = torch.autograd.grad((a * weights).sum(), list(held.values()), materialize_grads=True)
        return torch.cat([a.detach().flatten(), *(s.flatten() for s in slopes)])
    n, one = 1000, found(0.3)
    drawn = sum(found((i + 0.5) / n) for i in range(n)) / n
    exact = found(None)
    assert (drawn - exact).abs().max() < 1e-2 * exact.abs().max() and exact.abs().max() > 0.1
    assert (one - exact).abs().max() > 0.05 * exact.abs().max()


def test_above_a_size_a_draw_is_made_that_is_no_rollout():
    set_toy(chunk=4, EXACT=5, common=torch.arange(5))
    learner, theta, phi = toy()
    text, u = what_is_read(1)[2], torch.rand(2, mg.SAMPLES + 1, 8)
    y, drawn = mg.write(learner, theta, text, u)
    assert torch.equal(y, write_chunks(learner, theta, text[:, :-1], 4, u[:, :-1]))
    rest = learner(text[:, :-1])[..., 5:]
    assert torch.equal(drawn, 5 + sample_tokens(rest, u[:, -1]))
    exact = dict(EXACT=mg.vocab, common=slice(None))
    set_toy(**exact)
    assert mg.write(learner, theta, text, u)[1] is None


def test_with_single_tokens_the_signal_is_praise_and_its_mean_over_what_the_learner_says_is_zero():
    set_toy(chunk=1)
    learner, theta, phi = toy()
    text, y = what_is_read(1)[2], torch.zeros(2, 1, 8, 0).long()
    said, obs, T = say_chunks(learner, theta, text[:, :-1], y), text[:, 1:], mg.kernel(phi)
    p, close = said.logp_true.exp(), dict(rtol=0, atol=1e-14)
    mean = sum(p[:, None, ..., v, None] * mg.signal(phi, torch.full_like(obs, v), said) for v in range(13))
    assert mean.abs().max() < 1e-14  # every token in the observation's place
    a = mg.signal(phi, obs, said)
    assert torch.allclose(a[:, 0, :, 0], T[obs] - p[:, :, 0] @ T, **close)
    assert torch.allclose(a, signal_plainly(phi, obs, said_plainly(learner, theta, text, y)), **close)


@pytest.mark.parametrize("chunk", [2, 3])
def test_in_chunks_the_mean_of_the_signal_over_all_true_chunks_is_zero_for_any_critic_and_own_text(chunk):
    """Σ_x p_θ(x | c) A_j(v) = 0, x over all chunks after one context c, for random φ and own text y."""
    set_toy(vocab=3, chunk=chunk, block_size=2 * chunk)
    learner, theta, phi = toy()
    chunks = torch.tensor(list(itertools.product(range(3), repeat=chunk)))
    torch.manual_seed(2)
    context, y = torch.randint(0, 3, (1, chunk + 1)), torch.randint(0, 3, (1, 1, 2, chunk - 1))
    text = torch.cat((context.expand(len(chunks), -1), chunks), 1)
    logp = learner(text[:, :-1])[:, chunk:].log_softmax(-1)
    weight = logp.gather(-1, chunks[..., None]).sum((1, 2)).exp()
    assert weight.sum().item() == pytest.approx(1)
    said = say_chunks(learner, theta, text[:, :-1], y.expand(len(chunks), -1, -1, -1))
    a = mg.signal(phi, text[:, 1:], said)[:, 0, 1]                 # [3^k, k, V], of the second chunk
    mean = (weight[:, None, None] * a).sum(0)
    assert a.shape == (3 ** chunk, chunk, 3) and mean.abs().max() < 1e-12 < 1e-3 < a.abs().max()


def test_same_place_hears_of_the_truth_at_the_own_place_alone():
    set_toy(chunk=4)
    learner, theta, phi = toy()
    (text,), (u,), _ = what_is_read(1)
    y = write_chunks(learner, theta, text[:, :-1], 4, u)
    said = said_plainly(learner, theta, text, y)
    match = mg.match(phi, said.gists, said.gists_true).diagonal(dim1=-2, dim2=-1)
    T, p = mg.kernel(phi), said.logp_true.exp()
    r = (T[text[:, 1:]].view_as(p) - p @ T)[:, None]
    a = mg.signal(phi, text[:, 1:], said, arm="same_place")
    assert torch.allclose(a, match[..., None] * r)
    assert not torch.allclose(a, mg.signal(phi, text[:, 1:], said))


def test_own_text_matches_the_truth_where_their_prefixes_are_equal():
    set_toy(chunk=4)
    learner, theta, phi = toy()
    text = what_is_read(1)[2]
    truth = text[:, 1:].unflatten(1, (2, 4))[:, None, :, :3]

    def diagonal(y):
        said = say_chunks(learner, theta, text[:, :-1], y)
        return mg.match(phi, said.gists, said.gists_true).diagonal(dim1=-2, dim2=-1)
    assert torch.allclose(diagonal(truth), torch.ones(2, 1, 2, 4).double())
    y = truth.clone()
    y[:, :, 1, 1] = (y[:, :, 1, 1] + 1) % 13  # from the second token of the second chunk on
    parted = (diagonal(y) - 1).abs() > 1e-6
    assert parted.tolist() == [[[[False] * 4, [False, False, True, True]]]] * 2


def test_first_and_frozen_first_learn_of_the_first_token_of_each_chunk_alone():
    set_toy(chunk=4)
    learner, theta, phi = toy()
    (text,), (u,), _ = what_is_read(1)
    said = lambda th: functional_call(learner, th, (text[:, :-1],)).log_softmax(-1)
    first = lambda th: -said(th).gather(-1, text[:, 1:, None])[:, [0, 4]].mean()
    g, loss = mg.real_gradient(learner, theta, text, every=4)
    assert torch.allclose(loss, first(theta)) and apart(g, torch.func.grad(first)(theta)) < 1e-12
    y = write_chunks(learner, theta, text[:, :-1], 4, u)
    a = signal_plainly(phi, text[:, 1:], said_plainly(learner, theta, text, y))
    first = lambda th: -(a * said_plainly(learner, th, text, y).logp).sum(-1)[..., 0].mean()
    taken, phases = [], toy_phases(learner, critic_of(phi), optimizer=None)
    phases.chance, phases.take_step = lambda *a: u, lambda module, optimizer, g: taken.append(g)
    for arm in ("frozen_first", "frozen"):
        mg.signal_step(phases, arm, text, 0)
    assert apart(taken[0], torch.func.grad(first)(theta)) < 1e-12 and apart(taken[1], taken[0]) > 0.1


# ---- what moves

@pytest.mark.parametrize("chunk, own", [(1, False), (4, False), (4, True)])
def test_learners_of_the_pool_step_as_the_arms_do_and_start_again_when_they_are_old_or_hacked(
        monkeypatch, chunk, own):
    set_toy(chunk=chunk, **(dict(inner_length=0, self_rate=0.5) if own else {}))
    limit = lambda steps, worse: (monkeypatch.setattr(pool, "STEPS", steps),
                                  monkeypatch.setattr(pool, "WORSE", worse))
    limit(2, 100.0)
    learner, _, phi = toy()
    critic = critic_of(phi)
    optimizer, mover = adamw(learner, 1e-3), copy.deepcopy(learner)
    minds = dict(optimizer=optimizer, critic_optimizer=torch.optim.Adam(critic.parameters()))
    phases = toy_phases(learner, critic, **minds)
    held, mover = phases.parts["pool"], dict(learner=mover, optimizer=adamw(mover, 1.0))  # a rate for nothing
    mg.real_step(phases, phases.text(0))
    pretrained, state = copy.deepcopy(learner), copy.deepcopy(optimizer.state_dict())
    for turn in range(4):  # what an arm does from the same snapshot: half by the signal, half by real text
        arm = copy.deepcopy(pretrained)
        mind = adamw(arm, 1e-3)
        mind.load_state_dict(copy.deepcopy(state))
        for group in mind.param_groups:  # judged by own steps, it takes them at the arm's rate
            group["lr"] = 5e-4 if own and turn < 2 else 1e-3
        stand_in = toy_phases(arm, copy.deepcopy(critic), optimizer=mind)
        text, u = phases.text(turn, mg.INNER), mg.chance(phases, turn, mg.ROLLOUT)
        if turn < 2:
            stand_in.chance = lambda *a: u
            mg.signal_step(stand_in, "frozen", text, turn)
        else:
            mg.real_step(stand_in, text)
        mg.critic_step(phases, turn, mover)
        assert apart(held.members[turn]["learner"], by_name(arm)) < 1e-12
        assert apart(by_name(arm), by_name(pretrained)) > 1e-5
    assert apart(by_name(learner), by_name(pretrained)) == 0  # it stays, for the others start from it
    members = held.members
    assert [m["age"] for m in members] == [1] * 4 and held.restarts == 0
    mg.critic_step(phases, 4, mover)
    assert members[0] == {} and members[1]["age"] == 1 and held.restarts == 0   # old
    limit(100, 0.2)
    members[1]["best"] = -1.0
    mg.critic_step(phases, 5, mover)
    assert members[1] == {} and held.restarts == 1                              # hacked
    mg.critic_step(phases, 6, mover)
    assert members[2]["age"] == 2 and held.restarts == 1
    again = Pool("cpu")
    again.load_state_dict(copy.deepcopy(held.state_dict()))
    assert again.restarts == 1 and apart(again.members[2]["learner"], members[2]["learner"]) == 0


@pytest.mark.parametrize("decay, share", [(0.0, 1.0), (0.75, 0.25)])
def test_the_critic_of_self_moves_as_the_learner_has_and_that_of_ema_follows_slowly(decay, share):
    learner, _, before = toy()
    critic = critic_of(before)
    phases = toy_phases(learner, critic)
    phases.at["snapshot"] = copy.deepcopy(dict(learner=learner.state_dict(), critic=critic.state_dict()))
    with torch.no_grad():
        learner.embed.weight += 1
    mg.shift_critic(phases, decay)
    ratio = before["E"].norm() / phases.snapshot["learner"]["embed.weight"][:mg.vocab].norm()
    moved = add(by_name(critic), before, -1)
    assert torch.allclose(moved["E"], share * ratio) and moved["log_kappa"] == 0
    mg.shift_critic(phases, decay)  # and on from there
    moved = add(by_name(critic), before, -1)
    assert torch.allclose(moved["E"], (1 - decay ** 2) * ratio)


# ---- the script

def weights(folder):
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    return {f"{part}.{n}": t for part in ("learner", "critic") for n, t in state[part].items()}


@pytest.mark.parametrize("form", ["--chunk=4", "--chunk=4 --inner_length=0 --grad_accum=2"])
def test_killed_in_each_phase_a_resumed_run_equals_one_without_interruption(tmp_path, monkeypatch, form):
    settings = [*SMALL, *form.split(), "--arms=real,ema,shuffled", "--dtype=float64"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    in_process(monkeypatch, SCRIPT, *settings, f"--out_dir={whole}")
    begun, resumed = [*settings, f"--out_dir={broken}"], [f"--resume={broken}"]
    for arm, step, arguments in (("meta", 9, begun), ("ema", 3, resumed)):
        kill_at(start(SCRIPT, *arguments), broken, arm, step)
        at = torch.load(broken / "ckpt.pt", weights_only=True)
        assert at["arm"] == arm and at["step"] > 0
    in_process(monkeypatch, SCRIPT, *resumed)
    assert log(broken) == log(whole) and len(log(broken)) == 5 + 3 * 3
    learned = [len({row[s] for row in log(whole)}) > 1 for s in ("kappa", "kappa_a", "nu")]
    assert learned == [True, "length" in form, "length" in form]  # one normalised step would spoil the match
    found, expected = ({k: v for k, v in summary(f).items() if k != "config"} for f in (broken, whole))
    assert found == expected
    for name in ("samples.txt", "texts.jsonl"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(broken)[name]), name


def test_two_ranks_compute_what_one_does(tmp_path, monkeypatch):
    settings = [*SMALL, "--chunk=4", "--arms=frozen,ema,sharpen,first", "--dtype=float64", "--inner_steps=2",
                "--inner_length=0"]
    one, two = tmp_path / "1", tmp_path / "2"
    in_process(monkeypatch, SCRIPT, *settings, f"--out_dir={one}")
    finish(SCRIPT, *settings, f"--out_dir={two}", ranks=2)
    for a, b in zip(log(one), log(two), strict=True):
        for key in a:
            number = isinstance(a[key], float)
            near = pytest.approx(a[key], rel=1e-5, abs=1e-9) if number else a[key]  # the log keeps six digits
            assert b[key] == near, (a["arm"], a["step"], key)
    theirs = weights(two)
    assert max((value - theirs[name]).abs().max() for name, value in weights(one).items()) < 1e-9


def test_every_arm_starts_from_the_same_snapshot_and_leaves_what_it_should(tmp_path, monkeypatch):
    out, lent = tmp_path / "run", tmp_path / "lent"
    arms = ["real", "first", "self", "frozen", "frozen_first", "ema", "shuffled", "sharpen"]
    settings = [*SMALL, "--chunk=2", "--pretrain=34", "--meta_steps=40"]
    in_process(monkeypatch, SCRIPT, *settings, f"--arms={','.join(arms)}", f"--out_dir={out}")
    left = "log.jsonl ckpt.pt config.json samples.txt summary.json curves.png ends sources"
    assert set(left.split()) <= {p.name for p in out.iterdir()}
    assert {p.stem for p in (out / "ends").iterdir()} == set(arms)
    assert {"meta_gist.py", "equations.py", "gists.py"} <= {p.name for p in (out / "sources").iterdir()}
    found, rows = summary(out), log(out)
    assert list(found["arms"]) == arms
    assert len({arm["gold_start"] for arm in found["arms"].values()} | {found["gold_meta_end"]}) == 1
    ends = [torch.load(out / f"ends/{arm}.pt", weights_only=True)["weights"]["head.weight"] for arm in arms]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(ends, 2))
    meta = [row for row in rows if row["arm"] == "meta" and "gain" in row]
    assert [row["step"] for row in meta] == [36, 39, 40] and meta[-1]["kappa"] != meta[0]["kappa"]
    for name in ("gain", "gain_shuffled", "gain_real", "cosine_real", "cos_bb", "cos_bb_real"):
        assert math.isfinite(found[name]) and found[name] == pytest.approx(meta[-1][name], rel=1e-4)
    targets = {arm: [row["real_targets"] for row in rows if row["arm"] == arm][-1] for arm in arms}
    assert targets == dict(dict.fromkeys(arms, 0), real=6 * 4 * 16, first=6 * 4 * 8)
    assert (out / "samples.txt").read_text().count("==== after") == 1 + len(arms)
    in_process(monkeypatch, SCRIPT, *settings, "--arms=real,frozen", f"--start={out}", f"--out_dir={lent}")
    assert log(lent) == [row for row in rows if row["arm"] in ("real", "frozen")]


@pytest.mark.parametrize("arguments, says", [
    ("--arms=self,frosen", "there is no arm 'frosen'; did you mean 'frozen'?"),
    ("--pretrain=441", "pretrain=441 must be at most meta_steps=440"),
    ("--chunk=5", "chunk=5 must divide block_size=32"),
    ("--chunk=0", "chunk=0 must divide block_size=32"),
    ("--arms=oracle", "arms oracle, table, mask, val_chunks='aligned' need 'kjv-asv'"),
    ("--val_chunks=aligned", "dataset='plays': arms oracle, table, mask, val_chunks='aligned' need"),
    ("--dataset=kjv-asv --val_chunks=aligned", "outer_batch=256: with val_chunks='aligned' it must be"),
    ("--kappa_a=0", "kappa_a=0.0 must be above 0"),
    ("--pretrain=0", "pretrain=0 must be above 0 with inner_length=0"),
    ("--inner_steps=65", "inner_steps=65 must be from 1 to 64"),
    ("--inner_steps=0", "inner_steps=0 must be from 1 to 64"),
    ("--kappa=0", "kappa=0.0 and kappa_a=5.0 must be above 0"),
    ("--outer_batch=8", "outer_batch=8 must be a multiple of batch_size=16"),
    ("--outer_batch=40", "outer_batch=40 must be a multiple of batch_size=16"),
    ("--grad_accum=3", "batch_size=16 must be a multiple of the 1 ranks times grad_accum=3"),
    ("--decay=1.5", "decay=1.5 must be at most 1"),
    ("--ema_decay=1", "ema_decay=1.0 must be below 1"),
    ("--train_tokens=20", "asks for texts of"),
    ("--resume=no/such/run", "holds no ckpt.pt"),
])
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        in_process(monkeypatch, SCRIPT, *arguments.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and error.count("\n") == 1, error
    assert not list(tmp_path.iterdir())
