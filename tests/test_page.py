"""A run's one page."""
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.image import imread

import page
import test_gist_bottleneck
import test_meta_gist
import test_phases
from chart import chart, ticks
from conftest import in_process
from page import command, read, verdict, write_page
from run import Run

SETTINGS = {"self_ce": [*test_phases.SMALL, "--arms=real,frozen"],
            "gist_bottleneck": [*test_gist_bottleneck.SMALL, "--arms=real,frozen"],
            "meta_gist": [*test_meta_gist.SMALL, "--arms=real,frozen"]}
BROWSERS = "chromium", "chromium-browser", "google-chrome"
FRAME = '<iframe style="border: 0; width: 380px; height: 1000px" srcdoc="{}"></iframe>'  # as wide as a phone
# Moves each slider, and tells how much of a page is beyond the right edge.
TELL = """<script>onload = () => {
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, root = page.documentElement;
    for (const slider of page.querySelectorAll("input")) {
      slider.value = 0;
      slider.dispatchEvent(new Event("input"));
    }
    const first = page.querySelector("output").textContent;
    console.log("BEYOND", root.scrollWidth - root.clientWidth, "FIRST", first);
  }
}</script>"""


class Balanced(HTMLParser):
    """Every tag that is opened is closed, in order; collects what is referred to, and the text."""
    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        self.open += [tag] * (tag not in ("meta", "link", "input", "br", "!doctype"))

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{stage: the folder of a tiny run of it}."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for stage, settings in SETTINGS.items():
            found[stage] = folder / stage
            in_process(monkeypatch, f"{stage}.py", *settings, f"--out_dir={found[stage]}")
    return found


@pytest.mark.parametrize("stage", SETTINGS)
def test_the_page_of_a_run_is_whole_and_loads_nothing(runs, stage):
    text = (runs[stage] / "report.html").read_text(encoding="utf-8")
    found = Balanced(text)
    assert all(not link.startswith(("http", "//")) for link in found.loads)
    assert not re.search(r"url\((?!#frame\))|@import", text)
    for told in ("real: never hacked", "frozen: ", "gold: held-out nats", "Embeddings of", f" {stage}.py "):
        assert told in found.text, told
    assert "kappa" in found.text or stage != "meta_gist"
    texts = json.loads(re.search(r'id="texts">(.*?)</script>', text)[1])
    assert list(texts) == ["real", "frozen"]
    assert all([said["step"] for said in both] in ([0, 4], [0, 6], [0, 12]) for both in texts.values())
    assert (runs[stage] / "samples.txt").read_text(encoding="utf-8").startswith("Text to come")


def test_the_command_repeats_the_run_and_is_quoted(runs):
    stage, settings, *_ = read(runs["self_ce"])
    words = command(runs["self_ce"], stage, dict(settings, dataset="my text's.txt", compile=True))
    assert words[:2] == ["python", "self_ce.py"] and "'--dataset=my text'\"'\"'s.txt'" in words
    assert "--compile=true" in words and "--n_embd=32" in words and not any("n_layer" in w for w in words)


def test_text_that_looks_like_html_stays_text(runs, tmp_path, monkeypatch):
    out = shutil.copytree(runs["self_ce"], tmp_path / "<b>&run")
    tokens = [["</script><script>", "<!--", "&lt;", "same"]]
    monkeypatch.setattr(page, "texts_of", lambda *a: {"real": [dict(step=0, tokens=tokens)]})
    monkeypatch.setattr(page, "spell", lambda encoding, ids: "<script>alert(1)</script>")
    text = write_page(out).read_text(encoding="utf-8")
    found = Balanced(text)
    assert text.count("<script") == 2
    assert "<script>alert(1)</script>" in found.text and "<b>&run" in found.text
    assert json.loads(re.search(r'id="texts">(.*?)</script>', text)[1])["real"][0]["tokens"] == tokens


def test_an_interrupted_run_has_a_page_of_what_there_is(runs, tmp_path, capsys):
    out = shutil.copytree(runs["self_ce"], tmp_path / "run")
    whole = json.loads((out / "summary.json").read_text(encoding="utf-8"))["arms"]
    (out / "summary.json").unlink()
    log = (out / "log.jsonl").read_text(encoding="utf-8")
    _, _, _, arms, done = read(out)
    numbers = lambda arm: [arm[k] for k in ("gold_start", "gold_best", "gold_end", "proxy_end", "recovered")]
    assert not done and list(arms) == list(whole)
    assert all(numbers(arms[name]) == pytest.approx(numbers(whole[name]), rel=1e-4) for name in whole)
    lines = log.splitlines(keepends=True)
    (out / "log.jsonl").write_text("".join(lines[:-2]) + lines[-2][:20], encoding="utf-8")  # killed in frozen
    text = Balanced(write_page(out).read_text(encoding="utf-8")).text
    assert "the log ends in frozen at step 4 of 12" in text and f"--resume={out}" in text
    assert read(out)[3]["frozen"]["recovered"] is None
    state = torch.load(out / "ckpt.pt", weights_only=True)
    torch.save(dict(state, snapshot=None), out / "ckpt.pt")
    for rows in ("".join(lines[:1]), ""):  # in the meta phase, and before its first row
        (out / "log.jsonl").write_text(rows, encoding="utf-8")
        (out / "texts.jsonl").write_text("", encoding="utf-8")
        assert "ends in meta at step 0" in Balanced(write_page(out).read_text(encoding="utf-8")).text
    with pytest.raises(SystemExit) as stop:
        write_page(tmp_path)
    assert stop.value.code == 2 and "is no run" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError(), SystemExit(2)])
def test_a_page_that_cannot_be_written_costs_a_line_and_not_the_run(tmp_path, error):
    told = []

    def write(folder):
        raise error
    run = SimpleNamespace(first=True, out_dir=tmp_path, script=Path("self_ce.py"), sources=([], ""),
                          device=torch.device("cpu"), ranks=1, seconds=lambda: 1, say=told.append,
                          write_json=lambda *a: told.append("summary"),
                          close=lambda arms: told.append("closed"))
    Run.finish(run, dict(arms={}), lambda folders: ("curves.png", ""), write)
    assert told[0] == "summary" and told[-1] == "closed" and len(told) == 4
    assert told[2] == f"no page was drawn ({type(error).__name__}); try python page.py {tmp_path}"


def test_a_verdict_names_its_control():
    arm = dict(gold_start=2.0, gold_end=1.5, steps_to_hack=None, alarms=[], recovered=1.0)
    hacked = dict(arm, gold_end=19.4, steps_to_hack=20, alarms=[10, 90], recovered=-35.0)
    arms = dict(real=arm, frozen=dict(arm, recovered=0.99), self=hacked, shuffled=dict(hacked, gold_end=2.5))
    assert verdict("frozen", arms) == (
        "learned on as from real text: 0.99 of what real targets gained, never hacked, no alarm (controls "
        "real: gold ended 0.50 nats below its start, never hacked; shuffled: gold ended 0.50 nats above its "
        "start, hacked at step 20).")
    assert verdict("self", arms).startswith(
        "hacked at step 20, alarm at 10; gold ended 17.40 nats above its start (controls real: ")
    assert "the ceiling" in verdict("real", arms)
    assert "believe no hack here" in verdict("self", dict(self=dict(hacked, recovered=None)))


def test_a_curve_that_leaves_through_the_top_is_marked_where_it_does():
    curves = dict(a=("red", "none", [(0, 0.0), (10, 4.0)]), b=("blue", "none", [(0, 0.0), (10, 1.0)]))
    text = chart("t", curves, (0.0, 2.0), [("b", 10, "✕"), ("a", 10, "✕")])
    assert re.findall(r'class="mark" x="([\d.]+)" y="([\d.]+)"[^>]*>(.)<', text) == [
        ("164.0", "14.0", "▲"), ("290.0", "98.0", "✕")]
    assert "a ▲</text>" in text and ">b</text>" in text and Balanced(text)
    assert Balanced(chart("flat", {"a": ("red", "none", [(0, 1.0)])}))
    assert ticks(0, 100) == [0, 50, 100] and ticks(0.0, 0.004)[1] == pytest.approx(0.002)
    long = chart("t", {"a": ("red", "none", [(x, x) for x in range(10_000)])})
    assert long.count(",") < 400


def test_a_phone_shows_it_without_sideways_scrolling_or_errors(runs, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser:
        pytest.skip("no browser")
    pages = [(folder / "report.html").read_text(encoding="utf-8") for folder in runs.values()]
    frames, picture = tmp_path / "frames.html", tmp_path / "phone.png"
    body = "".join(FRAME.format(html.escape(text)) for text in pages) + TELL
    frames.write_text(f'<body style="margin: 0; display: flex">{body}', encoding="utf-8")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}",
               "--window-size=1140,1000", f"--screenshot={picture}")
    done = subprocess.run([browser, *options, frames.as_uri()], capture_output=True, timeout=60)
    told = re.findall(r'CONSOLE.*?"(.*)", source', done.stderr.decode("utf-8", "replace"))
    assert told == ["BEYOND 0 FIRST step 0"] * 3
    seen = imread(picture)[..., :3]
    assert all(seen[:, left:left + 380].std() > 0.05 for left in (0, 380, 760))
