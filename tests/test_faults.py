"""A part of faults.py: nothing is lost, and nothing is answered badly."""
import numpy as np
import pytest

import faults


@pytest.mark.parametrize("kind, tries", [
    ("kills", 1), ("damage", 300), ("wrong uses", 25), ("no compiler", 1),
    ("bfloat16", 8)])
def test_what_goes_wrong_loses_nothing_and_is_answered_in_two_lines(tmp_path, kind, tries):
    tally = faults.Tally()
    faults.KINDS[kind][0](tally, tmp_path, np.random.default_rng(0), tries)
    assert tally.tried and not tally.notes, tally.notes
