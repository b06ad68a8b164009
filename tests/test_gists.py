"""Chunks, gists, own spans and own chunks against naive forwards of each, in float64."""
import itertools
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import gists
from conftest import small_gpt
from equations import by_name
from gists import (Space, carried, effective_rank, layout, make_spaces, past_of, read,
                   say_chunks, score_function, sees_of, spans_at, squared_distances, starts_of, steadiness,
                   vectors, whitening, write_chunks, write_spans)
from model import GIST, GPT, GPTConfig, TRUE, attention_mask, sample_tokens

T, CHUNK, N_GIST, V = 12, 4, 2, 7
LAY = layout(T, CHUNK, N_GIST, V, "cpu")


@pytest.fixture
def net():
    return small_gpt(V, N_GIST, layers=3)


@pytest.fixture
def x():
    return torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(1))


def alone(tensors):
    """The average over ranks where there is one rank."""


# ---- layout and masks

def test_gists_stand_behind_their_chunks_at_the_last_position():
    lay = layout(8, 4, 2, 7, "cpu")
    assert lay.template.tolist() == [0, 0, 0, 0, 7, 8, 0, 0, 0, 0, 7, 8]
    assert lay.pos.tolist() == [0, 1, 2, 3, 3, 3, 4, 5, 6, 7, 7, 7]
    assert lay.text.tolist() == [0, 1, 2, 3, 6, 7, 8, 9] and lay.marks.tolist() == [7, 8]
    assert lay.gists.tolist() == [[4, 5], [10, 11]]
    assert lay.mask["gist"][6].tolist() == [False] * 4 + [True] * 3 + [False] * 5


@pytest.mark.parametrize("how", ["gist", "full", "none"])
def test_the_past_is_seen_through_the_mask_alone(net, x, how):
    """Changing a token of the first chunk moves later logits only as the mask allows."""
    other = x.clone()
    other[:, 1] = (x[:, 1] + 1) % V
    change = lambda lay: (read(net, lay, x, how) - read(net, lay, other, how)).abs().amax(-1)[0]
    moved = lambda lay: (change(lay) > 1e-12).tolist()
    assert moved(LAY) == [False] + [True] * 3 + [how != "none"] * 8
    if how == "gist":  # the path runs through the gists: with their keys hidden nothing arrives
        chunk = LAY.pos // CHUNK
        hidden = LAY.mask[how] & ((LAY.template == 0) | (chunk[:, None] == chunk))
        assert moved(LAY._replace(mask={how: hidden})) == [False] + [True] * 3 + [False] * 8


def test_what_gists_carry_is_the_share_of_the_gap_between_no_past_and_the_full_one(net):
    texts = torch.randint(0, V, (3, T + 1))
    nats = {}
    for how in ("gist", "full", "none"):
        logp = read(net, LAY, texts[:, :-1], how).log_softmax(-1)
        nats[how] = -logp.gather(-1, texts[:, 1:, None])[:, CHUNK:].mean().item()
    found = carried(dict.fromkeys(nats, net), LAY, texts, CHUNK, 2, nullcontext)
    assert found["later"] == pytest.approx(nats)
    share = (nats["none"] - nats["gist"]) / (nats["none"] - nats["full"])
    assert found["gist_share"] == pytest.approx(share)
    assert set(carried(dict(gist=net), LAY, texts, CHUNK, 2, nullcontext)) == {"later"}


# ---- own spans and what stands for them

def test_spans_begin_after_a_prefix_and_stay_in_their_chunk(x):
    assert starts_of(12, 4, 2, "cpu").tolist() == [1, 2, 4, 5, 6, 8, 9, 10]
    assert starts_of(8, 4, 1, "cpu").tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert torch.equal(spans_at(x, torch.tensor([1, 5]), 3), torch.stack((x[:, 1:4], x[:, 5:8]), 1))
    sees = sees_of(LAY, torch.tensor([1, 6]))
    assert sees.int().tolist() == [[1] + [0] * 17, [0, 0, 0, 0, 1, 1, 1, 1] + [0] * 10]


def test_gists_of_own_spans_equal_a_masked_forward_of_each(net, x):
    """Each own span and its gists in a sequence of its own, behind the true past, under one plain mask."""
    starts = starts_of(T, CHUNK, 2, "cpu")
    spans = torch.randint(0, V, (2, len(starts), 3, 2))
    got = vectors(Space("gist"), net, LAY, past_of(Space("gist"), net, LAY, x), starts, spans)
    assert got.shape == (2, len(starts), 3, 2 * 16)
    for n, s in enumerate(starts.tolist()):
        at = LAY.text[s].item()
        pos = torch.cat((LAY.pos[:at], torch.tensor([s, s + 1, s + 1, s + 1])))
        for b, m in itertools.product(range(2), range(3)):
            tokens = LAY.template.clone()
            tokens[LAY.text] = x[b]
            tokens = torch.cat((tokens[:at], spans[b, n, m], LAY.marks))
            mask = attention_mask(torch.where(tokens >= V, GIST, TRUE), pos // CHUNK, pos, "gist")
            want = net(tokens[None], pos, mask, until=2)[0, -2:].flatten()
            assert torch.allclose(got[b, n, m], want, atol=1e-10)


def test_a_forecast_is_what_a_full_forward_expects_after_the_span(net, x):
    starts, space = starts_of(T, CHUNK, 2, "cpu"), Space("forecast")
    spans = torch.randint(0, V, (2, len(starts), 3, 2))
    got = vectors(space, net, LAY, past_of(space, net, LAY, x), starts, spans)
    for (n, s), b, m in itertools.product(enumerate(starts.tolist()), range(2), range(3)):
        text = x[b].clone()
        text[s:s + 2] = spans[b, n, m]
        want = read(net, LAY, text[None])[0, s + 1].log_softmax(-1)
        assert torch.allclose(got[b, n, m], want - want.mean(), atol=1e-10)


def test_random_numbers_depend_on_the_tokens_of_the_span_alone(net, x):
    table, starts = torch.randn(V, 5).double(), starts_of(T, CHUNK, 2, "cpu")
    spans = torch.randint(0, V, (2, len(starts), 3, 2))
    space = Space("random", torch.eye(10).double()[:, :4], table)
    got = vectors(space, net, LAY, past_of(space, net, LAY, x), starts, spans)
    assert torch.allclose(got, torch.cat((table[spans[..., 0]], table[spans[..., 1]]), -1)[..., :4])


def test_spans_written_from_caches_equal_naive_writing(net, x):
    """Sampled tokens, their log probabilities and the gradient of these, against full forwards of each."""
    starts, past = starts_of(T, CHUNK, 3, "cpu"), {}
    before = read(net, LAY, x, cache=past)[:, starts - 1].log_softmax(-1)
    u = torch.rand(2, len(starts), 2, 3, generator=torch.Generator().manual_seed(0))
    spans, logp = write_spans(net, LAY, past, before, starts, u)
    naive = torch.zeros_like(logp)
    for b, n, m in itertools.product(range(2), range(len(starts)), range(2)):
        text = x[b].clone()
        for j, at in enumerate(range(starts[n], starts[n] + 3)):
            said = read(net, LAY, text[None])[0, at - 1].log_softmax(-1)
            text[at] = sample_tokens(said, u[b, n, m, j])
            assert text[at] == spans[b, n, m, j]
            naive[b, n, m] = naive[b, n, m] + said[text[at]]
    assert torch.allclose(logp, naive, atol=1e-10)
    weight = torch.randn_like(logp)
    slopes = [torch.autograd.grad((weight * value).sum(), list(net.parameters()), allow_unused=True)
              for value in (logp, naive)]
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(*slopes))


# ---- distances

def test_squared_distances_are_those_of_every_pair():
    g = torch.randn(2, 5, 3).double()
    expected = (g[:, :, None] - g[:, None]).square().sum(-1)
    assert torch.allclose(squared_distances(g), expected, atol=1e-12)
    assert (squared_distances(g.float() + 1e3).diagonal(dim1=1, dim2=2) == 0).all()  # in spite of rounding


@pytest.mark.parametrize("values, rank", [
    ((2, 2, 2, 0), 3), ((1, 1, -1e-9), 2), ((-2e-20, 1e-20), 1), ((0, 0), 1)])
def test_effective_rank_counts_directions_and_is_finite_of_rounding_alone(values, rank):
    assert effective_rank(torch.tensor(values, dtype=torch.float32)) == pytest.approx(rank, rel=1e-6)


def test_whitened_vectors_are_at_distance_one_on_average_and_level_ones_in_every_direction():
    torch.manual_seed(0)
    spread = torch.tensor([5.0, 3, 2, 1, 1, 1, .5, .1, .1, 0])
    shared = torch.randn(4, 50, 1, 10) * 9  # by the spans of one prefix: it does not count
    g = torch.randn(4, 50, 6, 10) * spread + shared
    off = ~torch.eye(6, dtype=torch.bool)
    for level in (True, False):
        matrix, rank = whitening(g, alone, level)
        assert matrix.shape == (10, 9)
        assert 2 < rank < 4  # 25, 9, 4 and ones: most of it in two or three directions
        white = g @ matrix
        assert abs(squared_distances(white)[..., off].mean() - 1) < 1e-3
        sizes = (white - white.mean(2, keepdim=True)).flatten(0, 2).var(0)
        assert torch.allclose(sizes, sizes.mean(), rtol=1e-2) == level
    assert torch.allclose(matrix.norm(dim=0), matrix.norm(dim=0)[0])  # projected, and all scaled alike


@pytest.mark.parametrize("proper", [True, False])
def test_the_score_function_is_unbiased(proper):
    """Its mean over every triple of samples, against the loss and its gradient written out."""
    torch.manual_seed(0)
    d, truth = squared_distances(torch.randn(4, 3).double()).sqrt(), 2
    logits = torch.tensor([0.3, -0.2, 0.5, 0.0]).double().requires_grad_()
    p = logits.softmax(-1)
    exact = (p * d[truth]).sum() - (0.5 * p @ d @ p if proper else 0)
    want, = torch.autograd.grad(exact, logits, retain_graph=True)
    mean_loss, mean_slope = 0.0, torch.zeros(4).double()
    for ys in itertools.product(range(4), repeat=3):
        order = [*ys, truth]
        loss, weight = score_function(d[order][:, order], proper)
        logp = logits.log_softmax(-1)[list(ys)]
        chance = logp.detach().sum().exp()
        mean_loss += chance * loss
        mean_slope += chance * torch.autograd.grad((weight * logp).mean(), logits)[0]
    assert torch.allclose(mean_loss, exact.detach(), atol=1e-12)
    assert torch.allclose(mean_slope, want, atol=1e-12)


def test_samples_at_equal_distances_have_no_weight():
    """The others' mean is taken off: what is left of a sample is what it adds."""
    for proper in (True, False):
        assert score_function(1 - torch.eye(5), proper)[1].tolist() == pytest.approx([0] * 4, abs=1e-6)


# ---- spaces

def test_own_spans_are_at_distance_one_on_average_in_every_space(net, x, monkeypatch):
    starts = starts_of(T, CHUNK, 1, "cpu")
    own = torch.arange(V).expand(2, len(starts), V)[..., None]
    spaces, rank = make_spaces(net, LAY, x, starts, own, np.random.default_rng(0), alone)
    assert set(spaces) == {"gist", "random", "forecast"} and 1 < rank < N_GIST * 16
    off = ~torch.eye(V, dtype=torch.bool)
    for space in spaces.values():
        g = vectors(space, net, LAY, past_of(space, net, LAY, x), starts, own)
        assert squared_distances(g)[..., off].mean().item() == pytest.approx(1, rel=1e-4), space.kind
    monkeypatch.setattr(gists, "LARGEST_FORECAST", V - 1)
    assert "forecast" not in make_spaces(net, LAY, x, starts, own, np.random.default_rng(0), alone)[0]


def test_gists_of_the_first_step_which_are_all_alike_have_rank_one():
    """In float32 LAPACK makes NaN of their eigenvalues, at some seeds, this one among them."""
    torch.manual_seed(6)
    model = GPT(GPTConfig(512, 3, 2, 4, 128))
    lay, texts = layout(64, 4, 2, 512, "cpu"), torch.randint(512, (12, 64))
    starts = starts_of(64, 4, 1, "cpu")
    found = steadiness(Space("gist"), model, lay, texts, starts, 1, np.random.default_rng(0))
    assert found["gist_std"] < 1e-6 and found["gist_rank"] == pytest.approx(1, rel=1e-6)


def test_gists_of_spans_that_a_network_tells_apart_are_steady_and_those_it_confuses_are_not(net, x):
    starts, rng = starts_of(T, CHUNK, 1, "cpu"), lambda: np.random.default_rng(0)
    own = torch.arange(V).expand(2, len(starts), V)[..., None]
    space = make_spaces(net, LAY, x, starts, own, rng(), alone)[0]["random"]
    found = steadiness(space, net, LAY, x, starts, 1, rng())
    assert found["agreement_probe"] == 1  # the past does not matter
    blind = space._replace(table=torch.zeros_like(space.table))
    found = steadiness(blind, net, LAY, x, starts, 1, rng())
    assert found == dict(agreement_probe=0, gist_std=0, gist_rank=1)


# ---- own chunks beside the true ones

def own_chunks(net, x, chunk, R):
    u = torch.rand(2, R, T, generator=torch.Generator().manual_seed(2))
    return u, write_chunks(net, by_name(net), x, chunk, u)


@pytest.mark.parametrize("chunk, R", [(4, 2), (1, 1), (2, 3)])
def test_own_chunks_equal_naive_writing_and_are_read_as_if_each_stood_alone(net, x, chunk, R):
    u, y = own_chunks(net, x, chunk, R)
    n = T // chunk
    assert y.shape == (2, R, n, chunk - 1)
    after_own, after_truth, h_own, h_truth = say_chunks(net, by_name(net), x, y)
    assert after_own.shape == (2, R, n, chunk, V) and after_truth.shape == (2, n, chunk, V)
    assert h_own.shape == (2, R, n, chunk, 16) and h_truth.shape == (2, n, chunk, 16)
    assert torch.equal(after_own[..., 0, :], after_truth[:, None, :, 0].expand(-1, R, -1, -1))
    for b, m in itertools.product(range(2), range(n)):
        true = net(x[b:b + 1, :(m + 1) * chunk])[0, -chunk:].log_softmax(-1)
        assert torch.allclose(after_truth[b, m], true, atol=1e-10)
        for r in range(R):
            text = x[b:b + 1, :m * chunk + 1]
            for j in range(chunk):
                said, state = net(text)[0, -1], net(text, until=3)[0, -1]
                assert torch.allclose(after_own[b, r, m, j], said.log_softmax(-1), atol=1e-10)
                assert torch.allclose(h_own[b, r, m, j], state, atol=1e-10)
                if j < chunk - 1:
                    token = sample_tokens(said, u[b, r, m * chunk + j])
                    assert token == y[b, r, m, j]
                    text = torch.cat((text, token.view(1, 1)), 1)
    assert torch.allclose(h_truth.flatten(1, 2), net(x, until=3), atol=1e-10)


def test_own_chunks_are_written_and_read_with_the_weights_that_are_lent(net, x):
    u, y = own_chunks(net, x, 4, 2)
    theta = by_name(net)
    lent = {n: torch.zeros_like(p) if n == "head.weight" else p for n, p in theta.items()}
    uniform = write_chunks(net, lent, x, 4, u)
    assert torch.equal(uniform, (u.view(2, 2, -1, 4)[..., :-1] * V).long())
    for said in say_chunks(net, lent, x, y)[:2]:
        assert torch.allclose(said, torch.full_like(said, -math.log(V)))
