"""
How long the steps of each stage take, side by side in one run, beside the stage's step on real tokens.

    python bench.py                 # about three minutes on two cores
    python bench.py 3 --quick       # one stage alone, in fewer rounds

The real step is cross entropy on text: forward, backward, clip, AdamW. At five sizes it stands beside one of
GPT-2's form built of torch.nn, so that the numbers of another machine can be read. The meta steps of stage 3
are ratios to the same derivative by autograd through the whole unroll, in time and, where Linux counts it,
in peak memory.
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
from equations import by_name, gradient, inner_step, leaves
from gists import Space, layout, say_chunks
from model import GPT, GPTConfig, adamw
from phases import Phases

SIZES = ((512, 2, 128, 64, 4, 8), (256, 3, 96, 128, 4, 8), (512, 2, 64, 32, 4, 16), (512, 4, 256, 256, 4, 4),
         (8192, 6, 384, 256, 6, 2))  # V, L, C, T, H, B
STATUS = Path("/proc/self/status")  # Linux alone has it


class Alone:
    """What the steps of a script ask of its Phases and of its Run, on one rank."""
    rank, ranks, arm, average = 0, 1, "frozen", staticmethod(lambda tensors: None)
    chance, share, take_step = Phases.chance, Phases.share, Phases.take_step
    judge, piece = lambda self: self.parts["critic"], None

    def __init__(self, script, **parts):
        self.run, self.parts, self.tally, self.device = self, parts, {}, torch.device("cpu")
        self.settings = {k: getattr(script, k) for k in ("seed", "batch_size", "grad_clip", "grad_accum")}


class Baseline(nn.Module):
    """GPT-2's form of sizes V, L, C, T, H from torch.nn, as nanoGPT has it: learned positions, LayerNorm,
    GELU, and the embedding for a head."""
    def __init__(self, V, L, C, T, H):
        super().__init__()
        linear, norm = lambda m, n: nn.Linear(m, n, bias=False), lambda: nn.LayerNorm(C, bias=False)
        self.token, self.place, self.norm, self.heads = nn.Embedding(V, C), nn.Embedding(T, C), norm(), H
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(
            norm_1=norm(), qkv=linear(C, 3 * C), out=linear(C, C), norm_2=norm(), up=linear(C, 4 * C),
            down=linear(4 * C, C))) for _ in range(L))

    def forward(self, x):
        x = self.token(x) + self.place.weight
        for block in self.blocks:
            qkv = block["qkv"](block["norm_1"](x)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2)
            y = F.scaled_dot_product_attention(*qkv.chunk(3, 1), is_causal=True)
            x = x + block["out"](y.transpose(1, 2).flatten(2))
            x = x + block["down"](F.gelu(block["up"](block["norm_2"](x))))
        return self.norm(x) @ self.token.weight.T


def learner_of(script, n_special=1):
    """(a GPT of a script's sizes, its optimizer)."""
    model = GPT(GPTConfig(script.vocab, n_special, script.n_layer, script.n_head, script.n_embd))
    return model, adamw(model, 1e-4)


text_of = lambda s, rows=None: torch.randint(s.vocab, (rows or s.batch_size, s.block_size + 1))


def plain(model, optimizer, text):
    """A training step: forward, backward, clip, AdamW."""
    logits = model(text[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).backward()
    Alone(self_ce).take_step(model, optimizer)


def sizes(V, L, C, T, H, B):
    """{name: step}: the baseline's plain step, and ours at the same sizes."""
    text, theirs, ours = torch.randint(V, (B, T + 1)), Baseline(V, L, C, T, H), GPT(GPTConfig(V, 1, L, H, C))
    optimizer, mine = torch.optim.AdamW(theirs.parameters(), 1e-4, fused=True), adamw(ours, 1e-4)
    return {"the baseline": lambda: plain(theirs, optimizer, text), "ours": lambda: plain(ours, mine, text)}


def stage_1():
    """{name: step}, the plain step first."""
    text, phases, (learner, optimizer) = text_of(self_ce), Alone(self_ce), learner_of(self_ce)
    critic = GPT(learner.config)

    def meta(second=False):
        loss, own = self_ce.meta_loss(phases, learner, text, 0, {})
        loss.backward()
        if second:
            dphi, _ = self_ce.second_order(learner, learner, text, own, text, phases.average)
            for name, p in learner.named_parameters():
                p.grad += dphi[name]
        phases.take_step(learner, optimizer)

    def frozen():
        self_ce.self_loss("frozen", learner, critic, text, text[:, 1:], {}).backward()
        phases.take_step(learner, optimizer)

    return {"plain step": lambda: plain(learner, optimizer, text), "self step, frozen": frozen,
            "meta step": meta, "meta step, order=2": lambda: meta(second=True)}


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

    of = lambda space: gb.self_loss(phases, "frozen", learner, critic, space, lay, text, 0, {})
    return {"self step, real": lambda: step(gb.real_loss(learner, lay, text, "gist", {})),
            "self step, frozen": lambda: step(of(gist)), "self step, random": lambda: step(of(random))}


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
    """{name: call}: a meta step of stage 3 with every graph kept, and as it is. rows: texts of an inner step;
    four times as many judge.
    """
    mg.chunk, mg.inner_length = 1, 0.05
    (learner, _), critic = learner_of(mg), critic_3()
    theta, phi, average = by_name(learner), by_name(critic), Alone.average
    texts, outer = [text_of(mg, rows) for _ in range(steps)], text_of(mg, 4 * rows)
    chances = [torch.rand(rows, 1, mg.block_size) for _ in texts]

    def kept():
        """The same derivative by autograd through the whole unroll, every graph kept, as torchopt has it."""
        known, moved = leaves(phi), leaves(theta)
        for text in texts:
            said = say_chunks(learner, moved, text[:, :-1], y, fused=False)
            a = mg.signal(known, text[:, 1:], said)
            g = gradient(said.logp, moved, -a * mg.vocab / a.numel(), graph=True)
            moved = inner_step(moved, g, mg.inner_length)
        gradient(mg.real_loss(learner, moved, outer)[0], known)
    y = torch.zeros(rows, 1, mg.block_size, 0, dtype=torch.long)

    return {"graphs kept": kept,
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
    """Prints the peak memory of meta steps of 64 texts beside that with every graph kept."""
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
                  f"{found[name] / found['graphs kept']:7.2f} x", flush=True)


def main():
    words = set(sys.argv[1:])
    if words & {"-h", "--help"}:
        return print(__doc__.strip())
    for word in words - {"1", "2", "3", "--quick"}:
        refuse(f"{word!r} is not one of 1, 2, 3, --quick (see --help)")
    stages, rounds = words - {"--quick"} or {"1", "2", "3"}, 3 if "--quick" in words else 7
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; medians of {rounds} rounds")
    title = lambda script: (f"{script.__name__}.py: {script.batch_size} x {script.block_size} tokens, "
                            f"{script.vocab} ids, width {script.n_embd}")
    if "1" in stages:
        for V, L, C, T, H, B in SIZES:
            measure(f"{B} x {T} tokens, {V} ids, {L} blocks of {C}", sizes(V, L, C, T, H, B), B * T, rounds)
        measure(title(self_ce), stage_1(), self_ce.batch_size * self_ce.block_size, rounds)
    if "2" in stages:
        measure(title(gb), stage_2(), gb.batch_size * gb.block_size, rounds)
    if "3" in stages:
        tokens = mg.batch_size * mg.block_size
        measure(title(mg), stage_3(), tokens, rounds)
        for steps in (1, 4, 8):
            measure(f"{title(mg)}, {steps} steps", meta_parts(steps, mg.batch_size), steps * tokens, rounds)
        memory((1, 4, 8))


if __name__ == "__main__":
    main()
