"""What the command line may and may not say, and what a run may and may not write."""
import json
from types import SimpleNamespace

import pytest
import torch

import configurator
from configurator import Run, override, read_checkpoint

SCRIPT = '''"""A script."""
# --- first group
steps = 10         # how many
rate = 1e-3        # how fast
# --- second group
flag = False       # whether
kind = "a"         # "a" | "b": which
path = ""          # where
Hidden = 3         # no setting: not lower case
bare = 4

def f():
    pass

later = 5          # no setting: below the first function
'''


@pytest.fixture
def scope(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    values = {}
    exec(SCRIPT, values)
    return dict(values, __file__=str(path))


def test_override_rules(scope):
    settings, given = override(scope, ["--steps=1e3", "--rate=1", "--flag=TRUE", "--kind=b", "--path=a=b --c.txt"])
    assert given == dict(steps=1000, rate=1.0, flag=True, kind="b", path="a=b --c.txt")
    assert type(scope["steps"]) is int and type(scope["rate"]) is float and scope["path"] == "a=b --c.txt"
    assert list(settings) == ["steps", "rate", "flag", "kind", "path"]
    assert override(scope, ["--flag", "--steps", "7"])[1] == dict(flag=True, steps=7)
    assert override(scope, ["--path=123"])[1] == dict(path="123")


@pytest.mark.parametrize("argument, message", [
    ("--stepz=3", "unknown setting 'stepz'; did you mean 'steps'?"),
    ("--Hidden=3", "unknown setting 'Hidden'"),
    ("--later=3", "unknown setting 'later'"),
    ("steps=3", "'steps=3' is not of the form --name=value"),
    ("--steps=1.5", "steps=1.5 must be a whole number, as 10"),
    ("--steps=-3", "steps=-3 must not be negative"),
    ("--steps=True", "steps=True must be a whole number"),
    ("--steps=__import__('os')", "must be a whole number"),
    ("--rate=fast", "rate=fast must be a number, as 0.001"),
    ("--rate=1e999", "rate=1e999 must be a number"),
    ("--flag=1", "flag=1 must be true or false"),
    ("--kind=c", "kind='c' is not one of \"a\", \"b\""),
    ("--steps", "steps needs a value: --steps=..."),
])
def test_what_does_not_fit_is_refused_in_one_line(scope, argument, message, capsys):
    before = dict(scope)
    with pytest.raises(SystemExit) as stop:
        override(scope, [argument])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1 and scope == before


def test_help_prints_each_setting_with_default_and_comment_in_groups(scope, capsys):
    with pytest.raises(SystemExit) as stop:
        override(scope, ["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and lines[0] == "A script."
    assert [line for line in lines if "group" in line] == ["first group", "second group"]
    assert '--kind=a' in "".join(lines) and '"a" | "b": which' in "".join(lines) and "Hidden" not in "".join(lines)


COMMON = dict(batch_size=4, eval_windows=4, device="cpu", dtype="float32", resume="", wandb_log="no", seed=1,
              save_interval=5, eval_interval=5, learning_rate=0.1)


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    monkeypatch.setattr(configurator.signal, "signal", lambda *a: None)
    (tmp_path / "script.py").write_text(SCRIPT)

    def make(**changes):
        settings = dict(COMMON, **dict(dict(out_dir=str(tmp_path / "run")), **changes))
        return Run("script", settings, dict(__file__=str(tmp_path / "script.py")))
    return make


def test_an_earlier_run_is_moved_aside_and_other_files_are_never_touched(make_run, tmp_path, capsys):
    for n in range(3):
        run = make_run()
        run.open(0)
        run.write_json("summary.json", n)
        run.close()
    held = {p.name: json.loads((p / "summary.json").read_text()) for p in tmp_path.glob("run*")}
    assert held == {"run": 2, "run-1": 0, "run-2": 1}
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(SystemExit):
        make_run().open(0)
    assert "holds files that are no run's" in capsys.readouterr().err
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit):
        make_run(out_dir=str(tmp_path / "file")).open(0)
    assert "cannot be written to" in capsys.readouterr().err and (tmp_path / "file").read_text() == "mine"


def test_two_runs_cannot_write_to_one_folder(make_run, capsys):
    first = make_run()
    first.open(0)
    with pytest.raises(SystemExit):
        make_run().open(0)
    assert "another run is writing to" in capsys.readouterr().err
    first.close()


def test_a_full_disk_is_told_before_anything_is_written(make_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(configurator.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(SystemExit) as stop:
        make_run().open(50 * 10**6)
    assert stop.value.code == 2 and "1 MB are free there and the run needs about 50 MB" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_write_that_fails_halfway_keeps_the_file_before_it(make_run, tmp_path, capsys):
    run = make_run()
    run.open(0)
    run.checkpoint(0, dict(arm="meta"), dict(x=torch.ones(1)))
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()

    def half(f):
        f.write(b"half")
        raise OSError(28, "No space left on device")
    with pytest.raises(SystemExit):
        run.write("ckpt.pt", half)
    assert "No space left on device" in capsys.readouterr().err
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob("*.tmp"))
    run.close()


def test_not_finite_stops_with_the_last_good_checkpoint_named(make_run, tmp_path, capsys):
    run = make_run()
    run.open(0)
    run.checkpoint(0, dict(arm="meta"), dict(x=torch.ones(1)))
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        run.checkpoint(5, dict(arm="meta"), dict(loss=torch.tensor([1.0]), grad_norm=torch.tensor([float("nan")])))
    assert stop.value.code == 3 and "not finite" in capsys.readouterr().out
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before


@pytest.mark.parametrize("content, message", [
    (None, "holds no ckpt.pt"),
    (b"PK\x03\x04 half of a zip", "is damaged or half written"),
    (dict(weights=1), "is no checkpoint of this project"),
    (dict(format="metalearn-1", stage="meta_gist"), "is a checkpoint of meta_gist.py"),
])
def test_checkpoints_that_cannot_be_resumed_are_refused(tmp_path, content, message, capsys):
    (tmp_path / "old").mkdir()
    if isinstance(content, bytes):
        (tmp_path / "old" / "ckpt.pt").write_bytes(content)
    elif content:
        torch.save(content, tmp_path / "old" / "ckpt.pt")
    with pytest.raises(SystemExit) as stop:
        read_checkpoint(tmp_path / "old", "script")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_a_number_that_is_not_finite_is_never_logged(make_run, tmp_path, capsys):
    run = make_run()
    run.open(0)
    with pytest.raises(SystemExit) as stop:
        run.log(dict(arm="meta", step=3, proxy=1.0, gold_nats=float("nan")))
    assert stop.value.code == 3 and (tmp_path / "run" / "log.jsonl").read_text() == ""


def test_devices_that_are_not_there_are_refused(make_run, capsys):
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            make_run(device="cuda")
        assert "device='cuda' is not there on this machine, which has cpu" in capsys.readouterr().err
