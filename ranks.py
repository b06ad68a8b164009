"""
How the ranks of a run come together, and how one that refuses tells the others, on other nodes too.
"""
import atexit
import datetime
import os
import time

import torch.distributed as dist

from configurator import refuse

ASK = 0.2  # seconds between two looks at who is there


def store_of(seconds):
    """What the ranks of this attempt share: torchrun's store outlives an attempt, and names dead ranks."""
    store, *_ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=seconds)))
    return dist.PrefixStore("attempt " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)


def tell_refusal():
    """Tells those that wait in `meet` that this rank will not come."""
    try:
        store_of(5).set("refused", "")
    except Exception:  # nobody is there to be told; each kind of store has its own errors
        pass


def watch_refusals():
    """From here on the end of this process, until `meet`, is told to the other ranks, if there are any."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        atexit.register(tell_refusal)


def meet(rank, ranks, backend):
    """Waits, in no collective, until all ranks have passed their checks: one may prepare data for hours."""
    store = store_of(1800)
    store.set_timeout(datetime.timedelta(seconds=60))  # once there, it answers at once or is gone
    store.add("here", 1)
    while store.add("here", 0) < ranks:
        if store.check(["refused"]):
            refuse("another rank refused or died; what its node printed says why")
        time.sleep(ASK)
    atexit.unregister(tell_refusal)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
