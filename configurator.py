"""
Settings: a script's globals with a comment each, overridden from the command line.

A script keeps its settings as globals at its top, one a line with a comment behind it, and calls
`configure(globals())`, or `run.open_run(globals())`, which does that and more. The comments are the help
(`python self_ce.py --help`).

    --name=value on the command line     what happens
    --learning_rate=1                    int where a float is meant: 1.0
    --meta_steps=1e3                     float where an int is meant: 1000, refused unless whole
    --compile=true                       true/false (any case) for a bool; bare --compile is true
    --dataset=a=b.txt                    a string stays the string it is, whatever it contains
    --target=hard                        refused: the comment lists the choices
    --learning_rte=1e-3, --lr=1e-3       refused: the nearest name is shown

Values are literals and are never executed. `--name value` works as well as `--name=value`.
"""
import ast
import difflib
import io
import math
import os
import re
import sys
import tokenize
from pathlib import Path

POSITIVE = ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "eval_interval", "eval_windows",
            "save_interval", "learning_rate", "grad_clip", "grad_accum", "vocab")
# What may differ when a run is resumed: how it computes, and which arms it adds; never what it computes.
FREE_ON_RESUME = ("arms", "device", "compile", "wandb_log", "save_interval", "resume")
# And these, if they are lower: the way on for a run that diverged.
RATES = ("learning_rate", "self_learning_rate", "self_rate", "critic_rate", "scalar_rate", "grad_clip")
PATHS = ("out_dir", "resume", "start", "critic_from")
# What no meta phase reads: with `start`, the other settings must be those of the run started from.
SELF_PHASE = ("arms", "self_steps", "ema_decay", "decay", "eval_interval", "eval_windows", "save_interval",
              "device", "compile", "out_dir", "resume", "start", "wandb_log")


def refuse(message):
    """Bad input ends here: one line or two on stderr, from each node's first rank, and exit code 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def refuse_if(wrong, message):
    if wrong:
        refuse(message)


def read_settings(path):
    """The settings of a script: {name: (group, default, comment, choices)}, in the file's order.

    A setting is an assignment of a literal to a lower-case name above the first function or class, with a
    comment behind it. `# --- title` opens a group. A comment that begins with "a" | "b" lists the choices.
    """
    source = Path(path).read_text(encoding="utf-8")
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")
    titles = {line: text[4:].strip() for line, text in comments.items() if text.startswith("--- ")}
    settings = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            break
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
            continue
        name, comment = node.targets[0].id, comments.get(node.lineno)
        if comment is None or not isinstance(node.value, ast.Constant) or not name.islower():
            continue
        group = next((titles[k] for k in sorted(titles, reverse=True) if k < node.lineno), "")
        head = re.match(r'"[^"]*"( \| "[^"]*")+', comment)
        choices = re.findall(r'"([^"]*)"', head.group()) if head else []
        settings[name] = (group, node.value.value, comment, choices)
    return settings


def parse_value(name, text, default, choices):
    """The value that `text` means for a setting whose default is `default`; refuses what does not fit."""
    if isinstance(default, str):
        if choices and text not in choices:
            refuse(f"{name}={text!r} is not one of " + ", ".join(f'"{c}"' for c in choices))
        refuse_if("\0" in text, f"{name}={text!r} has a character of number 0, which no name and no text has")
        path = os.path.expanduser(text) if name in PATHS else text
        refuse_if(name in PATHS and path[:1] == "~", f"{name}={text!r}: there is no such user's home folder")
        return path
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            refuse(f"{name}={text} must be true or false")
        return text.lower() == "true"
    whole = isinstance(default, int)
    try:
        value = ast.literal_eval(text)
        fits = not isinstance(value, bool) and math.isfinite(value) and (not whole or value == int(value))
        fits = fits and (not whole or abs(value) < 2**63)
    except (ValueError, SyntaxError, TypeError, OverflowError):  # no literal, no number, or beyond any float
        fits = False
    if not fits:
        refuse(f"{name}={text} must be {'a whole number' if whole else 'a number'}, as {default}")
    if value < 0:
        refuse(f"{name}={text} must not be negative")
    return int(value) if whole else float(value)


def nearest(name, known):
    """ "; did you mean 'a'?" for the known names that `name` abbreviates or misspells; else ""."""
    abbreviated = [k for k in known if "".join(word[:1] for word in k.split("_")) == name]
    near = abbreviated or difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def parse_arguments(settings, argv):
    """{name: value} of what the command line sets."""
    given, rest = {}, list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            refuse(f"{word!r} is not of the form --name=value (see --help)")
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in settings:
            refuse(f"unknown setting {name!r}" + (nearest(name, settings) or " (see --help)"))
        _, default, _, choices = settings[name]
        if not equals and rest and not rest[0].startswith("--"):
            text = rest.pop(0)
        elif not equals and isinstance(default, bool):
            text = "true"
        elif not equals:
            refuse(f"{name} needs a value: --{name}=...")
        given[name] = parse_value(name, text, default, choices)
    return given


def print_help(scope, settings):
    """The script's docstring, then each setting with its default and its comment, in the file's groups."""
    lines = [(scope.get("__doc__") or "").strip()]
    width = max(len(f"--{name}={default}") for name, (_, default, _, _) in settings.items()) + 2
    last = None
    for name, (group, default, comment, _) in settings.items():
        if group != last:
            lines.append(f"\n{group}")
            last = group
        lines.append("  " + f"--{name}={default}".ljust(width) + comment)
    print("\n".join(lines))  # at once: `| head` may close the pipe


def configure(scope, argv=None):
    """Overrides the settings among `scope` (a script's globals) from the command line, in place.

    Returns ({name: value} of all settings, {name: value} of those given). `--help` prints and exits.
    """
    for stream in (sys.stdout, sys.stderr):  # text of any alphabet goes to any terminal
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    argv = sys.argv[1:] if argv is None else argv
    settings = read_settings(scope["__file__"])
    if "--help" in argv or "-h" in argv:
        print_help(scope, settings)
        raise SystemExit(0)
    given = parse_arguments(settings, argv)
    scope.update(given)
    return {name: scope[name] for name in settings}, given


def defaults_of(scope):
    """{name: default} of a script's settings."""
    return {name: default for name, (_, default, _, _) in read_settings(scope["__file__"]).items()}


def keep_saved(settings, given, saved, folder):
    """What the run in `folder` saved, and what is given now where it may differ, or a refusal."""
    for name in sorted(set(settings) ^ set(saved)):
        when = "is no setting any more" if name in saved else "was no setting yet when it was begun"
        refuse(f"{name!r} {when}: {folder} is of other code, which is in {folder}/sources")
    for name in settings:
        free = name in (*FREE_ON_RESUME, "out_dir") or name in RATES and given.get(name, 0) < saved[name]
        if name == "self_steps" and given.get(name, 0) > saved[name]:
            refuse_if(saved[name] % saved["eval_interval"] or saved["decay"] < 1 or saved.get("rescue_steps"),
                      f"self_steps={given[name]}: there can be more than {saved[name]} only where those were "
                      f"a multiple of eval_interval={saved['eval_interval']}, decay=1, rescue_steps=0")
            free = True
        if name in given and given[name] != saved[name] and not free:
            refuse(f"{name}={given[name]!r} differs from {saved[name]!r}, with which {folder} was begun; "
                   "leave it out, or start a new run")
    return saved | given | dict(out_dir=folder, resume="")


def taken_from(settings, given, other, self_phase):
    """The settings, with those of the run started from, `other`, where its meta phase read them and none is
    given. self_phase: further names that it did not read."""
    kept = (*given, *SELF_PHASE, *self_phase)
    return {name: value if name in kept else other.get(name, value) for name, value in settings.items()}


def check_memory(s):
    """Refuses what cannot be held: weights with moments, or a rank's logits, above all memory there is."""
    if not hasattr(os, "sysconf"):  # Windows does not tell
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    n_layer, width, vocab, T = (s.get(name, 1) for name in ("n_layer", "n_embd", "vocab", "block_size"))
    pieces = int(os.environ.get("WORLD_SIZE", 1)) * s.get("grad_accum", 1)
    for names, size in (("n_layer n_embd vocab", 16 * (12 * n_layer * width ** 2 + 2 * vocab * width)),
                        ("batch_size block_size vocab", 4 * s.get("batch_size", 1) * T * vocab // pieces),
                        ("eval_windows block_size", 8 * s.get("eval_windows", 1) * T),
                        ("outer_batch block_size", 8 * s.get("outer_batch", 1) * T)):
        told = ", ".join(f"{name}={s[name]}" for name in names.split() if name in s)
        refuse_if(size > memory,
                  f"{told}: {size / 1e9:,.0f} GB at least, of the {memory / 1e9:.0f} GB there are")


def check_common(settings):
    """Refuses the impossible sizes that all scripts share."""
    for name in POSITIVE:
        if name in settings and not settings[name] > 0:
            refuse(f"{name}={settings[name]} must be above 0")
    if settings["seed"] >= 2**63:
        refuse(f"seed={settings['seed']} must be below 2**63")
    for name in ("start", "critic_from"):
        folder, out_dir = settings.get(name), settings.get("out_dir", "")
        run = os.path.dirname(os.path.dirname(folder)) if folder and folder.endswith(".pt") else folder
        same = folder and os.path.realpath(run) == os.path.realpath(out_dir)
        refuse_if(same, f"{name}={folder!r} is out_dir too, and would be moved aside; name another --out_dir")
    share, left = settings.get("ema_decay", 0), settings.get("decay", 1)
    refuse_if(share >= 1, f"ema_decay={share} must be below 1: it is the share of the old weights that stays")
    refuse_if(left > 1, f"decay={left} must be at most 1: it is the share of the learning rate that is left")
    for name in ("critic_rate", "scalar_rate"):
        rate = settings.get(name, 0)
        refuse_if(rate > 1e30, f"{name}={rate} must be at most 1e30: beyond there are no float32 numbers")
    check_memory(settings)
    n_embd, n_head = settings["n_embd"], settings["n_head"]
    if n_embd % n_head or (n_embd // n_head) % 2:
        refuse(f"n_embd={n_embd} must be an even multiple of n_head={n_head} (rotary positions turn pairs)")


def chosen(setting, text, known):
    """The names that the value `text` of a setting ("arms", "controls") lists with commas, in its order.

    Refuses names that are not `known` and names given twice.
    """
    names = [name for name in text.replace(" ", "").split(",") if name]
    one = setting.removesuffix("s")
    for name in names:
        if name not in known:
            instead = nearest(name, known) or f"; the {setting} are {', '.join(known)}"
            refuse(f"{setting}={text!r}: there is no {one} {name!r}{instead}")
    if len(set(names)) < len(names):
        refuse(f"{setting}={text!r} names {'an' if one[0] in 'aeiou' else 'a'} {one} twice")
    return names
