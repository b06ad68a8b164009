"""What the command line may and may not say."""
import subprocess
import sys
from pathlib import Path

import pytest

from configurator import check_common, chosen, configure, keep_saved, taken_from

SCRIPT = '''"""A script."""
# --- first group
steps = 10         # how many
rate = 1e-3        # how fast → where
learning_rate = 1e-3  # abbreviated to its initials by many
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
    path.write_text(SCRIPT, encoding="utf-8")
    values = {}
    exec(SCRIPT, values)
    return dict(values, __file__=str(path))


def test_literals_are_taken_as_the_default_asks(scope):
    arguments = ["--steps=1e3", "--rate=1", "--flag=TRUE", "--kind=b", "--path=a=b --c.txt"]
    settings, given = configure(scope, arguments)
    assert given == dict(steps=1000, rate=1.0, flag=True, kind="b", path="a=b --c.txt")
    assert type(scope["steps"]) is int and type(scope["rate"]) is float and scope["path"] == "a=b --c.txt"
    assert list(settings) == ["steps", "rate", "learning_rate", "flag", "kind", "path"]
    assert configure(scope, ["--flag", "--steps", "7"])[1] == dict(flag=True, steps=7)
    assert configure(scope, ["--path=123"])[1] == dict(path="123")


@pytest.mark.parametrize("argument, message", [
    ("--lr=3", "unknown setting 'lr'; did you mean 'learning_rate'?"),
    ("--stepz=3", "unknown setting 'stepz'; did you mean 'steps'?"),
    ("--Hidden=3", "unknown setting 'Hidden'"),
    ("--later=3", "unknown setting 'later'"),
    ("steps=3", "'steps=3' is not of the form --name=value"),
    ("--steps=1.5", "steps=1.5 must be a whole number, as 10"),
    ("--steps=-3", "steps=-3 must not be negative"),
    ("--steps=True", "steps=True must be a whole number"),
    ("--steps=__import__('os')", "must be a whole number"),
    ("--rate=fast", "rate=fast must be a number, as 0.001"),
    ("--steps=1" + 400 * "0", "must be a whole number, as 10"),
    ("--rate=1e999", "rate=1e999 must be a number"),
    ("--flag=1", "flag=1 must be true or false"),
    ("--kind=c", "kind='c' is not one of \"a\", \"b\""),
    ("--steps", "steps needs a value: --steps=..."),
])
def test_what_does_not_fit_is_refused_in_one_line(scope, argument, message, capsys):
    before = dict(scope)
    with pytest.raises(SystemExit) as stop:
        configure(scope, [argument])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1 and scope == before


def test_help_prints_each_setting_with_default_and_comment_in_groups(scope, capsys):
    with pytest.raises(SystemExit) as stop:
        configure(scope, ["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and lines[0] == "A script."
    assert [line for line in lines if "group" in line] == ["first group", "second group"]
    text = "".join(lines)
    assert "--kind=a" in text and '"a" | "b": which' in text and "Hidden" not in text


def test_a_list_of_names_keeps_its_order_and_refuses_unknown_and_repeated_ones(capsys):
    assert chosen("arms", "frozen, real,", ("real", "frozen")) == ["frozen", "real"]
    assert chosen("controls", "", ("full", "none")) == []
    for setting, text, message in (
            ("arms", "frosen", "arms='frosen': there is no arm 'frosen'; did you mean 'frozen'?"),
            ("arms", "xyz", "arms='xyz': there is no arm 'xyz'; the arms are real, frozen, full"),
            ("arms", "real,real", "arms='real,real' names an arm twice"),
            ("controls", "full,full", "controls='full,full' names a control twice")):
        with pytest.raises(SystemExit) as stop:
            chosen(setting, text, ("real", "frozen", "full"))
        assert stop.value.code == 2 and capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize("changes, message", [
    (dict(n_embd=100, n_head=3), "n_embd=100 must be an even multiple of n_head=3"),
    (dict(n_embd=6, n_head=2), "n_embd=6 must be an even multiple of n_head=2"),
    (dict(n_layer=0), "n_layer=0 must be above 0"),
    (dict(seed=2**63), "must be below 2**63"),
    (dict(n_embd=2 * 10**9), "n_layer=1, n_embd=2000000000: 768,000,000,"),
    (dict(batch_size=10**15, block_size=1024, vocab=512), "batch_size=1000000000000000, block_size=1024"),
    (dict(eval_windows=10**18), "eval_windows=1000000000000000000: 8,000,000,000 GB at least, of "),
])
def test_impossible_sizes_are_refused(changes, message, capsys):
    possible = dict(n_layer=1, n_embd=8, n_head=2, seed=1)
    check_common(possible)
    with pytest.raises(SystemExit):
        check_common(dict(possible, **changes))
    assert message in capsys.readouterr().err


def test_a_resumed_run_keeps_its_settings_but_those_that_change_no_number(capsys):
    now = dict(learning_rate=0.1, arms="real", device="auto", out_dir="new", resume="old")
    saved = dict(learning_rate=0.5, arms="self", device="cpu", out_dir="old", resume="")
    kept = keep_saved(now, dict(arms="real"), saved, "old")
    assert kept == dict(learning_rate=0.5, arms="real", device="cpu", out_dir="old", resume="")
    assert keep_saved(now, dict(learning_rate=0.1), saved, "old")["learning_rate"] == 0.1  # it diverged
    for settings, given, message in (
            (now, dict(learning_rate=0.6), "learning_rate=0.6 differs from 0.5, with which old was begun"),
            (dict(now, decay=1.0), {}, "'decay' was no setting yet when it was begun: old is of other code"),
            ({k: v for k, v in now.items() if k != "arms"}, {}, "'arms' is no setting any more: old is of")):
        with pytest.raises(SystemExit):
            keep_saved(settings, given, saved, "old")
        assert message in capsys.readouterr().err


def test_what_a_meta_phase_reads_is_taken_from_the_run_that_is_started_from():
    now = dict(n_embd=8, self_rate=1.0, arms="a", seed=1)
    other = dict(n_embd=16, self_rate=0.5, arms="b", seed=2)
    assert taken_from(now, dict(seed=1), other, ("self_rate",)) == dict(now, n_embd=16)


def test_settings_and_plots_can_be_read_without_torch_and_matplotlib():
    program = "import configurator, plot, sys; print({'torch', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent.parent, text=True,
                          capture_output=True)
    assert done.stdout == "set()\n", done.stderr
