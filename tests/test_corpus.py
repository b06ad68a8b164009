"""Batches are pure functions of a seed and a step, of one file or of many; a lock is held by one process."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import corpus
import locks
import prepare_data
import sources
from corpus import DTYPE, Shards, corpus_id, get_batch, joined, open_corpus, val_windows
from locks import lock


def test_the_ranks_together_read_the_same_batch_whatever_their_number():
    tokens = np.arange(10_000, dtype=np.uint16)
    whole = get_batch(tokens, 1, 7, 8, 33)
    assert whole.shape == (8, 33) and whole.dtype == torch.int64
    for ranks in (1, 2, 4):
        parts = [get_batch(tokens, 1, 7, 8, 33, rank, ranks) for rank in range(ranks)]
        assert torch.equal(torch.cat(parts), whole)


def test_a_batch_depends_on_seed_stream_and_step_alone():
    tokens = np.arange(10_000, dtype=np.uint16)
    first = {step: get_batch(tokens, 1, step, 8, 33) for step in range(5)}
    np.random.seed(0), torch.manual_seed(0)
    for step in (4, 3):  # a resumed run begins anywhere
        assert torch.equal(get_batch(tokens, 1, step, 8, 33), first[step])
    others = [get_batch(tokens, 2, 0, 8, 33), get_batch(tokens, 1, 0, 8, 33, stream=1)]
    assert len({tuple(batch[:, 0].tolist()) for batch in [first[0], first[1], *others]}) == 4


def test_windows_are_contiguous_and_reach_both_ends():
    tokens = np.arange(100, dtype=np.uint16)
    drawn = torch.cat([get_batch(tokens, 0, step, 64, 90) for step in range(10)])
    assert torch.equal(drawn - drawn[:, :1], torch.arange(90).expand(640, -1))
    assert set(drawn[:, 0].tolist()) == set(range(11))
    assert val_windows(tokens, 4, 10)[:, 0].tolist() == [0, 30, 60, 90]
    assert torch.equal(val_windows(tokens, 1, 100)[0], torch.arange(100))


def test_impossible_batches_are_value_errors():
    tokens = np.arange(100, dtype=np.uint16)
    for call in (lambda: get_batch(tokens, 0, 0, 8, 101), lambda: get_batch(tokens, 0, 0, 8, 10, 0, 3),
                 lambda: val_windows(tokens, 4, 101)):
        with pytest.raises(ValueError, match="must be"):
            call()


# ---- several files

@pytest.fixture
def shards():
    """(a plain array, the same in three files as Shards)."""
    whole = np.random.default_rng(0).integers(65536, size=1000).astype(DTYPE)
    return whole, joined([whole[:400], whole[400:800], whole[800:]])


def test_shards_are_read_as_the_array_that_they_are(shards):
    whole, parts = shards
    assert isinstance(parts, Shards) and len(parts) == 1000 and np.array_equal(parts, whole)
    for start, stop in ((None, None), (None, 0), (0, 400), (399, 401), (400, 800), (10, 990), (-5, None),
                        (2000, 3000)):
        cut = parts[start:stop]
        assert len(cut) == len(whole[start:stop])
        assert np.array_equal(cut.astype(np.int64), whole[start:stop])
        assert np.array_equal(cut, whole[start:stop])
    assert isinstance(parts[400:800], np.ndarray) and np.shares_memory(parts[400:800], whole)
    assert list(parts[395:405]) == whole[395:405].tolist()
    for index in (7, np.array([999, 0, 400, 399]), np.arange(24).reshape(2, 3, 4) * 41, np.array([], int)):
        assert np.array_equal(parts[index], whole[index]) and parts[index].dtype == DTYPE
    for wrong in (1000, np.array([0, -1]), slice(0, 10, 2)):
        with pytest.raises((IndexError, TypeError)):
            parts[wrong]


def test_batches_windows_and_counts_of_shards_are_those_of_one_file(shards):
    whole, parts = shards
    for step in range(3):
        assert torch.equal(get_batch(parts, 1, step, 64, 450), get_batch(whole, 1, step, 64, 450))
    assert torch.equal(val_windows(parts, 9, 300), val_windows(whole, 9, 300))
    assert np.array_equal(np.bincount(parts[:950]), np.bincount(whole[:950]))


def in_shards(monkeypatch, tmp_path, size):
    """A text as bytes in files of `size` tokens, and in one: two Corpora."""
    path = tmp_path / "book.txt"
    path.write_text("".join(f"{i} of {i * i % 97}\n" for i in range(3000)))
    one = prepare_data.prepare(str(path), 256, tmp_path / "one")
    monkeypatch.setattr(prepare_data, "SHARD_TOKENS", size)
    return prepare_data.prepare(str(path), 256, tmp_path / "many"), one


def test_a_split_of_many_tokens_is_several_files_and_a_small_one_is_one(monkeypatch, tmp_path, capsys):
    many, one = in_shards(monkeypatch, tmp_path, 10_000)
    n = len(one.train)
    assert sorted(p.name for p in many.folder.glob("*.bin")) == [
        *(f"train-{i:03}.bin" for i in range(-(-n // 10_000))), "val.bin"]
    files = sorted(many.folder.glob("train-*"))
    assert b"".join(p.read_bytes() for p in files) == (one.folder / "train.bin").read_bytes()
    assert np.array_equal(many.train, one.train) and np.array_equal(many.val, one.val)
    assert corpus_id(many)[0] == corpus_id(one)[0] and corpus_id(many)[1] != corpus_id(one)[1]
    last = many.folder / "train-001.bin"
    for damage, word in ((last.read_bytes()[::-1], "was altered"), (b"12", "has 2 bytes, not 20,000")):
        last.write_bytes(damage)
        with pytest.raises(SystemExit):
            open_corpus(str(tmp_path / "book.txt"), 256, tmp_path / "many")
        assert f"train-001.bin {word}" in capsys.readouterr().err


def test_of_a_split_and_a_text_above_the_limit_the_size_alone_is_checked(monkeypatch, tmp_path):
    many, one = in_shards(monkeypatch, tmp_path, 10_000)
    hashed = []
    for module in corpus, sources:
        monkeypatch.setattr(module, "HASH_BYTES", 25_000)  # a file of 20,000 is below, the split is not
        monkeypatch.setattr(module, "hash_files", lambda files, known=sources.hash_files: (
            hashed.extend(f.name for f in files) or known(files)))
    prepare_data.prepare(str(tmp_path / "book.txt"), 256, tmp_path / "many")
    assert hashed == ["tokenizer.json", "val.bin"]
    with open(tmp_path / "book.txt", "a") as f:
        f.write("more")
    with pytest.raises(SystemExit):
        prepare_data.prepare(str(tmp_path / "book.txt"), 256, tmp_path / "many")


# ---- locks

def test_a_lock_is_held_by_one_until_its_file_is_closed(tmp_path):
    with open(tmp_path / "lock", "w") as first, open(tmp_path / "lock", "w") as second:
        lock(first, wait=False)
        with pytest.raises(OSError):
            lock(second, wait=False)
        first.close()
        lock(second, wait=False)


def test_windows_waits_for_a_lock_as_long_as_it_takes(tmp_path, monkeypatch):
    tries = []

    def locking(*args):
        tries.append(args)
        if len(tries) < 3:
            raise PermissionError
    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(locks, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2), raising=False)
    monkeypatch.setattr(locks.time, "sleep", lambda s: None)
    with open(tmp_path / "lock", "a") as file:
        with pytest.raises(OSError):
            lock(file, wait=False)
        lock(file, wait=True)
    assert tries == [(tries[0][0], 2, 1)] * 3
