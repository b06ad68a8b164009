"""The report of a hack."""
from types import SimpleNamespace

from hacks import marked, report_page, verdict, write_report

LETTERS = SimpleNamespace(decode=lambda ids, errors: "".join(map(chr, ids)))
JUDGED = {("then", "then"): 1.0, ("then", "now"): 0.98765, ("now", "then"): 0.25, ("now", "now"): 0.5}


def test_ranks_but_the_first_keep_the_same_of_a_report_and_write_none():
    write = lambda *what: write_report(SimpleNamespace(first=False), dict(step=5), *what, JUDGED, {}, None)
    judged = {"then on then": 1.0, "then on now": 0.9877, "now on then": 0.25, "now on now": 0.5}
    kept = dict(step=5, why="probe+entropy", changed=[[3, "probe"]], judged=judged)
    assert write(["probe", "entropy"], [(3, "probe")]) == kept
    assert write("gold", []) == dict(step=5, why="gold", changed=[], judged=judged)


def test_the_page_tells_what_changed_first_who_misjudges_and_what_was_said():
    row = dict(arm="self", step=30, agreement=0.5, echo=None, gold_nats=4.23456)
    texts = dict(then=([97, 98], [97, 99], [97, 99]), now=([98, 98], [97, 99], [98, None]))
    changed = [(12, "probe"), (20, "entropy")]
    page = report_page("002", row, "gold", changed, JUDGED, texts, LETTERS).splitlines()
    assert page[0] == "# self, step 30: gold rose" and "![curves](002.png)" in page
    assert page.index("1. probe, from step 12") + 1 == page.index("2. entropy, from step 20")
    assert "| snapshot's critic | 1.000 | 0.988 |" in page and "| today's critic | 0.250 | 0.500 |" in page
    assert verdict(JUDGED) in page and "| gold_nats | 4.235 |" in page
    assert not any(line.startswith(("| echo", "| step")) for line in page)  # columns with a value alone
    rows = ("output ", "observation ", "target ")
    said = [line.split(maxsplit=1) for line in page if line.startswith(rows)]
    assert said == [["output", "a⟦b⟧"], ["observation", "ac"], ["target", "ac"],
                    ["output", "⟦bb⟧"], ["observation", "ac"], ["target", "⟦b∅⟧"]]
    page = report_page("003", row, ["probe", "entropy"], [], JUDGED, texts, LETTERS)
    assert "the watch alarmed on probe, entropy" in page and "No stream has left its usual range." in page


def test_the_verdict_names_who_changed():
    judged = lambda old_on_new, new_on_old: {("then", "then"): 1.0, ("then", "now"): old_on_new,
                                             ("now", "then"): new_on_old, ("now", "now"): 0.5}
    assert verdict(judged(0.2, 0.99)).startswith("Exploit")
    assert verdict(judged(0.99, 0.2)).startswith("Drift")
    assert verdict(judged(0.2, 0.2)).startswith("Both")
    assert verdict(judged(0.99, 0.99)).startswith("Neither")


def test_tokens_that_differ_are_marked():
    assert marked(LETTERS, [97, 98, 99, 10], [97, 0, 0, 10]) == "a⟦bc⟧⏎"
    assert marked(LETTERS, [97, 98], [97, 0]) == "a⟦b⟧"
    assert marked(LETTERS, [None, 98, None], [97, 98, 99]) == "⟦∅⟧b⟦∅⟧"
