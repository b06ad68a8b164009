"""
How long the steps take, side by side in one run: each row is a ratio to the plain training step, in rounds.

    python bench.py                 # under a minute on two cores

The plain step is cross entropy on text: forward, backward, clip, AdamW. Beside it stands the same sizes built of
torch.nn.TransformerEncoder, so that the numbers of another machine can be read.
"""
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import self_ce
from model import GPT, GPTConfig, adamw
from watch import Watch

ROUNDS, STEPS = 7, 10
B, T, V, C = self_ce.batch_size, self_ce.block_size, self_ce.vocab, self_ce.n_embd


class Alone:
    """What the steps of a script ask of a run, on one rank."""
    rank, ranks, device = 0, 1, torch.device("cpu")

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


def main():
    torch.manual_seed(0)
    run, w = Alone(), torch.randint(0, V, (B, T + 1))
    x, obs = w[:, :-1], w[:, 1:]
    gpt, library = GPT(GPTConfig(V, 1, self_ce.n_layer, self_ce.n_head, C)), Library()
    critic = GPT(gpt.config)
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

    def watching():
        """The watch's share of ten steps: ten values of each stream, and one reading of the probe."""
        with torch.no_grad():
            self_ce.critic_logits(critic, obs[:4], obs[:4]).argmax(-1)
        watch.update(10, torch.from_numpy(values[:10]), 0.9)

    steps = {"plain step": lambda: plain(gpt, optimizer),
             "plain step, explicit attention": lambda: plain(gpt, optimizer, fused=False),
             "torch.nn.TransformerEncoder": lambda: plain(library, other),
             "meta step": lambda: meta(False), "meta step, order 2": lambda: meta(True),
             "self step, real": lambda: in_self_phase("real"), "self step, frozen": lambda: in_self_phase("frozen"),
             "the watch, each ten steps": watching}
    times = {name: [] for name in steps}
    for round_ in range(ROUNDS + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(STEPS):
                step()
            if round_:  # the first round warms up
                times[name].append((time.perf_counter() - began) / STEPS)
    base = np.array(times["plain step"])
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; {B} x {T} tokens, {V} ids, width {C}; "
          f"medians of {ROUNDS} rounds")
    for name, seconds in times.items():
        ratio = np.median(np.array(seconds) / base)
        ms = 1e3 * np.median(seconds)
        print(f"{name:<32} {ms:7.1f} ms {1e3 * B * T / ms:10,.0f} tokens/s {ratio:7.2f} x")


if __name__ == "__main__":
    main()
