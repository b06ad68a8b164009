"""
How long the steps of each stage take, side by side in one run: a row is a ratio to the stage's step on real tokens.

    python bench.py                 # about three minutes on two cores
    python bench.py 3               # one stage alone

The real step is cross entropy on text: forward, backward, clip, AdamW. Beside stage 1's stands one of the same sizes
built of torch.nn.TransformerEncoder, so that the numbers of another machine can be read. Stage 3's meta steps are
ratios to their first-order parts, the gradients of the inner steps and of the outer loss, in time and in peak memory.
"""
import multiprocessing
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import gist_bottleneck as gb
import meta_gist as mg
import self_ce
from model import GPT, GPTConfig, adamw
from watch import Watch

ROUNDS, STEPS = 7, 3
B, T, V, C = self_ce.batch_size, self_ce.block_size, self_ce.vocab, self_ce.n_embd


class Alone:
    """What the steps of a script ask of a run, on one rank."""
    rank, ranks, device, weight_dtype = 0, 1, torch.device("cpu"), torch.float32

    def average(self, tensors):
        pass


class Library(nn.Module):
    """A GPT of the same sizes from torch.nn: learned positions, LayerNorm, gelu."""
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(C, self_ce.n_head, 4 * C, 0.0, "gelu", batch_first=True, norm_first=True,
                                           bias=False)
        self.token, self.place = nn.Embedding(V, C), nn.Embedding(T, C)
        self.blocks = nn.TransformerEncoder(layer, self_ce.n_layer, enable_nested_tensor=False)
        self.head = nn.Linear(C, V, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(T))

    def forward(self, x):
        return self.head(self.blocks(self.token(x) + self.place.weight, mask=self.mask, is_causal=True))


def stage_1():
    """{name: step}, the plain step first."""
    run, w = Alone(), torch.randint(0, V, (B, T + 1))
    x, obs = w[:, :-1], w[:, 1:]
    gpt, library = GPT(GPTConfig(V, 1, self_ce.n_layer, self_ce.n_head, C)), Library()
    critic = GPT(gpt.config)
    snapshot = {n: p.detach().clone() for n, p in gpt.named_parameters()}
    optimizer, other = adamw(gpt, 1e-4), torch.optim.AdamW(library.parameters(), 1e-4, fused=True)
    watch, values = Watch(), np.random.default_rng(0).random((500, 3))
    watch.calibrate(values, B * T, 0.9, 256)

    def plain(model, optimizer, **options):
        loss = F.cross_entropy(model(x, **options).flatten(0, 1), obs.flatten())
        self_ce.take_step(run, model, optimizer, loss)

    def meta(second):
        loss, own = self_ce.meta_loss(run, gpt, gpt, w, 0, {})
        extra = None
        if second:
            dphi, _ = self_ce.second_order(gpt, gpt, x, obs, own, w, run.average)
            extra = list(zip(gpt.parameters(), dphi.values()))
        self_ce.take_step(run, gpt, optimizer, loss, None, extra)

    def in_self_phase(arm):
        loss, _ = self_ce.self_loss(run, arm, gpt, [critic], w, obs, 0, {})
        self_ce.take_step(run, gpt, optimizer, loss)

    def with_lever(**levers):
        """A self step of the frozen arm with levers of the self phase."""
        before = {k: getattr(self_ce, k) for k in levers}
        vars(self_ce).update(levers)
        loss, logits = self_ce.self_loss(run, "frozen", gpt, [critic], w, obs, 0, {})
        if self_ce.keep_meta:
            own, seen = self_ce.kept_pairs(run, None, gpt, None, 0)
            loss = loss + self_ce.keep_meta * self_ce.imitation(self_ce.critic_logits(gpt, own, seen), seen)
        if self_ce.anchor:
            loss = loss + self_ce.anchor * self_ce.leash(gpt, snapshot, x, logits)
        old = [p.detach().clone() for p in gpt.parameters()] if self_ce.trust else None
        self_ce.take_step(run, gpt, optimizer, loss)
        if old:
            self_ce.hold_back(run, gpt, old, x, logits)
        vars(self_ce).update(before)

    def adversarial(kind):
        before = self_ce.adversarial, self_ce.adversary
        self_ce.adversarial, self_ce.adversary = 0.3, kind
        meta(False)
        self_ce.adversarial, self_ce.adversary = before

    def watching():
        """The watch's share of ten steps: ten values of each stream, and one reading of the probe."""
        with torch.no_grad():
            self_ce.critic_logits(critic, obs[:4], obs[:4]).argmax(-1)
        watch.update(10, torch.from_numpy(values[:10]), 0.9)

    return {"plain step": lambda: plain(gpt, optimizer),
            "plain step, explicit attention": lambda: plain(gpt, optimizer, fused=False),
            "torch.nn.TransformerEncoder": lambda: plain(library, other),
            "meta step": lambda: meta(False), "meta step, order=2": lambda: meta(True),
            "meta step, adversary random": lambda: adversarial("random"),
            "meta step, adversary flips": lambda: adversarial("flips"),
            "self step, real": lambda: in_self_phase("real"), "self step, frozen": lambda: in_self_phase("frozen"),
            "self step, keep_meta random": lambda: with_lever(keep_meta=0.1),
            "self step, anchor": lambda: with_lever(anchor=0.3), "self step, trust": lambda: with_lever(trust=0.001),
            "the watch, each ten steps": watching}


def stage_2():
    """{name: step}, the step of the real arm first."""
    run, lay = Alone(), gb.layout(gb.block_size, "cpu")
    w = torch.randint(0, gb.vocab, (gb.batch_size, gb.block_size + 1))
    learner = GPT(GPTConfig(gb.vocab, gb.n_gist + 1, gb.n_layer, gb.n_head, gb.n_embd))
    judge, optimizer = GPT(learner.config).requires_grad_(False), adamw(learner, 1e-4)
    contextual = gb.Critic(judge, None, torch.randn(gb.n_gist * gb.n_embd, 16))
    static = gb.Critic(None, torch.randn(gb.vocab, 16), torch.eye(16))

    def real():
        logits = gb.read(learner, lay, w[:, :-1])
        gb.take_step(run, learner, optimizer, F.cross_entropy(logits.flatten(0, 1), w[:, 1:].flatten()))

    def in_self_phase(critic):
        gb.take_step(run, learner, optimizer, gb.self_loss("frozen", 0, learner, critic, lay, w, None,
                                                           gb.chance(run, 0), {}))

    return {"self step, real": real, "self step, frozen": lambda: in_self_phase(contextual),
            "self step, static": lambda: in_self_phase(static)}


def meta_parts(steps, batch):
    """{name: call}: the first-order parts of a meta step of stage 3, `steps` inner gradients and the outer one; then the
    meta step by each mixed product."""
    learner, critic = mg.make_nets(Alone())
    theta, phi = mg.weights(learner), mg.weights(critic, mg.read_by(critic))
    text = lambda rows: torch.randint(0, mg.vocab, (rows, mg.block_size + 1))
    batches = [(w, w[:, 1:]) for w in (text(batch) for _ in range(steps))]
    outer, average = text(4 * batch), Alone().average

    def first_order():
        for b in batches:
            mg.inner_gradient((learner, critic), theta, phi, b, None, average)
        torch.func.grad(lambda th: mg.cross_entropy(learner, th, outer))(theta)

    def second_order(mixed):
        mg.mixed = mixed
        mg.meta_step((learner, critic), theta, phi, batches, [None] * steps, outer, average)
    return {"first order": first_order, **{f"meta step, {m}": lambda m=m: second_order(m)
                                           for m in ("difference", "forward", "graph")}}


def kilobytes(name):
    """VmRSS or VmHWM, memory of this process now and at its highest, as Linux counts it."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def peak(steps, name, answer):
    """Puts the megabytes that one call adds at its highest, in a fresh process, into the queue `answer`."""
    torch.manual_seed(0)
    meta_parts(1, 1)[name]()  # what is loaded and set up once
    call = meta_parts(steps, 64)[name]
    Path("/proc/self/clear_refs").write_text("5")  # the highest begins anew
    before = kilobytes("VmRSS")
    call()
    answer.put((kilobytes("VmHWM") - before) / 1024)


def memory():
    processes = multiprocessing.get_context("spawn")
    for steps in (1, 4, 8):
        found = {}
        for name in meta_parts(1, 1):
            answer = processes.Queue()
            process = processes.Process(target=peak, args=(steps, name, answer))
            process.start()
            found[name] = answer.get(timeout=300)
            process.join()
            print(f"  {f'{name}, {steps} steps: peak memory':<44} {found[name]:7.0f} MB "
                  f"{found[name] / found['first order']:7.2f} x")


def measure(title, steps, tokens):
    times = {name: [] for name in steps}
    for round_ in range(ROUNDS + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(STEPS):
                step()
            if round_:  # the first round warms up
                times[name].append((time.perf_counter() - began) / STEPS)
    base = np.array(next(iter(times.values())))
    print(title)
    for name, seconds in times.items():
        ratio = np.median(np.array(seconds) / base)
        ms = 1e3 * np.median(seconds)
        print(f"  {name:<32} {ms:7.1f} ms {1e3 * tokens / ms:10,.0f} tokens/s {ratio:7.2f} x")


def main():
    stages = sys.argv[1:] or ["1", "2", "3"]
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; medians of {ROUNDS} rounds")
    if "1" in stages:
        measure(f"self_ce.py: {B} x {T} tokens, {V} ids, width {C}", stage_1(), B * T)
    if "2" in stages:
        measure(f"gist_bottleneck.py: {gb.batch_size} x {gb.block_size} tokens, {gb.vocab} ids, width {gb.n_embd}",
                stage_2(), gb.batch_size * gb.block_size)
    if "3" in stages:
        for steps in (1, 4, 8):
            measure(f"meta_gist.py: {mg.batch_size} x {mg.block_size} tokens, {mg.vocab} ids, width {mg.n_embd}, "
                    f"{steps} inner steps", meta_parts(steps, mg.batch_size), steps * mg.batch_size * mg.block_size)
        memory()


if __name__ == "__main__":
    main()
