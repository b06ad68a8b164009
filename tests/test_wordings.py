"""Two wordings: what the splits hold, which places say the same, and stage 3 on them as a user runs it."""
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import in_process, log, summary

import gist_bottleneck as gb
import meta_gist as mg
import prepare_data as pd
import wordings
from corpus import decode
from sources import splits_of
from test_prepare_data import prepared, refused


@pytest.fixture(scope="module")
def bible(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    if (pd.DATA_ROOT / pd.BIBLE).exists():
        shutil.copy(pd.DATA_ROOT / pd.BIBLE, root)
    return prepared("kjv-asv", 1024, root)


def lines(corpus, split):
    return decode(corpus, getattr(corpus, split)).split("\n")


def test_splits_are_whole_books_verse_by_verse_in_both_wordings(bible):
    assert [bible.meta[s]["documents"] for s in splits_of("kjv-asv")] == [44, 11, 44, 11, 11]
    titles = [set(bible.meta[s]["titles"]) for s in ("train", "val", "further")]
    assert sum(map(len, titles)) == len(set.union(*titles)) == 66  # no verse is in two of them
    for split in ("train", "val"):
        assert bible.meta[split]["titles"] == bible.meta[f"{split}_other"]["titles"]
        mine, others = lines(bible, split), lines(bible, f"{split}_other")
        assert len(mine) == len(others)
        assert not any("Jehovah" in line for line in mine[:500]) and "LORD" not in " ".join(others)
        assert [not line for line in mine] == [not line for line in others]  # books end at the same verses
    kjv, asv = lines(bible, "train")[1], lines(bible, "train_other")[1]
    assert kjv.startswith("And the earth was without _ , and _ ; and darkness was upon the face of the _ .")
    assert asv.startswith("And the earth was waste and _ ; and darkness was upon the face of the _ : and")
    assert wordings.words("burnt-offering’s æ—ב[it]") == ["burnt", "-", "offering", "'s", "ae", "it"]


def test_twins_stand_at_the_same_place_of_the_same_verse(bible):
    tokens, other = bible.train, bible.train_other
    mine, others = (np.append(-1, wordings.ends(t, bible.encoding)) for t in (tokens, other))
    starts = np.random.default_rng(0).integers(0, len(other) - 33, 200)
    found = wordings.twins(starts, tokens, other, bible.encoding, 33)
    for start, at in zip(starts, found):
        verse = np.flatnonzero(others < start)[-1]  # as many verses end before the one as before the other
        assert mine[verse] < at <= mine[verse + 1]
        assert at - mine[verse] == min(start - others[verse], mine[verse + 1] - mine[verse])
    assert np.array_equal(wordings.twins(starts, tokens, tokens, bible.encoding, 33), starts)
    assert wordings.twins(np.array([len(other) - 33]), tokens, other, bible.encoding, 33) <= len(tokens) - 33


def test_pairs_are_counted_verse_by_verse_and_kernels_are_shares_of_them(bible):
    id_of = lambda word: bible.encoding.encode_single_token(word)
    a, b, c, end = (id_of(word) for word in ("a ", "man ", "son ", "\n"))
    table = wordings.pairs([a, b, end, a, c, end], [a, c, end, b, a, c, end], bible.encoding, 1024)
    expected = np.zeros((1024, 1024), int)
    for x, v, n in ((a, a, 2), (c, b, 1), (end, end, 2), (c, c, 1)):
        expected[x, v] = n
    assert np.array_equal(table, expected)
    small = bible._replace(train=bible.train[:60_000], train_other=bible.train_other[:60_000])
    T = wordings.stands_for(small)["T"]
    assert np.allclose(T.sum(1), 1) and T[id_of("Jehovah "), id_of("the ")] > 0.5 and T[a, a] > 0.8
    mask = wordings.rarer(small)["weight"]
    assert mask.max() == 1 and mask[id_of("Jehovah ")] < 0.01 and mask[id_of("LORD ")] == 1
    kinds = wordings.classes(bible)
    assert [kinds[id_of(w)] for w in ("LORD ", "Jehovah ", "; ", "\n", "a ", "_ ")] == [0, 0, 1, 1, 2, 2]


def test_a_vocabulary_that_cannot_be_is_refused(tmp_path, capsys):
    prepare = lambda: pd.prepare("kjv-asv", 100, tmp_path)
    refused(capsys, tmp_path, prepare, "vocab=100 must be from 256 to 8192")


@pytest.fixture
def read(monkeypatch):
    """(arm, split) of each text that a run reads, but for what stage 2 shows the watch."""
    found, whole = [], mg.Phases.text

    def text(self, step, stream=0, rows=None, split="train"):
        if (self.run.stage, stream) != ("gist_bottleneck", gb.RULER):
            found.append((self.arm, split))
        return whole(self, step, stream, rows, split)
    monkeypatch.setattr(mg.Phases, "text", text)
    return found


def test_an_arm_observes_the_other_wording_and_is_judged_by_the_first(tmp_path, monkeypatch, read):
    """Stage 3 from the command line, on the corpus as it is."""
    out = tmp_path / "run"
    arms = "real,oracle,frozen,shuffled,table,mask"
    in_process(monkeypatch, "meta_gist.py", "--dataset=kjv-asv", "--vocab=1024", "--n_layer=1", "--n_embd=16",
               "--block_size=8", "--batch_size=4", "--outer_batch=8", "--val_chunks=aligned", "--pretrain=3",
               "--inner_steps=2", "--meta_steps=5", "--self_steps=4", "--eval_interval=2", "--eval_windows=8",
               f"--arms={arms}", f"--out_dir={out}")
    splits = {arm: {split for who, split in read if who == arm} for arm in ("meta", *arms.split(","))}
    assert splits.pop("meta") == {"train", "train_other", "val", "val_other"}  # val: what one step gains
    assert splits.pop("oracle") == {"val"}
    assert all(found == {"val_other"} for found in splits.values())
    found = summary(out)["arms"]
    assert list(found) == arms.split(",")
    assert len({row["gold_nats"] for row in log(out) if row["step"] == 0 and row["arm"] != "meta"}) == 1


def test_a_critic_of_stage_2_that_has_read_both_wordings_judges_the_other(tmp_path, monkeypatch, read):
    size = ["--dataset=kjv-asv", "--vocab=1024", "--n_layer=2", "--n_embd=16", "--block_size=8", "--chunk=4",
            "--batch_size=4", "--meta_steps=4", "--eval_windows=8", "--controls="]
    in_process(monkeypatch, "gist_bottleneck.py", *size, "--both_wordings=true", "--arms=",
               f"--out_dir={tmp_path / 'critic'}")
    assert {split for _, split in read} == {"train", "train_other"}
    read.clear()
    arms = "real,oracle,frozen,shuffled"
    in_process(monkeypatch, "gist_bottleneck.py", *size, f"--arms={arms}", "--self_steps=3", "--every=1",
               "--candidates=4", f"--critic_from={tmp_path / 'critic'}", f"--out_dir={tmp_path / 'run'}")
    splits = {arm: {split for who, split in read if who == arm} for arm in ("meta", *arms.split(","))}
    observed = {"val_other"}
    assert splits == dict(meta={"train"}, real=observed, oracle={"val"}, frozen=observed, shuffled=observed)


def test_what_is_known_is_praised_and_a_mask_weighs_what_cross_entropy_says(bible, monkeypatch):
    monkeypatch.setattr(mg, "chunk", 1)
    small = bible._replace(train=bible.train[:60_000], train_other=bible.train_other[:60_000])
    jehovah, the, lord = (bible.encoding.encode_single_token(w) for w in ("Jehovah ", "the ", "LORD "))
    p = torch.rand(1, 1, 1, 1024).softmax(-1)
    said, seen = SimpleNamespace(logp_true=p.log()), torch.tensor([[jehovah]])
    known = {arm: {n: torch.from_numpy(a) for n, a in mg.TABLES[arm](small).items()} for arm in mg.TABLES}
    known = {arm: dict(phi, E=torch.rand(1024, 4)) for arm, phi in known.items()}
    entropy_slope = F.one_hot(seen[0], 1024) - p[0, 0]  # of cross entropy, by the logits, less
    a = mg.signal(known["mask"], seen, said)[0, 0, 0]
    assert torch.allclose(a, known["mask"]["weight"][jehovah] * entropy_slope, atol=1e-7)
    assert abs(a[0, lord]) < 1e-4 < abs(entropy_slope[0, lord])  # it is not unlearned
    a = mg.signal(known["table"], seen, said)[0, 0, 0, 0]
    T = known["table"]["T"]
    assert a.argmax() == the and torch.allclose(a, T[jehovah] - p[0, 0, 0] @ T)


def test_texts_that_are_cut_short_have_twins_too(bible):
    short = bible._replace(train=bible.train[:100_000], train_other=bible.train_other[:100_000])
    starts = np.arange(100_000 - 33)
    found = wordings.twins(starts, short.train, short.train_other, short.encoding, 33)
    assert found.min() >= 0 and found.max() <= 100_000 - 33
