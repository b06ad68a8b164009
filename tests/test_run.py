"""What a run may and may not write, and what can be read of it."""
import json
import math
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import checkpoints
import run as run_module
from checkpoints import read_bottleneck, read_checkpoint, read_end, read_meta_phase
from run import open_run

SCRIPT = '''"""A script."""
arms = "real"        # the arms
self_steps = 10      # of each
n_embd = 8           # width → even
n_head = 2           # heads
batch_size = 4       # sequences
grad_accum = 1       # pieces
eval_windows = 4     # sequences
learning_rate = 0.1  # rate
seed = 1             # of data
eval_interval = 5    # steps
save_interval = 5    # steps
device = "cpu"       # device
dtype = "float32"    # type
out_dir = "out"      # folder
resume = ""          # folder
wandb_log = "no"     # "no" | "offline"
'''
AT = dict(arm="meta", meta=None, snapshot=None, arms={}, corpus="plays")


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """make(name=value, ...): the run that the script opens with these arguments, in tmp_path/run at first."""
    monkeypatch.setattr(run_module.signal, "signal", lambda *a: None)
    script = tmp_path / "code" / "script.py"
    script.parent.mkdir()
    script.write_text(SCRIPT, encoding="utf-8")

    def make(**given):
        if "resume" not in given:
            given = dict(out_dir=tmp_path / "run", **given) if "out_dir" not in given else given
        monkeypatch.setattr(sys, "argv", ["script.py", *(f"--{k}={v}" for k, v in given.items())])
        scope = dict(__file__=str(script))
        exec(SCRIPT, scope)
        return open_run(scope)
    return make


def is_refused(capsys, message, call, *arguments, **options):
    """Whether a call ends with exit code 2 and one line that holds the message."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(*arguments, **options)
    error = capsys.readouterr().err
    return stop.value.code == 2 and message in error and error.count("\n") == 1


# ---- the folder

def test_an_earlier_run_is_moved_aside_and_other_files_are_never_touched(make_run, tmp_path, capsys):
    for n in range(3):
        run = make_run()
        run.open(0)
        run.write_json("summary.json", n)
        run.close()
    held = {p.name: json.loads((p / "summary.json").read_text()) for p in tmp_path.glob("run*")}
    assert held == {"run": 2, "run-1": 0, "run-2": 1}
    (tmp_path / "run" / "config.json").unlink()
    assert is_refused(capsys, "holds files that are no run's", make_run().open, 0)
    (tmp_path / "file").write_text("mine")
    assert is_refused(capsys, "cannot be written to", make_run(out_dir=tmp_path / "file").open, 0)
    assert (tmp_path / "file").read_text() == "mine"


def test_two_runs_cannot_write_to_one_folder(make_run, capsys):
    first = make_run()
    first.open(0)
    assert is_refused(capsys, "another run is writing to", make_run().open, 0)
    first.close()
    make_run().open(0)


def test_a_run_keeps_the_script_and_the_modules_beside_it_that_it_imported(make_run, tmp_path, monkeypatch):
    code = tmp_path / "code"
    for name in ("imported_one", "other_one"):
        (code / f"{name}.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(code)
    __import__("imported_one")
    run = make_run()
    run.open(0)
    assert {p.name for p in (run.out_dir / "sources").iterdir()} == {"script.py", "imported_one.py"}
    assert (run.out_dir / "sources" / "script.py").read_text(encoding="utf-8") == SCRIPT
    del sys.modules["imported_one"]


def test_devices_that_are_not_there_are_refused(make_run, capsys):
    if not torch.cuda.is_available():
        assert is_refused(capsys, "device='cuda' is not there on this machine, which has cpu",
                          run_module.choose_device, "cuda", "float32", 0)
    assert run_module.choose_device("cpu", "float64", 0) == (torch.device("cpu"), "asked for")


# ---- a full disk

def test_a_full_disk_is_told_before_anything_is_written(make_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    message = "1 MB are free there and the run needs about 50 MB"
    assert is_refused(capsys, message, make_run().open, 50 * 10**6)
    assert not (tmp_path / "run").exists()


def test_a_write_that_fails_halfway_keeps_the_file_before_it(make_run, tmp_path, monkeypatch, capsys):
    run = make_run()
    run.open(0)
    run.checkpoint(0, dict(AT), dict(x=torch.ones(1)), {})
    run.writer.wait()
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()

    def half(f):
        f.write(b"half")
        raise OSError(28, "No space left on device")
    assert is_refused(capsys, "No space left on device", run.write, "ckpt.pt", half)
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob("*.tmp")) + list((tmp_path / "run").glob(".*.tmp"))
    monkeypatch.setattr(checkpoints.torch, "save", lambda state, f: half(f))
    run.checkpoint(5, dict(AT), {}, {})  # by a thread: it is told by the next that waits for it
    assert is_refused(capsys, "ckpt.pt could not be written ([Errno 28] No space left", run.writer.wait)
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("nothing\nto draw")])
def test_a_picture_that_cannot_be_drawn_costs_a_line_and_not_the_run(make_run, capsys, error):
    run = make_run()
    run.open(0)

    def draw(folders):
        assert (folders[0] / "summary.json").is_file()
        raise error
    capsys.readouterr()
    run.finish(dict(arms={}), draw, lambda folder: "a page")
    output = capsys.readouterr().out
    assert f"no plot was drawn ({type(error).__name__}); try python plot.py {run.out_dir}" in output
    assert "page: a page" in output and output.count("\n") == 2 and run.files["log.jsonl"].closed


# ---- numbers that are not finite

@pytest.mark.parametrize("bad", ["loss", "weight", "gold"])
def test_what_is_not_finite_is_in_no_checkpoint_and_the_way_on_is_named(make_run, tmp_path, capsys, bad):
    run, net = make_run(), torch.nn.Linear(2, 2)
    run.open(0)
    run.checkpoint(0, dict(AT), dict(x=torch.ones(1)), dict(net=net))
    run.writer.wait()
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()
    torch.nn.init.constant_(net.weight, math.inf if bad == "weight" else 1.0)
    tally = dict(loss=torch.tensor([math.nan if bad == "loss" else 1.0]))
    with pytest.raises(SystemExit) as stop:
        run.is_finite((math.nan if bad == "gold" else 1.0, 1.0), "meta", 5)
        run.checkpoint(5, dict(AT), tally, dict(net=net))
    output = capsys.readouterr().out
    what = "gold" if bad == "gold" else "a weight or the loss"
    assert stop.value.code == 3 and f"error: {what} is not finite at step 5 of meta" in output
    assert f"python script.py --resume={run.out_dir} --learning_rate=" in output
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == before


def test_a_number_that_is_not_finite_is_never_logged(make_run, tmp_path):
    run = make_run()
    run.open(0)
    with pytest.raises(SystemExit) as stop:
        run.log(dict(arm="meta", step=3, proxy=1.0, gold_nats=float("nan")))
    assert stop.value.code == 3 and (tmp_path / "run" / "log.jsonl").read_text() == ""


# ---- checkpoints and resuming

@pytest.mark.parametrize("content, message", [
    (None, "holds no ckpt.pt"),
    (b"PK\x03\x04 half of a zip", "damaged or half written"),
    (dict(weights=1), "is no checkpoint of this project"),
    (dict(format=checkpoints.FORMAT, stage="meta_gist"), "is a checkpoint of meta_gist.py"),
])
def test_checkpoints_that_cannot_be_resumed_are_refused(tmp_path, content, message, capsys):
    (tmp_path / "old").mkdir()
    if isinstance(content, bytes):
        (tmp_path / "old" / "ckpt.pt").write_bytes(content)
    elif content:
        torch.save(content, tmp_path / "old" / "ckpt.pt")
    assert is_refused(capsys, message, read_checkpoint, tmp_path / "old", "script")


def test_a_run_is_saved_each_save_interval_and_where_it_is_asked_to_stop(make_run, tmp_path):
    run = make_run()
    run.open(0)
    assert [step for step in range(12) if run.saves(step)] == [0, 5, 10]
    run.checkpoint(5, dict(AT), {}, {})
    run.writer.wait()
    assert read_checkpoint(run.out_dir, "script")["step"] == 5
    run._on_signal(signal.SIGTERM, None)
    run.checkpoint(5, dict(AT), {}, {})  # a signal that the ranks have not spoken of yet stops none of them
    with pytest.raises(SystemExit) as stop:
        assert run.saves(8)
        run.checkpoint(8, dict(AT), {}, {})
    assert stop.value.code == 128 + signal.SIGTERM
    assert read_checkpoint(run.out_dir, "script")["step"] == 8


def test_a_resumed_run_is_where_the_checkpoint_was_and_takes_back_what_came_after(make_run, capsys):
    run, parts = make_run(save_interval=2), dict(net=torch.nn.Linear(2, 2), done=torch.nn.Linear(2, 2))
    run.open(0)
    hacks = run.out_dir / "hacks"
    hacks.mkdir()
    run.log(dict(arm="meta", step=0))
    run.append("samples.txt", "ein Text → ok\n")
    run.append("texts.jsonl", '{"step": 0}\n')
    (hacks / "001.md").write_text("kept")
    (hacks / "notes.md").write_text("mine")
    run.checkpoint(2, dict(AT, arm="real"), dict(loss=torch.tensor([3.0])), dict(net=parts["net"]))
    run.log(dict(arm="meta", step=1))
    run.append("samples.txt", "gone")
    run.append("texts.jsonl", "gone\n")
    for name in ("002.md", "002.png", ".001.md.tmp", "notes.txt"):
        (hacks / name).write_text("after")
    run.close()

    run, at, tally = make_run(resume=run.out_dir), dict(AT, step=0), {}
    assert run.settings["save_interval"] == 2
    new = dict(net=torch.nn.Linear(2, 2), done=torch.nn.Linear(2, 2))
    missing = new["done"].weight.clone()
    run.restore(at, tally, new)
    assert set(run.resumed) == {"files", "reports", "sources"}  # the rest is freed
    assert at == dict(AT, arm="real", step=2) and tally == dict(loss=torch.tensor([3.0]))
    assert torch.equal(new["net"].weight, parts["net"].weight) and torch.equal(new["done"].weight, missing)
    run.open(0)
    assert (run.out_dir / "log.jsonl").read_text().count("\n") == 1
    assert (run.out_dir / "samples.txt").read_text(encoding="utf-8") == "ein Text → ok\n"
    assert (run.out_dir / "texts.jsonl").read_text() == '{"step": 0}\n'
    assert {p.name for p in hacks.iterdir()} == {"001.md", "notes.md", "notes.txt"} and run.last_report() == 1
    run.close()
    (run.out_dir / "samples.txt").unlink()
    assert is_refused(capsys, "samples.txt is gone", make_run(resume=run.out_dir).open, 0)


def test_an_interrupted_arm_comes_first_and_real_before_the_others(make_run, capsys):
    run, known = make_run(), ("self", "ema", "real", "frozen")
    assert run.arms_to_go(["frozen", "self", "real", "ema"], known) == ["real", "frozen", "self", "ema"]
    run.resumed = dict(arms=dict(frozen=dict(self_steps=10)), arm="ema")
    assert run.arms_to_go(["frozen", "self", "real", "ema"], known) == ["ema", "real", "self"]
    assert is_refused(capsys, "leaves out 'ema'", run.arms_to_go, ["real"], known)
    run.settings["self_steps"] = 20
    assert run.arms_to_go(["frozen", "ema"], known) == ["ema", "frozen"]  # more steps of it are asked for


# ---- what other runs left

def test_the_end_of_each_arm_is_kept_and_a_missing_one_is_told(make_run, capsys):
    run, net = make_run(), torch.nn.Linear(2, 2)
    run.open(0)
    assert is_refused(capsys, "holds no end of arm 'real'", read_end, run.out_dir, "real", "script")
    for k, arm in enumerate(("real", "self")):
        torch.nn.init.constant_(net.weight, k)
        run.keep_end(arm, dict(learner=net), dict(step=k))
    end = read_end(run.out_dir, "real", "script")
    assert (end["format"], end["stage"], end["arm"]) == (checkpoints.FORMAT, "script", "real")
    assert torch.equal(end["weights"]["weight"], torch.zeros(2, 2))
    assert is_refused(capsys, "'ema'; it holds real, self", read_end, run.out_dir, "ema", "script")
    assert is_refused(capsys, "is a checkpoint of script.py", read_end, run.out_dir, "self", "meta_gist")


def test_a_meta_phase_is_lent_only_to_runs_that_would_have_gone_through_the_same(make_run, capsys):
    run = make_run()
    run.open(0)
    ask = lambda corpus="plays", **settings: read_meta_phase(
        str(run.out_dir), "script", "cpu", settings, ("arms",), corpus)
    run.checkpoint(0, dict(AT), {}, {})
    run.writer.wait()
    assert is_refused(capsys, "has not finished its meta phase", ask)
    run.checkpoint(5, dict(AT, meta=dict(gold=1.0), snapshot=dict(learner=2)), {}, {})
    run.writer.wait()
    assert ask(seed=1, arms="self") == (dict(gold=1.0), dict(learner=2))
    assert is_refused(capsys, "another corpus or tokenizer", ask, "pages")
    assert is_refused(capsys, "seed=2 differs from 1", ask, seed=2)


def test_a_critic_comes_from_a_bottleneck_of_the_same_shape(make_run, tmp_path, capsys):
    state = dict(AT, meta={}, snapshot=dict(learner=7), config=dict(vocab=9, n_layer=3),
                 format=checkpoints.FORMAT, stage="gist_bottleneck")
    torch.save(state, tmp_path / "ckpt.pt")
    assert read_bottleneck(str(tmp_path), "cpu", "plays", vocab=9) == dict(vocab=9, n_layer=3, weights=7)
    message = f"vocab=8 differs from 9, that of critic_from={str(tmp_path)!r}"
    assert is_refused(capsys, message, read_bottleneck, str(tmp_path), "cpu", "plays", vocab=8)


def test_a_checkpoint_that_takes_long_to_write_is_written_seldom_and_never_two_at_once(tmp_path):
    writer = checkpoints.Writer(tmp_path)
    assert writer.due()
    writer.took, writer.ended = 3.0, time.monotonic() - 0.9 * 3.0 / checkpoints.SHARE
    assert not writer.due()
    writer.ended -= 0.2 * 3.0 / checkpoints.SHARE
    assert writer.due()
    writer.thread = SimpleNamespace(is_alive=lambda: True)
    assert not writer.due()


def test_a_signal_that_comes_while_ranks_ask_each_other_is_heard_at_the_next_question(make_run, monkeypatch):
    run = make_run()
    run.ranks, asked = 2, []
    run.progress.start(0)

    def all_reduce(flag, op):
        asked.append(flag.tolist()[0])
        if len(asked) == 1:
            run._on_signal(signal.SIGTERM, None)
    monkeypatch.setattr(run_module.dist, "all_reduce", all_reduce)
    assert [run.stopping(0), run.stopping(0)] == [False, True] and asked == [0, signal.SIGTERM]
