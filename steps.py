"""
The steps of the three scripts without a run around them: to be timed (bench.py) and counted (count.py).
"""
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

import gist_bottleneck as gb
import meta_gist as mg
import self_ce
from gists import Space, layout
from model import GPT, GPTConfig, adamw
from phases import Phases


class Alone:
    """What the steps of a script ask of its Phases and of its Run, on one rank, with text that is random.

    average: of a list of tensors over ranks, in place.
    """
    corpus = snapshot = None
    take_step, judge = Phases.take_step, lambda self: self.parts["critic"]
    mean = lambda self, value: 0.0  # a fake has no value

    def __init__(self, script, average, **parts):
        self.run, self.settings, self.average, self.parts, self.tally = self, vars(script), average, parts, {}

    def chance(self, step, shape, stream, rows=None):
        return torch.rand(rows or self.settings["batch_size"], *shape)

    def text(self, step, stream=0, rows=None, split="train"):
        s = self.settings
        return torch.randint(s["vocab"], (rows or s["batch_size"], s["block_size"] + 1))

    def take_snapshot(self):
        """What the arms start from, held as long as they run."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        self.snapshot = self.snapshot or copy.deepcopy(state)


def learner_of(script, n_special=1):
    """(a GPT of a script's sizes, its optimizer)."""
    model = GPT(GPTConfig(script.vocab, n_special, script.n_layer, script.n_head, script.n_embd))
    return model, adamw(model, 1e-4)


alone = lambda tensors: None  # the average over one rank


def plain(phases, model, optimizer, text):
    """A training step: forward, backward, clip, AdamW."""
    logits = model(text[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).backward()
    phases.take_step(model, optimizer)


def stage_1(average=alone):
    """{name: step}, the plain step first."""
    learner, optimizer = learner_of(self_ce)
    critic = GPT(learner.config)
    phases = Alone(self_ce, average, learner=learner, critic=critic, optimizer=optimizer)

    def meta(second=False):
        text = phases.text(0)
        loss, own = self_ce.meta_loss(phases, learner, text, 0, {})
        loss.backward()
        if second:
            dphi, _ = self_ce.second_order(learner, learner, text, own, phases.text(0), average)
            for name, p in learner.named_parameters():
                p.grad += dphi[name]
        phases.take_step(learner, optimizer)

    def frozen():
        phases.take_snapshot()
        text = phases.text(0)
        self_ce.self_loss("frozen", learner, critic, text, text[:, 1:], {}).backward()
        phases.take_step(learner, optimizer)

    return {"real": lambda: plain(phases, learner, optimizer, phases.text(0)), "meta": meta,
            "meta, order=2": lambda: meta(second=True), "frozen": frozen}


def stage_2(average=alone):
    """{name: step}, the step of the real arm first."""
    lay = layout(gb.block_size, gb.chunk, gb.n_gist, gb.vocab, "cpu")
    learner, optimizer = learner_of(gb, gb.n_gist + 1)
    critic = GPT(learner.config).requires_grad_(False)
    phases = Alone(gb, average, learner=learner, critic=critic, optimizer=optimizer)
    gist = Space("gist", whiten=torch.randn(gb.n_gist * gb.n_embd, 16))
    random = Space("random", whiten=torch.eye(16), table=torch.randn(gb.vocab, 16))

    def step(loss):
        loss.backward()
        phases.take_step(learner, optimizer)

    def signal(space):
        phases.take_snapshot()
        step(gb.self_loss(phases, "frozen", learner, critic, space, lay, phases.text(0), 0, {}))

    return {"real": lambda: step(gb.real_loss(learner, lay, phases.text(0), "gist", {})),
            "frozen": lambda: signal(gist), "random": lambda: signal(random)}


def critic_3():
    return nn.ParameterDict(dict({s: torch.ones(()) for s in mg.SCALARS}, E=torch.randn(mg.vocab, mg.n_embd)))


class Shelf:
    """What a pool.Pool does, with learners that are the pretrained one and take no memory here: a run has
    them in the host's where the device has no room."""

    def take(self, turn, parts, mover):
        for name, part in mover.items():
            part.load_state_dict(parts[name].state_dict())
        return dict(age=0)

    def give_back(self, *result):
        pass


def stage_3(average=alone):
    """{name: step}, the step of the real arm first."""
    (learner, optimizer), (other, its), critic = learner_of(mg), learner_of(mg), critic_3()
    phases = Alone(mg, average, learner=learner, critic=critic, optimizer=optimizer)
    held = dict(phases.parts, critic_optimizer=torch.optim.Adam(critic.parameters()), pool=Shelf())
    meta = Alone(mg, average, **held)
    mg.common = torch.arange(mg.EXACT) if mg.vocab > mg.EXACT else slice(None)

    def frozen():
        phases.take_snapshot()
        mg.signal_step(phases, "frozen", phases.text(0), 0)

    return {"real": lambda: mg.real_step(phases, phases.text(0)), "frozen": frozen,
            "meta": lambda: mg.critic_step(meta, 0, dict(learner=other, optimizer=its))}


STAGES = {1: ("self_ce", stage_1), 2: ("gist_bottleneck", stage_2), 3: ("meta_gist", stage_3)}
