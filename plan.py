"""
What steps will cost, before GPUs are rented, and how they grow; counted as count.py says.

    python bench.py --plan      # GPT-2's sizes on 1, 8 and 64 GPUs, and up to which model a script fits
    python bench.py --growth    # what a doubling of texts, batch, width, tokens, inner steps multiplies
"""
import time

import numpy as np

from count import Task, counts, settings
from steps import STAGES

# The machine: nodes of H100 SXM, as NVIDIA's data sheets of it and of the DGX H100 state them.
NODE = 8              # GPUs
ARITHMETIC = 989e12   # FLOP/s, bfloat16, dense
TRAFFIC = 3.35e12     # bytes/s from and to a GPU's memory
ROOM = 80e9           # bytes of that
NVLINK = 450e9        # bytes/s in each direction, a GPU, inside a node
NETWORK = 50e9        # bytes/s in each direction, a GPU, between nodes: a port of 400 Gbit/s each

GPT2 = dict(vocab=50257, block_size=1024, n_head=12, n_embd=768)
SIZES = ((12, 768), (24, 1024), (36, 1280), (48, 1600))  # blocks and width of GPT-2's four; heads of 64
ROWS, GPUS = 8, (1, 8, 64)  # texts a GPU and step; GPUs
# Blocks that are counted: each more adds what the third adds, to the peak at least that. Counted in full at
# 48 x 1600 it is 15 % higher for stage 1's meta step and 6 % for stage 3's frozen one in chunks of 4.
AT = (2, 3)
SMALL = dict(vocab=512, block_size=64, batch_size=4, n_layer=2, n_head=4, n_embd=64)
AXES = (("T, tokens of a text: attention is quadratic", "block_size", (64, 128, 256, 512, 1024, 2048)),
        ("texts a step: linear, but for weights and moments", "batch_size", (4, 8, 16)),
        ("width: weights are quadratic", "n_embd", (64, 128, 256)),
        ("V, tokens that there are: linear, but for what stage 3 weighs exactly, up to 4,096", "vocab",
         (512, 4096, 8192, 50257)),
        ("inner steps: linear after the first, whose graph is kept", "inner_steps", (1, 2, 4, 8)))
PATIENCE = 2.0  # seconds; a step that should take longer is not timed


# ---- --plan

def between(x, a, b):
    """{a: weight, b: weight}: the sum that tells at x what is linear from what is counted at a and b."""
    return {x: 1.0} if x in (a, b) else {a: (b - x) / (b - a), b: (x - a) / (b - a)}


def spread(task, blocks, inner):
    """[(weight, task)], in the sum the count of a task at so many blocks and, of a meta step, inner steps."""
    steps = between(inner, 2, 3) if inner > 1 else {1: 1.0}
    return [(u * v, task.at(n_layer=at, **({"inner_steps": k} if inner else {})))
            for at, u in between(blocks, *AT).items() for k, v in steps.items()]


def all_reduce(size, ranks):
    """Seconds of an average of `size` bytes: by rings inside a node, and of each GPU's part between nodes."""
    inside, nodes, ring = min(ranks, NODE), -(-ranks // NODE), lambda n: 2 * (n - 1) / n
    return size * ring(inside) / NVLINK + size / inside * ring(nodes) / NETWORK


def kinds_of(rows):
    """{name: (task, inner steps)} of the steps of GPT-2's size with so many texts a GPU."""
    at = lambda stage, step, inner=0, **values: (
        Task(*STAGES[stage], step).at(**GPT2, batch_size=rows, **values), inner)
    kinds = {f"stage {stage}, {step}": at(stage, step)
             for stage, step in ((1, "real"), (1, "meta"), (1, "frozen"), (2, "real"), (2, "frozen"),
                                 (3, "real"))}
    for chunk in (1, 4):
        kinds[f"stage 3, frozen, chunk {chunk}"] = at(3, "frozen", chunk=chunk)
        for S in (1, 15):  # as many texts judge as are learned from
            judged = dict(chunk=chunk, outer_batch=S * rows)
            kinds[f"stage 3, meta, chunk {chunk}, {S} inner"] = at(3, "meta", S, **judged)
    return kinds


def plan():
    """Prints what steps of GPT-2's size cost, what limits them, and up to which model they fit a GPU."""
    large, single, (blocks, width) = kinds_of(ROWS), kinds_of(1), SIZES[0]
    print(f"{blocks} blocks of {width}, {ROWS} x 1,024 of 50,257 tokens a GPU, bfloat16 autocast; "
          f"nodes of {NODE} GPUs,\n{ARITHMETIC / 1e12:.0f} TFLOP/s each, {TRAFFIC / 1e12} TB/s to memory, "
          f"{NVLINK / 1e9:.0f} GB/s inside a node, {NETWORK / 1e9:.0f} GB/s between nodes", flush=True)
    wanted = {name: spread(task, blocks, inner) for name, (task, inner) in large.items()}
    for name, (task, inner) in single.items():
        for depth, width in SIZES[:2 if inner > 1 else None]:  # further on 15 do not fit either
            wanted[name, depth] = spread(task.at(n_embd=width, n_head=width // 64), depth, inner)
    four = large["stage 3, meta, chunk 4, 15 inner"][0].at(n_layer=AT[0], inner_steps=4)
    whole = {f"{name}, {blocks} blocks": (large[name][0].at(n_layer=blocks), wanted[name])
             for name in ("stage 1, real", "stage 2, frozen", "stage 3, frozen, chunk 4")}
    whole[f"stage 3, meta, 4 inner, {AT[0]} blocks"] = four, spread(four, AT[0], 4)
    parts = [task for sum_ in wanted.values() for _, task in sum_]
    counted = counts(parts + [task for task, _ in whole.values()])
    total = lambda sum_: sum(weight * counted[task] for weight, task in sum_)
    found = {name: total(sum_) for name, sum_ in wanted.items()}
    print_cost({name: (max(1, 2 * inner), found[name]) for name, (_, inner) in large.items()})
    for name, (task, sum_) in whole.items():
        flops, moved, peak, averaged = 100 * np.abs(counted[task] / total(sum_) - 1)
        print(f"{name}: in full {max(flops, moved, averaged):.2f} % from this, peak {peak:.2f} %")
    print("\nthe pool of stage 3 is left out: it goes where there is room, and takes 48 bytes a weight\n"
          f"{'peak GB, 1 x 1,024 of text a GPU':<34}" + "".join(f"{f'{d} x {w}':>11}" for d, w in SIZES))
    for name in single:
        peaks = {(d, w): found[name, d][2] for d, w in SIZES if (name, d) in found}
        fits = [f"{d} x {w}" for (d, w), peak in peaks.items() if peak < ROOM]
        row = "".join(f"{peak / 1e9:11.1f}" for peak in peaks.values())
        print(f"{name:<34}{row:<44}  {'up to ' + fits[-1] if fits else 'none'}")


def print_cost(found):
    """Prints counts, {name: (real steps of as many tokens, count)}, and the least time they take."""
    print(f"\n{'a GPU and step':<34}{'TFLOP':>9}{'x real':>8}{'GB moved':>10}{'averaged':>10}{'peak':>8}")
    for name, (many, (flops, moved, peak, averaged)) in found.items():
        ratio = flops / found[name[:7] + ", real"][1][0] / many
        print(f"{name:<34}{flops / 1e12:9.2f}{ratio:8.2f}{moved / 1e9:10.1f}{averaged / 1e9:10.2f}"
              f"{peak / 1e9:8.1f}")
    print(f"x real: over the stage's real step on as many tokens; goals: frozen 2, meta 6\n\n"
          f"{'ms at least':<34}{'arithmetic':>11}{'memory':>9}{'network 8':>11}{'64':>7}"
          f"  tokens/s on 1, 8, 64 GPUs, at most; what limits it on 64")
    for name, (many, (flops, moved, _, averaged)) in found.items():
        own, network = (flops / ARITHMETIC, moved / TRAFFIC), [all_reduce(averaged, n) for n in GPUS]
        speeds = "".join(f"{n * many * ROWS * 1024 / (max(own) + t):12,.0f}" for n, t in zip(GPUS, network))
        limit = ("arithmetic", "memory", "network")[np.argmax((*own, network[-1]))]
        arithmetic, memory, near, far = (1e3 * t for t in (*own, *network[1:]))
        print(f"{name:<34}{arithmetic:11.1f}{memory:9.1f}{near:11.1f}{far:7.1f} {speeds}  {limit}")


# ---- --growth

def seconds(task):
    """The shortest time of a step, with numbers."""
    with settings(task):
        steps, times = task.build(lambda tensors: None), []
        next(iter(steps.values()))(), steps[task.step]()
        while not times or len(times) < 5 and sum(times) < PATIENCE:
            began = time.perf_counter()
            steps[task.step]()
            times.append(time.perf_counter() - began)
    return min(times)


def small(stage, step, **values):
    """The task of a small model; a meta step is judged by as many texts as it learns from."""
    task = Task(*STAGES[stage], step, half=False).at(**{**SMALL, **values})
    if step != "meta":
        return task
    at = dict(task.at(inner_steps=values.get("inner_steps", 1)).values)
    return task.at(**at, outer_batch=at["batch_size"] * at["inner_steps"])


def growth(quick):
    """Prints what each doubling of what the steps of a small model are made of multiplies."""
    end = -1 if quick else None
    tasks = {(setting, stage, step): [small(stage, step, **{setting: value}) for value in values[:end]]
             for _, setting, values in AXES
             for stage, step in ((1, "real"), (1, "frozen"), (2, "frozen"), (3, "frozen"), (3, "meta"))
             if step == "meta" or setting != "inner_steps"}
    counted = counts([task for row in tasks.values() for task in row])
    print(f"factor of each doubling, 2 where it is linear; from {SMALL}, chunks of 4, 1 inner step")
    for title, setting, values in AXES:
        print(f"\n{title}\n{setting:<42}" + "".join(f"{value:8,}" for value in values[:end]))
        for (of, stage, step), row in tasks.items():
            if of == setting:
                print_growth(f"stage {stage}, {step}", row, values, np.array([counted[task] for task in row]))


def print_growth(name, row, values, counted):
    """Prints how FLOPs, peak and time grow along a row of tasks; time as far as PATIENCE goes."""
    (flops, _, peak, _), timed = counted.T, [seconds(row[0])]
    for k in range(1, len(row)):
        if timed[-1] * flops[k] / flops[k - 1] > PATIENCE:
            break
        timed.append(seconds(row[k]))
    for what, unit, of in (("FLOPs", 1e9, flops), ("peak", 1e6, peak), ("time", 1e-3, np.array(timed))):
        factors = 2 ** (np.diff(np.log2(of)) / np.diff(np.log2(values[:len(of)])))
        first = f"{of[0] / unit:9.2f} {dict(FLOPs='GFLOP', peak='MB', time='ms')[what]}"
        print(f"  {name:<17}{what:<8}{first:<23}" + "".join(f"{f:8.2f}" for f in factors), flush=True)
        name = ""
