"""The figure of verses, from a run that the script has just made."""
import sys

import pytest
from conftest import in_process

from corpus import decode


def test_verses_are_drawn_of_a_run_on_two_wordings_and_of_no_other(tmp_path, monkeypatch, capsys):
    from studies import verses
    small = ("--n_layer=1 --n_embd=16 --block_size=16 --batch_size=4 --outer_batch=4 --pretrain=2 "
             "--meta_steps=3 --self_steps=2 --eval_interval=2 --eval_windows=4 --inner_steps=2").split()
    two = "--dataset=kjv-asv --vocab=1024 --arms=oracle,frozen --chunk=1".split()
    in_process(monkeypatch, "meta_gist.py", *two, *small, f"--out_dir={tmp_path / 'run'}")
    monkeypatch.setattr(sys, "argv", ["verses.py", str(tmp_path / "run")])
    verses.main()
    assert (tmp_path / "run" / "verses.png").stat().st_size > 10_000
    state, corpus = verses.read_run(tmp_path / "run")
    (start, length), *more = verses.verses(corpus)
    assert len(more) == 3
    rows = verses.heard(state, corpus, start, length)
    text = decode(corpus, corpus.val_other[start:start + length]).split()
    assert [word for word, _ in rows["observed"]][:-1] == text and rows["observed"][-1][0] == "¶"
    in_process(monkeypatch, "meta_gist.py", "--arms=frozen", *small, f"--out_dir={tmp_path / 'plays'}")
    monkeypatch.setattr(sys, "argv", ["verses.py", str(tmp_path / "plays")])
    with pytest.raises(SystemExit) as stop:
        verses.main()
    assert stop.value.code == 2 and "one of meta_gist.py on kjv-asv is needed" in capsys.readouterr().err
