"""
The mathematics around the stages, each piece once: praise, the moving average, the optimizer's step as a
function, the inner step and the way back through both. θ (theta) is the learner, φ (phi) the critic; weights
and gradients are dicts by name.

How should the critic have moved the learner's step, so that other text had gained from it? With

    L(θ, φ)                                the signal's loss           g = ∇_θ L
    θ′ = θ − length · g/‖g‖                the inner step
    O(θ′)                                  the outer loss              λ = ∇O(θ′)

the derivative of O(θ′) by φ is that of ⟨∇_θ L(θ, φ), w⟩, where

    w = −(length/‖g‖)(λ − g ⟨g, λ⟩/‖g‖²)     λ pulled back through the normalisation

or through whatever step is taken, see `pull_back`. Over several steps λ itself is pulled back, through the
step to its θ (and moments), and λ += ∂_θ ⟨∇_θ L, w⟩. Exact in data parallel: g, λ and mixed products are
linear in what each rank sees, so g is averaged before the step and λ before the pull-back; N ranks then find
what one finds with the whole batch. The mean of second orders that each rank computed alone is another thing.
"""
import torch
from torch.func import functional_call, vjp


def by_name(module):
    """The weights of a module, detached."""
    return {n: p.detach() for n, p in module.named_parameters()}


def leaves(weights):
    """Weights by name, to be derived by: detached, they require a gradient."""
    return {n: p.detach().requires_grad_() for n, p in weights.items()}


def gradient(value, weights, along=None, graph=False):
    """{n: ∂⟨along, value⟩/∂w_n} by leaves; along: held fixed, None where value is one number.

    graph: what is found can be derived again, also through `along`. Zero by weights that value does not know.
    """
    wrt, options = list(weights.values()), dict(create_graph=graph, materialize_grads=True)
    return dict(zip(weights, torch.autograd.grad(value, wrt, along, **options)))


def add_up(total, g, share):
    """total + share · g by name, in the memory of total; share · g where total is empty. No graph is kept."""
    return {n: total[n].add_(t.detach(), alpha=share) if total else t.detach() * share for n, t in g.items()}


def log_softmax(logits):
    """Log probabilities, in float32 or better whatever the logits are: they are summed and compared."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def bound(module, weights):
    """The module as a function that has other weights."""
    return lambda *inputs, **options: functional_call(module, weights, inputs, options)


def dot(a, b):
    """⟨a, b⟩."""
    return sum((a[n] * b[n]).sum() for n in a)


def add(a, b, scale=1.0):
    """a + scale · b."""
    return {n: a[n] + scale * b[n] for n in a}


def inner_step(theta, g, length):
    """θ′ = θ − length · g/‖g‖; g averaged over ranks by now. Where g is zero no step is taken."""
    return add(theta, g, -length / dot(g, g).clamp_min(1e-36).sqrt())


def moments_of(optimizer, module):
    """(m, v) of AdamW, each by the names of the module's weights."""
    named = list(module.named_parameters())
    return tuple({n: optimizer.state[p][key] for n, p in named} for key in ("exp_avg", "exp_avg_sq"))


def adamw_step(theta, moments, g, rate, count, grad_clip):
    """(θ, moments) after step number `count` of model.adamw, as a function; moments: (m, v) by name.

    AdamW (arXiv 1711.05101) with g clipped to the norm grad_clip, and decay on all but the embeddings.
    """
    clip = (grad_clip / (dot(g, g).clamp_min(1e-36).sqrt() + 1e-6)).clamp(max=1.0)
    m = {n: 0.9 * moments[0][n] + 0.1 * clip * g[n] for n in g}
    v = {n: 0.95 * moments[1][n] + 0.05 * (clip * g[n]).square() for n in g}
    size = {n: (v[n] / (1 - 0.95 ** count)).clamp_min(1e-30).sqrt() + 1e-8 for n in g}
    kept = {n: theta[n] * (1 - rate * (0.0 if n == "embed.weight" else 0.1)) for n in g}
    return {n: kept[n] - rate / (1 - 0.9 ** count) * m[n] / size[n] for n in g}, (m, v)


@torch.no_grad()
def pull_back(step, lam, *at):
    """λ, of what step(*at) gives, as λ of each of `at`: λ times the derivative of the step."""
    return vjp(step, *at)[1](lam)


def praise(of_truth, p, kernel):
    """a(v) = K(x, v) − Σ_v′ p_v′ K(v′, v): what the critic makes of token v having observed x, less what it
    would make of it had it observed the learner's own words; [..., V]. Its mean over x ~ p is zero.

    of_truth: K(x, ·), [..., V]. p: the learner's distribution [..., V]. kernel: K, [V, V] or [..., V, V]. Or of M
    tokens alone, p [..., M] and kernel [M, V].
    """
    return of_truth - (p.unsqueeze(-2) @ kernel).squeeze(-2)


@torch.no_grad()
def follow(critic, learner, decay):
    """The moving average: critic ← decay · critic + (1 − decay) · learner."""
    torch._foreach_lerp_(list(critic.parameters()), list(learner.parameters()), 1 - decay)
