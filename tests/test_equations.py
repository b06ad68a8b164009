"""The shared mathematics against autograd and by its properties, in float64."""
import pytest
import torch

from conftest import small_gpt
from equations import add, by_name, dot, follow, inner_step, praise, pull_back


def some(seed, scale=1.0):
    """A dict of tensors, as weights and gradients are."""
    generator = torch.Generator().manual_seed(seed)
    shapes = dict(a=(3, 4), b=(5,))
    return {n: scale * torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def flat(a):
    return torch.cat([t.flatten() for t in a.values()])


def test_an_inner_step_goes_down_the_gradient_by_the_stated_length():
    theta, g = some(0), some(1, scale=1e-3)
    step = flat(inner_step(theta, g, 0.05)) - flat(theta)
    assert step.norm().item() == pytest.approx(0.05, rel=1e-12)
    assert torch.allclose(step / step.norm(), -flat(g) / flat(g).norm())
    still = inner_step(theta, some(1, scale=0.0), 0.05)
    assert torch.equal(flat(still), flat(theta))


def test_pull_back_is_the_derivative_through_the_normalised_step():
    """d/dg of ⟨λ, θ − a g/‖g‖⟩, which is linear in λ."""
    g, lam = some(1), some(2)
    leaves = {n: t.clone().requires_grad_() for n, t in g.items()}
    outer = dot(lam, inner_step(some(0), leaves, 0.3))
    expected = dict(zip(g, torch.autograd.grad(outer, list(leaves.values()))))
    w, = pull_back(lambda g: inner_step(some(0), g, 0.3), lam, g)
    length = dot(g, g).sqrt()
    by_hand = {n: -0.3 / length * (lam[n] - g[n] * dot(g, lam) / length ** 2) for n in g}
    assert torch.allclose(flat(w), flat(expected), atol=1e-14)
    assert torch.allclose(flat(w), flat(by_hand), atol=1e-14)  # as the docstring of equations.py has it
    assert abs(dot(w, g)) < 1e-14  # the length of g does not matter


def test_dot_and_add_are_those_of_the_flat_vectors():
    a, b = some(3), some(4)
    assert torch.allclose(dot(a, b), flat(a) @ flat(b))
    assert torch.allclose(flat(add(a, b, -2.0)), flat(a) - 2 * flat(b))


@pytest.mark.parametrize("per_place", [False, True])
def test_praise_has_mean_zero_over_what_the_learner_says_for_any_kernel(per_place):
    torch.manual_seed(0)
    K = torch.randn((2, 3, 7, 7) if per_place else (7, 7), dtype=torch.float64)  # not symmetric
    p = torch.randn(2, 3, 7, dtype=torch.float64).softmax(-1)
    of_every_truth = K.expand(2, 3, 7, 7)  # row x: K(x, ·)
    a = torch.stack([praise(of_every_truth[..., x, :], p, K) for x in range(7)], -2)
    assert a.abs().max() > 0.1
    assert (p[..., None] * a).sum(-2).abs().max() < 1e-14


def test_praise_by_the_identity_is_one_hot_less_what_is_said():
    p = torch.tensor([0.2, 0.3, 0.5])
    assert torch.allclose(praise(torch.eye(3)[1], p, torch.eye(3)), torch.tensor([-0.2, 0.7, -0.5]))


def test_the_moving_average_keeps_its_share_and_with_none_kept_is_the_learner():
    learner, critic = small_gpt(), small_gpt()
    with torch.no_grad():
        for p in critic.parameters():
            p += 1.0
    follow(critic, learner, 0.75)
    apart = add(by_name(critic), by_name(learner), -1)
    assert all(torch.allclose(t, torch.full_like(t, 0.75)) for t in apart.values())
    follow(critic, learner, 0.0)
    assert all(torch.equal(t, by_name(learner)[n]) for n, t in by_name(critic).items())
    assert not any(t.requires_grad for t in by_name(learner).values())
