"""
How long the steps of each stage take, side by side in one run, beside the stage's step on real tokens.

    python bench.py                 # about three minutes on two cores
    python bench.py 3 --quick       # one stage alone, in fewer rounds
    python bench.py --plan          # counted, not timed: GPT-2's sizes on 1, 8 and 64 GPUs; see plan.py
    python bench.py --growth        # how steps grow; --quick leaves the largest sizes out

The real step is cross entropy on text: forward, backward, clip, AdamW. At five sizes it stands beside one of
GPT-2's form built of torch.nn, so that the numbers of another machine can be read. A meta step of stage 3 is
a ratio to a step of the arm frozen, and in parts to the same derivative by autograd through the whole unroll,
in time and in peak memory, which is counted.
"""
import functools
import sys
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import gist_bottleneck as gb
import meta_gist as mg
import self_ce
from configurator import refuse
from count import Task, count
from equations import by_name, gradient, inner_step, leaves
from gists import say_chunks
from model import GPT, GPTConfig, adamw
from plan import growth, plan
from steps import Alone, alone, critic_3, learner_of, plain, stage_1, stage_2, stage_3

SIZES = ((512, 2, 128, 64, 4, 8), (256, 3, 96, 128, 4, 8), (512, 2, 64, 32, 4, 16), (512, 4, 256, 256, 4, 4),
         (8192, 6, 384, 256, 6, 2))  # V, L, C, T, H, B


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
        for table in (self.token, self.place):  # wider, the tied head says what no float32 softmax can hold
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, x):
        x = self.token(x) + self.place.weight
        for block in self.blocks:
            qkv = block["qkv"](block["norm_1"](x)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2)
            y = F.scaled_dot_product_attention(*qkv.chunk(3, 1), is_causal=True)
            x = x + block["out"](y.transpose(1, 2).flatten(2))
            x = x + block["down"](F.gelu(block["up"](block["norm_2"](x))))
        return self.norm(x) @ self.token.weight.T


def sizes(V, L, C, T, H, B):
    """{name: step}: the baseline's plain step, and ours at the same sizes."""
    text, theirs, ours = torch.randint(V, (B, T + 1)), Baseline(V, L, C, T, H), GPT(GPTConfig(V, 1, L, H, C))
    optimizer, mine = torch.optim.AdamW(theirs.parameters(), 1e-4, fused=True), adamw(ours, 1e-4)
    step = functools.partial(plain, Alone(self_ce, alone))
    return {"the baseline": lambda: step(theirs, optimizer, text), "ours": lambda: step(ours, mine, text)}


def meta_parts(steps, rows):
    """{name: call}: a meta step of stage 3 with every graph kept, and as it is. rows: texts of an inner step;
    four times as many judge.
    """
    mg.chunk, mg.inner_length, mg.outer_batch = 1, 0.05, 4 * mg.batch_size
    (learner, _), critic, phases = learner_of(mg), critic_3(), Alone(mg, alone)
    theta, phi = by_name(learner), by_name(critic)
    texts, outer = [phases.text(k, rows=rows) for k in range(steps)], phases.text(0, rows=4 * rows)
    chances = [mg.chance(phases, k, rows=rows) for k in range(steps)]
    y = torch.zeros(rows, 1, mg.block_size, 0, dtype=torch.long)

    def kept():
        """The same derivative by autograd through the whole unroll, every graph kept, as torchopt has it."""
        known, moved = leaves(phi), leaves(theta)
        for text in texts:
            said = say_chunks(learner, moved, text[:, :-1], y, fused=False)
            a = mg.signal(known, text[:, 1:], said)
            g = gradient(said.logp, moved, -a * mg.vocab / a.numel(), graph=True)
            moved = inner_step(moved, g, mg.inner_length)
        gradient(mg.real_loss(learner, moved, outer)[0], known)

    return {"graphs kept": kept,
            "meta step": lambda: mg.meta_step(learner, theta, phi, texts, chances, outer, alone)}


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


def memory(counts):
    """Prints the peak memory of meta steps of 64 texts beside that with every graph kept."""
    for steps in counts:
        task = Task("meta_gist", lambda average: meta_parts(steps, 64), "", half=False)
        found = {name: count(task._replace(step=name))[2] / 1e6 for name in ("graphs kept", "meta step")}
        for name, peak in found.items():
            ratio = peak / found["graphs kept"]
            print(f"  {f'{name}, {steps} steps: peak':<32} {peak:7.0f} MB {ratio:7.2f} x", flush=True)


def main():
    words = set(sys.argv[1:])
    if words & {"-h", "--help"}:
        return print(__doc__.strip())
    for word in words - {"1", "2", "3", "--quick", "--plan", "--growth"}:
        refuse(f"{word!r} is not one of 1, 2, 3, --quick, --plan, --growth (see --help)")
    if "--plan" in words:
        return plan()
    if "--growth" in words:
        return growth("--quick" in words)
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
        tokens, steps = mg.batch_size * mg.block_size, stage_3()
        meta = {"frozen": steps["frozen"], "meta": steps.pop("meta")}
        measure(f"{title(mg)}, chunk {mg.chunk}", steps, tokens, rounds)
        measure(f"the meta step, {mg.inner_steps} inner steps by AdamW, judged by {mg.outer_batch} texts",
                meta, tokens, rounds, repeats=1)
        mg.chunk = 1
        measure(f"{title(mg)}, chunk 1", steps, tokens, rounds)
        for steps in (1, 4, 8):
            measure(f"{title(mg)}, {steps} steps", meta_parts(steps, mg.batch_size), steps * tokens, rounds)
        memory((1, 4, 8))


if __name__ == "__main__":
    main()
