"""What steps cost, against counts by hand, and what is made of it."""
import numpy as np
import pytest
import torch

import count
import meta_gist as mg
import plan
import self_ce
from count import Fakes, Memory, Task
from model import GPT, GPTConfig, rollout
from steps import STAGES

TINY = dict(vocab=11, block_size=8, batch_size=3, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture(autouse=True)
def common(monkeypatch):
    monkeypatch.setattr(mg, "common", mg.common)


def small(stage, step, **values):
    return Task(*STAGES[stage], step, half=False).at(**{**TINY, **values})


def test_memory_is_what_lives_and_what_autograd_keeps_is_alive():
    with Fakes(), Memory() as memory:
        x = torch.randn(1000, requires_grad=True)
        y = x.exp()
        half = y.view(2, 500)[0]
        assert memory.live == 8000
        loss = y.square().sum()
        del y, half
        assert memory.live == 12000 - 4000 + 4  # the square is gone; exp and square keep y
        loss.backward()
        del loss
        assert memory.live == 8000 and memory.peak >= 16000  # x and its gradient


def test_bytes_moved_are_those_read_and_written_once_and_views_move_none():
    with Fakes(), Memory() as memory:
        x, y, one = torch.empty(1000), torch.empty(1000), torch.empty(1)
        for move, size in ((lambda: x + y, 12000), (lambda: x.view(10, 100).T, 0), (lambda: x.add_(y), 12000),
                           (lambda: torch._foreach_mul_([x, y], 2.0), 16000),
                           (lambda: one.expand(1000) + y, 8004)):
            memory.begin()
            move()
            assert memory.moved == size


def test_a_real_step_is_counted_as_by_hand():
    V, T, B, L, _, C = TINY.values()
    flops, _, peak, averaged = count.count(small(1, "real"))
    assert flops == 6 * B * T * (12 * C * C * L + C * V) + 14 * B * T * T * C * L  # products; attention
    size = 4 * sum(p.numel() for p in GPT(GPTConfig(V, 1, L, 2, C)).parameters())
    assert averaged == size and peak > 5 * size  # weights and gradients, two moments, the critic


def test_no_step_asks_for_a_number_and_more_inner_steps_cost_as_much_each():
    """A fake has none: what waits for the device would fail here. Above EXACT tokens stage 3 draws."""
    assert all(count.count(small(*step))[0] > 0 for step in ((1, "meta"), (1, "frozen"), (2, "frozen")))
    task = small(3, "meta", vocab=mg.EXACT + 3, chunk=4, batch_size=1, outer_batch=1, n_layer=1)
    assert count.count(task._replace(step="frozen"))[3] > 0
    one, two, three = (count.count(task.at(inner_steps=k))[[0, 3]] for k in (1, 2, 3))
    assert np.allclose(three, 2 * two - one)


def test_rollouts_hold_no_copy_of_the_past_for_each_place():
    B, T, C = 2, 256, 16
    with Fakes(), Memory() as memory:
        model, x = GPT(GPTConfig(11, 1, 1, 2, C)), torch.randint(11, (B, T))
        starts = torch.arange(1, T + 1, 4).repeat(2)
        memory.begin()
        rollout(model, x, starts, 3, torch.rand(B, len(starts), 3))
        assert memory.peak < 4 * B * len(starts) * T * C


def test_settings_are_put_back():
    before = self_ce.block_size
    with pytest.raises(KeyError), count.settings(small(1, "real", block_size=before + 1)):
        assert self_ce.block_size == before + 1
        raise KeyError
    assert self_ce.block_size == before


def test_an_all_reduce_goes_round_the_node_and_its_parts_between_nodes():
    assert plan.all_reduce(8e9, 1) == 0
    inside = 2 * 7 / 8 * 8e9 / plan.NVLINK
    assert plan.all_reduce(8e9, 8) == pytest.approx(inside)
    assert plan.all_reduce(8e9, 64) == pytest.approx(inside + 2 * 7 / 8 * 1e9 / plan.NETWORK)


def test_the_plan_finds_what_is_linear_in_blocks_and_inner_steps(monkeypatch, capsys):
    def counted(task):
        at = dict(task.values)
        cost = at["n_layer"] * (2 * at.get("outer_batch", 0.5) if task.step == "meta" else 1)
        return np.array([1e12, 1e6, at["n_embd"] * 1e4, 1e6]) * cost * at["batch_size"]

    monkeypatch.setattr(plan, "counts", lambda tasks: {task: counted(task) for task in tasks})
    plan.plan()
    out = capsys.readouterr().out
    assert out.count("in full 0.00 % from this, peak 0.00 %") == 4
    row = next(line for line in out.splitlines() if line.startswith("stage 1, frozen"))
    assert row.split()[3:] == ["96.00", "1.00", "0.1", "0.10", "0.7"]
    assert "48 x 1600" in next(line for line in out.splitlines()[::-1] if line.startswith("stage 1, real"))


def test_growth_shows_two_for_what_doubles(monkeypatch, capsys):
    monkeypatch.setattr(plan, "AXES", (("texts", "batch_size", (1, 2)),))
    texts = lambda task: dict(task.values)["batch_size"]
    monkeypatch.setattr(plan, "counts", lambda tasks: {task: np.full(4, texts(task)) for task in tasks})
    monkeypatch.setattr(plan, "seconds", lambda task: 0.001 * texts(task) ** 2)
    plan.growth(quick=False)
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[-1] for row in rows[4:7]] == ["2.00", "2.00", "4.00"]
    assert len(rows) == 4 + 3 * 5
