"""
How long the steps of each stage take, side by side in one run, beside the stage's step on real tokens.

    python bench.py                 # about three minutes on two cores
    python bench.py 3 --quick       # one stage alone, in fewer rounds

The real step is cross entropy on text: forward, backward, clip, AdamW. Beside stage 1's stands one of the
same sizes built of torch.nn.TransformerEncoder, so that the numbers of another machine can be read. The meta
steps of stage 3 are ratios to their first-order parts, the gradients of the inner steps and of the outer
loss, in time and, where Linux counts it, in peak memory.
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
from configurator import refuse
from equations import by_name
from gists import Space, layout
from model import GPT, GPTConfig, adamw
from phases import Phases
from watch import Watch

STATUS = Path("/proc/self/status")  # Linux alone has it


class Alone:
    """What the steps of a script ask of its Phases and of its Run, on one rank."""
    rank, ranks, arm, average = 0, 1, "frozen", staticmethod(lambda tensors: None)
    chance, take_step, judge = Phases.chance, Phases.take_step, lambda self: self.parts["critic"]

    def __init__(self, script, **parts):
        self.run, self.parts, self.tally, self.device = self, parts, {}, torch.device("cpu")
        self.settings = {k: getattr(script, k) for k in ("seed", "batch_size", "grad_clip")}


class Library(nn.Module):
    """A GPT of stage 1's sizes T, V, C from torch.nn: learned positions, LayerNorm, gelu."""
    def __init__(self, T, V, C):
        super().__init__()
        layer = nn.TransformerEncoderLayer(C, self_ce.n_head, 4 * C, 0.0, "gelu", batch_first=True,
                                           norm_first=True, bias=False)
        self.token, self.place = nn.Embedding(V, C), nn.Embedding(T, C)
        self.blocks = nn.TransformerEncoder(layer, self_ce.n_layer, enable_nested_tensor=False)
        self.head = nn.Linear(C, V, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(T))

    def forward(self, x):
        x = self.token(x) + self.place.weight
        return self.head(self.blocks(x, mask=self.mask, is_causal=True))


def learner_of(script, n_special=1):
    """(a GPT of a script's sizes, its optimizer)."""
    model = GPT(GPTConfig(script.vocab, n_special, script.n_layer, script.n_head, script.n_embd))
    return model, adamw(model, 1e-4)


def text_of(script, rows=None):
    """Random tokens, int [rows, T + 1]."""
    return torch.randint(script.vocab, (rows or script.batch_size, script.block_size + 1))


def stage_1():
    """{name: step}, the plain step first."""
    text, phases, (learner, optimizer) = text_of(self_ce), Alone(self_ce), learner_of(self_ce)
    critic, library = GPT(learner.config), Library(self_ce.block_size, self_ce.vocab, self_ce.n_embd)
    other = torch.optim.AdamW(library.parameters(), 1e-4, fused=True)
    watch, values = Watch(), np.random.default_rng(0).random((500, 3))
    watch.calibrate(values, text[:, 1:].numel(), 0.9, 256)

    def plain(model, optimizer, **options):
        logits = model(text[:, :-1], **options)
        F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).backward()
        phases.take_step(model, optimizer)

    def meta(adversary=None, second=False):
        vars(self_ce).update(adversarial=0.3 if adversary else 0.0, adversary=adversary or "random")
        loss, own = self_ce.meta_loss(phases, learner, text, 0, {})
        loss.backward()
        if second:
            dphi, _ = self_ce.second_order(learner, learner, text, own, text, phases.average)
            for name, p in learner.named_parameters():
                p.grad += dphi[name]
        phases.take_step(learner, optimizer)

    def self_step(arm, keep_meta=0.0):
        loss = self_ce.self_loss(arm, learner, critic, text, text[:, 1:], {})
        if keep_meta:
            loss = loss + keep_meta * self_ce.practice(phases, learner, 0)
        loss.backward()
        phases.take_step(learner, optimizer)

    @torch.no_grad()
    def watching():
        """The watch's share of ten steps: ten values of each stream, and one reading of the probe."""
        self_ce.critic_logits(critic, text[:4, 1:], text[:4, 1:]).argmax(-1)
        watch.update(10, torch.from_numpy(values[:10]), 0.9)

    return {"plain step": lambda: plain(learner, optimizer),
            "plain step, explicit attention": lambda: plain(learner, optimizer, fused=False),
            "torch.nn.TransformerEncoder": lambda: plain(library, other),
            "meta step": meta, "meta step, order=2": lambda: meta(second=True),
            "meta step, adversary random": lambda: meta("random"),
            "meta step, adversary flips": lambda: meta("flips"),
            "self step, real": lambda: self_step("real"), "self step, frozen": lambda: self_step("frozen"),
            "self step, keep_meta": lambda: self_step("self", 0.1),
            "the watch, each ten steps": watching}


def stage_2():
    """{name: step}, the step of the real arm first."""
    lay = layout(gb.block_size, gb.chunk, gb.n_gist, gb.vocab, "cpu")
    text, phases, (learner, optimizer) = text_of(gb), Alone(gb), learner_of(gb, gb.n_gist + 1)
    critic = GPT(learner.config).requires_grad_(False)
    gist = Space("gist", whiten=torch.randn(gb.n_gist * gb.n_embd, 16))
    random = Space("random", whiten=torch.eye(16), table=torch.randn(gb.vocab, 16))

    def step(loss):
        loss.backward()
        phases.take_step(learner, optimizer)

    def frozen(space):
        step(gb.self_loss(phases, "frozen", learner, critic, space, lay, text, 0, {}))

    return {"self step, real": lambda: step(gb.real_loss(learner, lay, text, "gist", {})),
            "self step, frozen": lambda: frozen(gist), "self step, random": lambda: frozen(random)}


def critic_3():
    return nn.ParameterDict(dict({s: torch.ones(()) for s in mg.SCALARS}, E=torch.randn(mg.vocab, mg.n_embd)))


def stage_3():
    """{name: step}, the step of the real arm first."""
    text, (learner, optimizer) = text_of(mg), learner_of(mg)
    phases = Alone(mg, learner=learner, optimizer=optimizer, critic=critic_3())

    def frozen(chunk):
        mg.chunk = chunk
        mg.signal_step(phases, "frozen", text, 0)

    return {"self step, real": lambda: mg.real_step(phases, text),
            "self step, frozen, chunk 1": lambda: frozen(1), "self step, frozen, chunk 4": lambda: frozen(4)}


def meta_parts(steps, rows):
    """{name: call}: the gradients of `steps` inner steps and the outer one, and a whole meta step of stage 3.

    rows: texts of an inner step; four times as many judge.
    """
    mg.chunk = 1
    (learner, _), critic = learner_of(mg), critic_3()
    theta, phi, average = by_name(learner), by_name(critic), Alone.average
    texts, outer = [text_of(mg, rows) for _ in range(steps)], text_of(mg, 4 * rows)
    chances = [torch.rand(rows, 1, mg.block_size) for _ in texts]

    def first_order():
        for text, u in zip(texts, chances):
            mg.inner_gradient(learner, theta, phi, text, text[:, 1:], u, average)
        mg.real_gradient(learner, theta, outer)

    return {"first order": first_order,
            "meta step": lambda: mg.meta_step(learner, theta, phi, texts, chances, outer, average)}


def measure(title, steps, tokens, rounds, repeats=3):
    """Prints, of each step, the median time and the median over rounds of its ratio to the first one's."""
    times = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(repeats):
                step()
            if round_:  # the first round warms up
                times[name].append((time.perf_counter() - began) / repeats)
    print(title)
    base = np.array(next(iter(times.values())))
    for name, seconds in times.items():
        ratio, ms = np.median(np.array(seconds) / base), 1e3 * np.median(seconds)
        print(f"  {name:<32} {ms:7.1f} ms {1e3 * tokens / ms:10,.0f} tokens/s {ratio:7.2f} x", flush=True)


def kilobytes(name):
    """VmRSS or VmHWM, memory of this process now and at its highest, as Linux counts it."""
    return int(re.search(rf"{name}:\s+(\d+)", STATUS.read_text())[1])


def peak(steps, name, answer):
    """Puts the megabytes that one call adds at its highest, in a fresh process, into the queue `answer`."""
    torch.manual_seed(0)
    meta_parts(1, 1)[name]()  # what is loaded and set up once
    call = meta_parts(steps, 64)[name]
    Path("/proc/self/clear_refs").write_text("5")  # the highest begins anew
    before = kilobytes("VmRSS")
    call()
    answer.put((kilobytes("VmHWM") - before) / 1024)


def memory(counts):
    """Prints the peak memory of meta steps of 64 texts beside that of their first-order parts."""
    if not STATUS.exists():
        return print("peak memory is counted on Linux alone")
    processes = multiprocessing.get_context("spawn")
    for steps in counts:
        found = {}
        for name in meta_parts(1, 1):
            answer = processes.Queue()
            process = processes.Process(target=peak, args=(steps, name, answer))
            process.start()
            found[name] = answer.get(timeout=300)
            process.join()
            print(f"  {f'{name}, {steps} steps: peak':<32} {found[name]:7.0f} MB "
                  f"{found[name] / found['first order']:7.2f} x", flush=True)


def main():
    words = set(sys.argv[1:])
    if words & {"-h", "--help"}:
        return print(__doc__.strip())
    for word in words - {"1", "2", "3", "--quick"}:
        refuse(f"{word!r} is not one of 1, 2, 3, --quick (see --help)")
    stages, rounds = words - {"--quick"} or {"1", "2", "3"}, 3 if "--quick" in words else 7
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; medians of {rounds} rounds")
    sizes = lambda script: (f"{script.__name__}.py: {script.batch_size} x {script.block_size} tokens, "
                            f"{script.vocab} ids, width {script.n_embd}")
    if "1" in stages:
        measure(sizes(self_ce), stage_1(), self_ce.batch_size * self_ce.block_size, rounds)
    if "2" in stages:
        measure(sizes(gb), stage_2(), gb.batch_size * gb.block_size, rounds)
    if "3" in stages:
        tokens = mg.batch_size * mg.block_size
        measure(sizes(mg), stage_3(), tokens, rounds)
        for steps in (1, 4, 8):
            measure(f"{sizes(mg)}, {steps} steps", meta_parts(steps, mg.batch_size), steps * tokens, rounds)
        memory((1, 4, 8))


if __name__ == "__main__":
    main()
