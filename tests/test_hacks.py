"""What is said as text, and the report of a hack."""
import json
from types import SimpleNamespace

import pytest

import hacks
from hacks import (aligned, at_the_snapshot, caveats, index_page, keep_texts, marked, moved, report_page,
                   reports, texts_of, verdict, what_changed, write_report)

LETTERS = SimpleNamespace(decode=lambda ids, errors: "".join(map(chr, ids)))
BYTES = SimpleNamespace(decode=lambda ids, errors: bytes(ids).decode("utf-8", errors))
JUDGED = {("then", "then"): 1.0, ("then", "now"): 0.98765, ("now", "then"): 0.25, ("now", "now"): 0.5}
ROW = dict(arm="self", step=30, agreement=0.5, echo=None, gold_nats=4.23456)


def phases_of(run, changed=(), earlier=()):
    watch, corpus = SimpleNamespace(order=lambda: list(changed)), SimpleNamespace(encoding=LETTERS)
    return SimpleNamespace(run=run, row=ROW, watch=watch, corpus=corpus,
                           at=dict(track=dict(reports=list(earlier))))


@pytest.fixture
def run(tmp_path):
    """A run that writes, with a log; what it says is kept in `told`."""
    rows = [dict(ROW, arm="meta", step=9, gold_nats=2.0), dict(ROW, step=0, gold_nats=2.0), ROW]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    told = []

    def write(name, write):
        with open(tmp_path / name, "wb") as f:
            write(f)
    return SimpleNamespace(first=True, out_dir=tmp_path, write=write, say=told.append, told=told,
                           last_report=lambda: len(list((tmp_path / "hacks").glob("[0-9]*.md"))))


# ---- text

def test_tokens_that_differ_are_marked():
    assert marked(LETTERS, [97, 98, 99, 10], [97, 0, 0, 10]) == "a⟦bc⟧⏎"
    assert marked(LETTERS, [97, 98], [97, 0]) == "a⟦b⟧"
    assert marked(LETTERS, [None, 98, None], [97, 98, 99]) == "⟦∅⟧b⟦∅⟧"


def test_a_letter_of_several_bytes_is_one_wherever_text_is_shown():
    seen, own = list("é→x".encode()), list("è→y".encode())
    assert marked(BYTES, own, seen) == "⟦è⟧→⟦y⟧"
    assert aligned(BYTES, (own, seen, seen)).splitlines()[0] == "output      │è│→│y│"
    assert marked(BYTES, [0xC3, 65, *own[2:]], seen) == "⟦\ufffdA⟧→⟦y⟧"  # half a letter, and another
    cut = seen[1:]  # a text that begins inside a letter
    assert marked(BYTES, cut, cut) == "\ufffd→x"


def test_the_three_lines_stand_token_below_token():
    said = ([97, 10], [98, 27], [None, 99])
    assert aligned(LETTERS, said) == "output      │a│⏎│\nobservation │b│␛│\ntarget      │∅│c│\n\n"
    lines = aligned(LETTERS, ([97] * 60,) * 3).splitlines()
    assert [line.split()[0] for line in lines if line] == ["output", "observation", "target"] * 2
    assert max(map(len, lines)) <= hacks.LINE + 14 and "".join(lines).count("a│") == 3 * 60


@pytest.mark.parametrize("n, interval", [(500, 25), (600, 10), (20_000, 30), (7, 4), (5, 10)])
def test_what_is_said_is_kept_a_dozen_times_an_arm_and_fewer_in_a_short_one(n, interval):
    kept, told = [], lambda learner, critic: (list(range(99)), [1], [None], 0.5)
    run = SimpleNamespace(append=lambda name, line: kept.append(json.loads(line)))
    phases = SimpleNamespace(arm="self", settings=dict(eval_interval=interval), parts=dict(learner=0),
                             told=told, judge=lambda: 0, run=run)
    for phases.step in [*range(0, n, interval), n]:
        keep_texts(phases, n)
    steps = [row["step"] for row in kept]
    assert {0, n} <= set(steps) and min(10, n / 100) <= len(steps) <= min(12, n / 75 + 2)
    assert all(step % interval == 0 for step in steps[:-1])
    assert kept[0] == dict(arm="self", step=0, own=list(range(64)), obs=[1], target=[None])
    phases.arm = "meta"
    keep_texts(phases, n)
    assert len(kept) == len(steps)


def test_a_target_is_the_observation_the_own_output_neither_or_none(tmp_path):
    assert texts_of(tmp_path, LETTERS) == {}
    row = dict(arm="self", step=5, own=[97, 98, 97, 97], obs=[97, 97, 98, 99], target=[97, 98, 99, None])
    (tmp_path / "texts.jsonl").write_text(json.dumps(row) + "\n" + '{"cut sho', encoding="utf-8")
    (at,) = texts_of(tmp_path, LETTERS)["self"]
    assert at["step"] == 5 and [kind for *_, kind in at["tokens"]] == ["same", "own", "other", "none"]
    assert at["tokens"][3] == ("a", "c", "∅", "none")


# ---- the report

def test_ranks_but_the_first_keep_the_same_of_a_report_and_write_none(monkeypatch):
    monkeypatch.setattr(hacks, "examined", lambda phases: (JUDGED, {}))
    other = SimpleNamespace(first=False)
    write = lambda why, changed: write_report(phases_of(other, changed), why)
    judged = {"then on then": 1.0, "then on now": 0.9877, "now on then": 0.25, "now on now": 0.5}
    kept = dict(step=30, why="probe+entropy", changed=[[3, "probe"]], judged=judged)
    assert write(["probe", "entropy"], [(3, "probe")]) == kept
    assert write("gold", []) == dict(step=30, why="gold", changed=[], judged=judged)


def test_the_page_tells_what_changed_first_who_misjudges_and_what_was_said():
    texts = dict(then=([97, 98], [97, 99], [97, 99]), now=([98, 98], [97, 99], [98, None]))
    changed = what_changed([(12, "probe"), (20, "entropy")], [])
    page = report_page(ROW, dict(gold_nats=2.0), "gold", changed, "![curves](002.png)", JUDGED, ["Beside."],
                       texts, LETTERS).splitlines()
    assert page[0] == "# self, step 30: gold rose" and "![curves](002.png)" in page and "Beside." in page
    assert page.index("1. probe, from step 12") + 1 == page.index("2. entropy, from step 20")
    assert "| snapshot's critic | 1.000 | 0.988 |" in page and "| today's critic | 0.250 | 0.500 |" in page
    assert verdict(JUDGED) in page
    assert "| gold_nats | 2 | 4.235 |" in page and "| agreement |  | 0.5 |" in page
    assert not any(line.startswith(("| echo", "| step")) for line in page)  # columns with a value alone
    rows = ("output ", "observation ", "target ")
    said = [line.split(maxsplit=1) for line in page if line.startswith(rows)]
    assert said == [["output", "a⟦b⟧"], ["observation", "ac"], ["target", "ac"],
                    ["output", "⟦bb⟧"], ["observation", "ac"], ["target", "⟦b∅⟧"]]


def test_where_no_stream_has_left_its_range_the_page_says_why_and_what_moved():
    alarm, gold = dict(step=20, why="probe"), dict(step=10, why="gold")
    assert "anew after its alarm at step 20" in what_changed([], [alarm, gold])[0]
    assert "it was off" in what_changed([], [gold])[0]
    then = dict(gold_nats=2.0, agreement=1.0, echo=1.0, lr=0.1)
    assert moved(then, dict(gold_nats=2.01, agreement=0.1, echo=None, lr=9.0)) == ["- agreement: 1 → 0.1"]
    assert moved(then, dict(gold_nats=8.0, agreement=0.5)) == ["- gold_nats: 2 → 8", "- agreement: 1 → 0.5"]
    rows = [dict(arm="meta", step=8, agreement=0.1), dict(arm="meta", step=9, agreement=0.9, echo=None),
            dict(arm="real", step=5, echo=0.2), dict(arm="self", step=5, echo=0.3, agreement=0.4)]
    assert at_the_snapshot(rows, "self") == dict(arm="meta", step=9, agreement=0.9, echo=0.3)


def test_the_verdict_names_who_changed():
    judged = lambda old_on_new, new_on_old: {("then", "then"): 1.0, ("then", "now"): old_on_new,
                                             ("now", "then"): new_on_old, ("now", "now"): 0.5}
    assert verdict(judged(0.2, 0.99)).startswith("Exploit")
    assert verdict(judged(0.99, 0.2)).startswith("Drift")
    assert verdict(judged(0.2, 0.2)).startswith("Both")
    assert verdict(judged(0.99, 0.99)).startswith("Neither")


def test_a_verdict_that_is_not_that_of_the_report_before_says_which_number_crossed():
    judged = {"then on then": 1.0, "then on now": 0.5, "now on then": 0.2, "now on now": 0.5}
    last = dict(step=20, judged=judged)
    told, = caveats(JUDGED, [dict(step=10), last])
    assert "At step 20 the verdict was Both" in told and "today's critic" not in told
    assert "the snapshot's critic on today's outputs fell short by 0.50" in told and "by 0.01 now" in told
    same = dict(last, judged={**judged, "then on now": 1.0})
    assert caveats(JUDGED, []) == caveats(JUDGED, [same]) == []
    poor, = caveats(dict.fromkeys(JUDGED, 0.2), [])
    assert "only 0.20 of the places" in poor


def test_reports_are_numbered_and_listed_and_a_picture_that_cannot_be_drawn_costs_a_line(run, monkeypatch):
    (run.out_dir / "hacks").mkdir()
    (run.out_dir / "hacks/notes.md").write_text("# self, step 1: mine", encoding="utf-8")
    texts = dict.fromkeys(("then", "now"), ([97], [98], [98]))
    monkeypatch.setattr(hacks, "examined", lambda phases: (JUDGED, texts))
    write_report(phases_of(run, [(3, "probe")]), ["probe"])
    assert (run.out_dir / "hacks/001.png").stat().st_size > 5000 and not run.told

    def draw(*what):
        raise MemoryError
    monkeypatch.setattr(hacks, "draw_report", draw)
    write_report(phases_of(run), "gold")
    page = (run.out_dir / "hacks/002.md").read_text(encoding="utf-8")
    assert run.told == ["hacks/002.png could not be drawn (MemoryError)"] and "002.png" not in page
    assert "- gold_nats: 2 → 4.235" in page
    assert reports(run.out_dir) == [("001", "self", 30, "the watch alarmed on probe", "Drift"),
                                    ("002", "self", 30, "gold rose", "Drift")]
    index = (run.out_dir / "hacks/index.md").read_text(encoding="utf-8")
    assert index == index_page(run.out_dir) and "| [002](002.md) | self | 30 | gold rose | Drift |" in index
    assert (run.out_dir / "hacks/notes.md").read_text(encoding="utf-8") == "# self, step 1: mine"
