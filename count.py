"""
What a step costs, counted from the scripts' own functions with nothing computed: FLOPs, bytes, memory.

Tensors are fakes, with a shape and no numbers. FLOPs are PyTorch's count of matrix products and attention.
Each operation reads what it is given and writes what it makes once, as eager PyTorch does: what torch.compile
fuses moves less. The peak is that of all storages alive, weights, moments and snapshot among them, without
what an allocator loses between them.
"""
import contextlib
import importlib
import multiprocessing
import warnings
import weakref
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
FUSED = {aten._scaled_dot_product_flash_attention_for_cpu:  # PyTorch counts those of CUDA alone
         lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
         aten._scaled_dot_product_flash_attention_for_cpu_backward:
         lambda dy, q, k, v, *_, **__: sdpa_backward_flop_count(dy, q, k, v)}


class Fakes(FakeTensorMode):
    __deepcopy__ = lambda self, memo: self  # what is copied stays in this mode


def tensors_in(values):
    """The tensors among values, and in lists of them."""
    found = []
    for value in values if isinstance(values, (list, tuple)) else [values]:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found


class Memory(TorchDispatchMode):
    """Bytes of the storages alive, their peak, and what operations read and write."""

    def __init__(self):
        super().__init__()
        self.sizes, self.live, self.peak, self.moved = {}, 0, 0, 0

    def begin(self):
        self.peak, self.moved = self.live, 0

    def keep(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self.sizes[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.free, key)

    def free(self, key):
        self.live -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, kwargs, schema = func(*args, **(kwargs or {})), kwargs or {}, func._schema
        read, place = tensors_in((*args, *kwargs.values())), lambda t: t.untyped_storage()._cdata
        known = {place(t) for t in read}
        written = [t for t in tensors_in(out) if place(t) not in known]  # not views
        for t in written:
            if place(t) not in self.sizes:
                self.keep(t.untyped_storage())
        if schema.is_mutable:
            given = {**dict(zip((a.name for a in schema.arguments), args)), **kwargs}
            written += tensors_in([given.get(a.name) for a in schema.arguments
                                   if a.alias_info and a.alias_info.is_write])
        if written:
            self.moved += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in (*read, *written))
        return out


class Task(NamedTuple):
    """A step of a script at certain settings. build: from `average` to {name: step}, the real one first."""
    script: str
    build: object
    step: str
    values: tuple = ()  # of (setting, value)
    half: bool = True  # bfloat16 autocast

    def at(self, **values):
        return self._replace(values=tuple({**dict(self.values), **values}.items()))


@contextlib.contextmanager
def settings(task):
    """The script's globals as the task wants them, for a while."""
    script = vars(importlib.import_module(task.script))
    before = {name: script[name] for name, _ in task.values}
    script.update(task.values)
    try:
        yield
    finally:
        script.update(before)


def count(task):
    """float [4] of a step that is not the first: FLOPs, bytes moved, the peak, bytes averaged over ranks."""
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # a copy asks if it has one
    averaged, autocast = [], lambda: torch.autocast("cpu", torch.bfloat16, enabled=task.half)
    with settings(task), Fakes(), Memory() as memory:
        steps = task.build(lambda tensors: averaged.extend(t.nbytes for t in tensors))
        for step in (next(iter(steps.values())), steps[task.step]):
            averaged.clear()
            memory.begin()
            with autocast(), FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
                step()
        return np.array([counter.get_total_flops(), memory.moved, memory.peak, sum(averaged)], float)


def counts(tasks):
    """{task: count}, in as many processes as there are cores."""
    tasks = list(dict.fromkeys(tasks))
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        return dict(zip(tasks, pool.map(count, tasks)))
