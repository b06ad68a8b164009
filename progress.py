"""
How fast a run goes, and what the terminal shows of it: lines, and below them one that is written over.
"""
import sys
import time
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

# Dense bfloat16 arithmetic of GPUs, FLOPs a second, by NVIDIA's data sheets: what `mfu` is a share of.
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
HEAD = f"{'arm':>12}  {'step':>13}  {'loss':>7}  {'gold':>7}  {'bits/byte':>9}  {'tokens/s':>9}  {'left':>6}"


class Progress:
    """The progress of one rank: device, whether it is the first, which alone shows it."""

    def __init__(self, device, first):
        self.device, self.first, self.line, self.shown_at, self.arm = device, first, 0, 0.0, None
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak, self.flops = next((peak for key, peak in PEAK.items() if key in name), None), 0

    def say(self, text):
        """Prints a line below the one that is written over, if there is one."""
        if self.first:
            print("\n" * (self.line > 0) + text, flush=True)
            self.line = 0

    def start(self, step):
        """Begins a phase at `step`: what is left is told from here."""
        self.begun, self.at, self.row_at = step, time.time(), time.time()

    def step_time(self, step):
        """Seconds a step of this phase, at least a thousandth; 1 before it is known."""
        return max(1e-3, (time.time() - self.at) / (step - self.begun)) if step > self.begun else 1.0

    @contextmanager
    def counted(self, first):
        """Counts the FLOPs of this rank's step if it is the first after an evaluation and `mfu` asks."""
        if not (first and self.peak):
            yield
            return
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            yield
        self.flops = counter.get_total_flops()

    def speed(self, steps, tokens):
        """How fast so many steps went since the last call, of `tokens` on all ranks each, with evaluations.

        {"tok_per_s", "mfu": the arithmetic of this rank as a share of the peak of its GPU, "peak_gb": the
        most memory that this process held, GB}; None where it cannot be told.
        """
        spent, self.row_at = max(time.time() - self.row_at, 1e-9), time.time()
        mfu = self.flops * steps / spent / self.peak if self.peak and self.flops else None
        return dict(tok_per_s=steps * tokens / spent, mfu=mfu, peak_gb=self.memory())

    def memory(self):
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        try:
            import resource  # Linux and Mac have it
        except ImportError:
            return None
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

    def show(self, row, steps):
        """A row of the log: on a terminal written over until the arm ends, elsewhere a line now and then."""
        step, spent = row["step"], time.time() - self.at
        minutes, seconds = divmod(int(spent * (steps - step) / max(1, step - self.begun)), 60)
        loss = "-" if row["proxy"] is None else f"{row['proxy']:.3f}"
        text = (f"{row['arm']:>12}  {f'{step}/{steps}':>13}  {loss:>7}  {row['gold_nats']:>7.3f}  "
                f"{row['gold_bpb']:>9.3f}  {row['tok_per_s']:>9,.0f}  {f'{minutes}:{seconds:02d}':>6}")
        if self.arm is None:
            self.say(HEAD)
        if self.arm != row["arm"] and self.line:  # the last line of each arm stays
            self.say("")
        over, self.arm = self.first and sys.stdout.isatty(), row["arm"]
        if over:
            print("\r" + text, end="", flush=True)
            self.line = len(text)
        elif self.first and (step in (0, steps) or time.time() - self.shown_at > 5):
            print(text, flush=True)
            self.shown_at = time.time()
