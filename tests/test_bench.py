import pytest

import bench
import gist_bottleneck as gb
import meta_gist as mg
import self_ce


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """What the bench sets in the scripts is put back."""
    for script, names in ((self_ce, "adversarial adversary keep_meta"), (mg, "chunk")):
        for name in names.split():
            monkeypatch.setattr(script, name, getattr(script, name))
    for script in (self_ce, gb, mg):
        monkeypatch.setattr(script, "batch_size", 2)


@pytest.mark.parametrize("steps", [bench.stage_1, bench.stage_2, bench.stage_3,
                                   lambda: bench.meta_parts(2, 2)])
def test_every_step_that_is_measured_can_be_taken(steps):
    for step in steps().values():
        step()


def test_a_stage_that_is_not_there_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.py", "4"])
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    assert stopped.value.code == 2 and "'4' is not one of 1, 2, 3, --quick" in capsys.readouterr().err
