"""Batches are pure functions of a seed and a step."""
import numpy as np
import pytest
import torch

from corpus import get_batch, val_windows


def test_the_ranks_together_read_the_same_batch_whatever_their_number():
    tokens = np.arange(10_000, dtype=np.uint16)
    whole = get_batch(tokens, 1, 7, 8, 33)
    assert whole.shape == (8, 33) and whole.dtype == torch.int64
    for ranks in (1, 2, 4):
        parts = [get_batch(tokens, 1, 7, 8, 33, rank, ranks) for rank in range(ranks)]
        assert torch.equal(torch.cat(parts), whole)


def test_a_batch_depends_on_seed_stream_and_step_alone():
    tokens = np.arange(10_000, dtype=np.uint16)
    first = {step: get_batch(tokens, 1, step, 8, 33) for step in range(5)}
    np.random.seed(0), torch.manual_seed(0)
    for step in (4, 3):  # a resumed run begins anywhere
        assert torch.equal(get_batch(tokens, 1, step, 8, 33), first[step])
    others = [get_batch(tokens, 2, 0, 8, 33), get_batch(tokens, 1, 0, 8, 33, stream=1)]
    assert len({tuple(batch[:, 0].tolist()) for batch in [first[0], first[1], *others]}) == 4


def test_windows_are_contiguous_and_reach_both_ends():
    tokens = np.arange(100, dtype=np.uint16)
    drawn = torch.cat([get_batch(tokens, 0, step, 64, 90) for step in range(10)])
    assert torch.equal(drawn - drawn[:, :1], torch.arange(90).expand(640, -1))
    assert set(drawn[:, 0].tolist()) == set(range(11))
    assert val_windows(tokens, 4, 10)[:, 0].tolist() == [0, 30, 60, 90]
    assert torch.equal(val_windows(tokens, 1, 100)[0], torch.arange(100))


def test_impossible_batches_are_value_errors():
    tokens = np.arange(100, dtype=np.uint16)
    for call in (lambda: get_batch(tokens, 0, 0, 8, 101), lambda: get_batch(tokens, 0, 0, 8, 10, 0, 3),
                 lambda: val_windows(tokens, 4, 101)):
        with pytest.raises(ValueError, match="must be"):
            call()
