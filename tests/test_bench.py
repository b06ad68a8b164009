import pytest
import torch

import bench
import gist_bottleneck as gb
import meta_gist as mg
import self_ce
from equations import gradient


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """What the bench sets in the scripts is put back."""
    for name in ("chunk", "inner_length", "common"):
        monkeypatch.setattr(mg, name, getattr(mg, name))
    monkeypatch.setattr(mg, "inner_steps", 2)
    monkeypatch.setattr(mg, "outer_batch", 4)
    for script in (self_ce, gb, mg):
        monkeypatch.setattr(script, "batch_size", 2)


@pytest.mark.parametrize("steps", [bench.stage_1, bench.stage_2, bench.stage_3,
                                   lambda: bench.meta_parts(2, 2), lambda: bench.sizes(13, 2, 16, 8, 2, 2)])
def test_every_step_that_is_measured_can_be_taken(steps):
    for step in steps().values():
        step()


def test_graphs_that_are_kept_give_the_same_derivative(monkeypatch):
    """The baseline of the meta step is that of another way to the same thing."""
    found = []
    monkeypatch.setattr(bench, "gradient", lambda *a, **k: found.append(gradient(*a, **k)) or found[-1])
    steps = bench.meta_parts(2, 2)
    steps["graphs kept"]()
    dphi, *_ = steps["meta step"]()
    assert torch.allclose(found[-1]["E"], dphi["E"], rtol=1e-3, atol=1e-3 * dphi["E"].abs().max().item())


def test_a_stage_that_is_not_there_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.py", "4"])
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    assert stopped.value.code == 2 and "'4' is not one of 1, 2, 3, --quick" in capsys.readouterr().err
