"""What a network knows, where it is known what there is to know."""
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import small_gpt

import planted
import prepare_data
from corpus import decode, open_corpus
from gists import layout
from studies import probe

def test_a_tokens_nearest_are_counted_by_how_often_it_occurs():
    E = torch.tensor([[1, 0, 0], [1, .1, 0], [0, 1, 0], [0, 0, 1], [0, 1, .1], [0, .1, 1.]])
    classes = np.arange(6) // 2  # 0 and 1 are alike; 2 and 4; 3 and 5
    assert probe.share_alike(E, classes, np.array([3, 1, 1, 1, 1, 1])) == 4 / 8
    only = np.array([0, 0, 1, 1, 0, 0])  # what does not occur is nobody's neighbour
    assert probe.share_alike(E, classes, only) == 1


def test_the_synonyms_of_a_network_to_which_they_are_one_are_found(monkeypatch):
    model = small_gpt(vocab=32, special=2).float()
    sizes = dict(vocab=32, n_gist=1, n_layer=2, n_head=2, n_embd=16, chunk=4, block_size=16)
    corpus = SimpleNamespace(encoding=SimpleNamespace(spellings=4), vocab_size=32,
                             val=np.random.default_rng(0).integers(32, size=200))
    state = dict(config=sizes, snapshot=dict(learner=model.state_dict()))
    monkeypatch.setattr(probe, "set_up", lambda folder: (state, corpus, layout(16, 4, 1, 32, "cpu")))
    assert max(probe.alike("run").values()) < 0.3  # all is random; a token is not its own synonym
    table = state["snapshot"]["learner"]["embed.weight"]
    table[:32] = table[:32:4].repeat_interleave(4, 0)
    assert probe.alike("run") == dict(gists=1, forecasts=1, embeddings=1)


def test_questions_end_at_the_answer_of_a_fact_that_stands_far_before(tmp_path, monkeypatch):
    monkeypatch.setattr(planted, "TOKENS", dict(train=60_000, val=1_000))
    prepare_data.prepare("planted-facts", 512, tmp_path)
    corpus = open_corpus("planted-facts", 512, tmp_path)
    asked = probe.questions(corpus.train, corpus, 16)
    lags = -np.diff(planted.planted_answers(corpus.train, corpus))
    assert (lags < 2000).sum() > 20 and asked.shape == ((lags >= 2000).sum(), 17)  # no other is asked
    text = decode(corpus, corpus.train)
    for row in asked[::50].tolist():
        *_, where, _, name, _, _, thing, _, place = decode(corpus, row).split()
        assert where == "where" and f"{name} keeps the {thing} in {place} ." in text
    knows = lambda x: F.one_hot(asked[:, 1:], 512).float()
    assert probe.answered(knows, asked)[0] == 1
    right, nats = probe.answered(lambda x: torch.zeros(*x.shape, 512), asked)  # sure of nothing
    assert right < 0.1 and nats == pytest.approx(math.log(512))


def test_a_folder_that_is_no_run_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["probe.py", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        probe.main()
    assert stop.value.code == 2 and "is no run with a log.jsonl" in capsys.readouterr().err
