"""What is drawn, and where."""
import json

import numpy as np
import pytest
from matplotlib.figure import Figure

import plot


def track(**changes):
    return dict(dict(gold_start=2.0, gold_best=1.5, gold_end=1.6, bpb_end=1.1, steps_to_hack=None, alarms=[],
                     rescues=[], recovered=None), **changes)


def write_run(folder, seed=1, arms=("real",), rate=0.1):
    """The folder of a finished run of 4 steps each phase, gold falling by .1 a step."""
    folder.mkdir(parents=True)
    summary = dict(stage="self_ce", config=dict(seed=seed, rate=rate, out_dir=str(folder)), meta_steps=4,
                   gold_meta_end=2.0, arms={arm: track(steps_to_hack=2) for arm in arms})
    rows = [dict(arm=arm, step=step, gold_nats=2 - step / 10 + seed, proxy=None if step == 0 else 1.0)
            for arm in ("meta", *arms) for step in range(5)]
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: saved.append(figure))
    return saved


def labels(axis):
    return {line.get_label(): line for line in axis.get_lines() if not line.get_label().startswith("_")}


def test_an_arm_without_a_colour_gets_one_of_its_own(tmp_path, figures):
    plot.draw_runs([write_run(tmp_path / "a", arms=("real", "ema", "new", "newer"))])
    left, right = (labels(axis) for axis in figures[0].axes)
    from matplotlib.colors import to_hex
    assert set(left) == {"meta", "real", "ema", "new", "newer"}
    assert len({to_hex(line.get_color()) for line in left.values()}) == 5
    assert [left[arm].get_color() for arm in left] == [right[arm].get_color() for arm in left]


def test_several_runs_are_drawn_beside_them_and_a_single_one_in_its_folder(tmp_path):
    a, b = write_run(tmp_path / "x" / "a"), write_run(tmp_path / "x" / "b" / "c", seed=2)
    path, _ = plot.draw_runs([a])
    assert path == a / "curves.png" and path.stat().st_size > 10_000
    path.write_bytes(b"the picture of a")
    assert plot.draw_runs([a, b])[0] == tmp_path / "x" / "curves.png"
    inside = write_run(a / "inside")
    assert plot.draw_runs([a, inside])[0] == tmp_path / "x" / "curves.png"
    assert (a / "curves.png").read_bytes() == b"the picture of a"


def test_runs_that_differ_by_seed_are_averaged_and_the_arms_of_any_of_them_shown(tmp_path, figures):
    folders = [write_run(tmp_path / "1", 1, ("real",)), write_run(tmp_path / "2", 2, ("real", "self")),
               write_run(tmp_path / "3", 1, ("real",), rate=0.5)]
    _, text = plot.draw_runs(folders)
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in text.splitlines()[2:]]
    assert rows == [["rate=0.1", "real", "2"], ["rate=0.1", "self", "1"], ["rate=0.5", "real", "1"]]
    first = labels(figures[0].axes[0])
    assert set(first) == {"meta", "real", "self"} and len(figures[0].axes) == 4
    assert np.allclose(first["real"].get_ydata(), [3.5 - s / 10 for s in range(5)])
    assert np.allclose(first["self"].get_ydata(), [4.0 - s / 10 for s in range(5)])
    assert plot.interval([1.0, 2.0])[1] == pytest.approx(12.71 * 0.5) and plot.interval([1.0])[1] == 0


def test_a_report_shows_its_arm_after_the_meta_phase_and_leaves_out_what_has_no_value(tmp_path, figures):
    row = dict(arm="self", step=5, gold_nats=2.0, surprise=1.9, proxy=0.1, agreement=None,
               agreement_probe=None, output_entropy=1.0, target_entropy=None)
    rows = [dict(row, arm="meta", step=step) for step in range(9)]
    rows += [dict(row, arm="real", agreement=0.5), row, dict(row, step=10, agreement=0.5)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    plot.draw_report(tmp_path, row, tmp_path / "001.png")
    drawn = [labels(axis) for axis in figures[0].axes]
    assert [set(axis) for axis in drawn] == [{"gold_nats", "surprise", "proxy"}, {"output_entropy"}]
    assert all(line.get_marker() == "." for axis in drawn for line in axis.values())
    assert drawn[0]["gold_nats"].get_xdata().tolist() == [-4, -3, -2, -1, 0, 5]  # as many as there are, or 5


def test_a_row_that_a_kill_cut_short_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert plot.read_rows(tmp_path) == [{"step": 1}, {"step": 2}]


def test_help_is_printed_where_no_run_is_named_and_what_is_no_run_is_refused(tmp_path, monkeypatch, capsys):
    for arguments, code in (([], 2), (["--help"], 0), (["out", "-h"], 0)):
        monkeypatch.setattr("sys.argv", ["plot.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            plot.main()
        assert stop.value.code == code and "python plot.py out/self_ce" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        plot.draw_runs([tmp_path])
    assert stop.value.code == 2 and "is no finished run" in capsys.readouterr().err
