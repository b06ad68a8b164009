"""
The reader that the experiments share: tokens on disk, checked; a batch is a pure function of a step.

A corpus is a folder data/<name>-<vocab>/, which prepare_data.py makes:

    train.bin, val.bin                   token ids, two bytes each; more splits, of a text in two wordings
    train-000.bin, train-001.bin, ...    instead of train.bin, of a split of more than 100 M tokens
    tokenizer.json                       the tokens in base64, by rank
    meta.json                            where the text comes from, counts, the sha256 of each file
"""
import base64
import json
import mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch

import planted
from configurator import refuse
from sources import DATA_ROOT, HASH_BYTES, hash_files, is_text_of, locate, source_of, splits_of, stream_tokens

DTYPE = np.dtype("<u2")           # every id of the largest vocabulary fits
shard = "{}-{:03}.bin".format     # ("train", 0): the name of a file


def files_of(split, meta):
    """[(name, sha256 or None, bytes)] of the files of a split. ValueError: meta.json tells what cannot be."""
    tokens, sha256 = meta[split]["tokens"], meta[split]["sha256"]
    one = isinstance(sha256, str)
    hashes, size = ([sha256], tokens) if one else (sha256, meta["shard_tokens"])
    if type(tokens) is not int or not 0 < tokens < 2**48 or len(hashes) != -(-tokens // size):
        raise ValueError(f"tokens of {split}")
    hashes = hashes if tokens * DTYPE.itemsize <= HASH_BYTES else [None] * len(hashes)
    return [(f"{split}.bin" if one else shard(split, i), x, DTYPE.itemsize * min(size, tokens - i * size))
            for i, x in enumerate(hashes)]


class Shards:
    """Token ids in several files, read as one array: uint16 [n]. A slice is a view, as numpy's are."""

    def __init__(self, parts):
        self.parts, self.starts = parts, np.cumsum([0] + [len(part) for part in parts])

    def __len__(self):
        return int(self.starts[-1])

    def __array__(self, dtype=None, copy=None):
        return np.concatenate(self.parts).astype(dtype or DTYPE, copy=False)

    astype = __array__

    def __getitem__(self, index):
        """Of a slice without a step, or of whole numbers [...] from 0 on. IndexError: beyond the end."""
        if isinstance(index, slice) and index.step in (None, 1):
            start, stop, _ = index.indices(len(self))
            parts = [part[max(start - at, 0):max(stop - at, 0)] for part, at in zip(self.parts, self.starts)]
            return joined([part for part in parts if len(part)] or parts[:1])
        index, flat = np.asarray(index), np.ravel(index)
        if len(flat) and not 0 <= flat.min() <= flat.max() < len(self):
            raise IndexError(f"from {flat.min()} to {flat.max()} is beyond the {len(self)} tokens")
        which = np.searchsorted(self.starts, flat, side="right") - 1
        order = np.argsort(which, kind="stable")  # by file, so that each is read once
        pieces = np.split(flat[order], np.searchsorted(which[order], np.arange(1, len(self.parts))))
        found = np.empty(len(flat), DTYPE)
        found[order] = np.concatenate([p[i - at] for p, i, at in zip(self.parts, pieces, self.starts)])
        return found.reshape(index.shape)[()]


def joined(parts):
    """Arrays of token ids as one: the only one of them, or Shards."""
    return parts[0] if len(parts) == 1 else Shards(parts)


def map_files(paths):
    """Files of token ids as one array."""
    parts = [np.memmap(path, DTYPE, "r") for path in paths]
    for part in parts if len(parts) > 1 and hasattr(mmap, "MADV_RANDOM") else ():  # not on Windows
        part.base.madvise(mmap.MADV_RANDOM)  # else much is read beyond each window: 14 times as long a batch
    return joined(parts)


# ---- the tokenizer: JSON on disk, tiktoken.Encoding in use

def make_encoding(tokenizer):
    """The tiktoken.Encoding of the content of a tokenizer.json."""
    ranks = {base64.b64decode(token): rank for rank, token in enumerate(tokenizer["mergeable_ranks"])}
    end = tokenizer["end_of_text"]
    encoding = planted.Spelled(tokenizer["name"], pat_str=tokenizer["pattern"], mergeable_ranks=ranks,
                               special_tokens={} if end is None else {"<|endoftext|>": end})
    encoding.spellings = tokenizer.get("spellings", 1)
    return encoding


def decode(corpus_or_encoding, ids):
    """The text of an iterable of token ids; what is not UTF-8 becomes U+FFFD. KeyError: no such id."""
    encoding = getattr(corpus_or_encoding, "encoding", corpus_or_encoding)
    return encoding.decode([int(i) for i in ids], errors="replace")


# ---- the corpus

class Corpus(NamedTuple):
    train: np.memmap | Shards   # uint16 [tokens of the training split]
    val: np.memmap | Shards     # uint16 [tokens of the validation split]
    encoding: tiktoken.Encoding
    vocab_size: int
    token_bytes: np.ndarray     # int64 [vocab_size], UTF-8 bytes of each token; 0 for <|endoftext|>
    meta: dict                  # the content of meta.json
    folder: Path
    train_other: np.memmap | Shards  # uint16, train and val in other words; themselves, where there are none
    val_other: np.memmap | Shards
    further: np.memmap = None   # uint16, more text; of kjv-asv alone


def check_file(path, size, sha256, remedy):
    """Refuses a file that has not `size` bytes (None: any but 0) or not this sha256 (None: any)."""
    has = path.stat().st_size if path.is_file() else 0
    if size is not None and has != size:
        refuse(f"{path} has {has:,} bytes, not {size:,}; {remedy}")
    if not has or sha256 is not None and hash_files([path]) != sha256:
        refuse(f"{path} was altered: its sha256 is not the one in meta.json; {remedy}")


def open_corpus(dataset, vocab, root=DATA_ROOT):
    """The Corpus in root/<name>-<vocab>. Of every file the size is checked, up to 256 MiB a split the sha256.

    Refuses (SystemExit 2) a folder that is missing, damaged, or of another source or tokenizer. A text that
    was moved is known by its bytes.
    """
    folder, source, command = locate(dataset, vocab, root)
    remedy = f"delete the folder and {command}"
    if not folder.exists():
        refuse(f"{folder} does not exist; {command}")
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        files = {split: files_of(split, meta) for split in splits_of(meta["dataset"])}
        made_from, holds, tokenizer_sha256 = (meta[k] for k in ("source", "vocab", "tokenizer_sha256"))
    except (OSError, ArithmeticError, ValueError, KeyError, TypeError, RecursionError) as error:
        refuse(f"{folder / 'meta.json'} is unreadable ({type(error).__name__}); {remedy}")
    if made_from != source and source_of(dataset) is None and Path(source).exists():
        made_from = source if is_text_of(meta, dataset, source) else made_from  # moved
    if made_from != source or holds != vocab or meta.get("stream_tokens") != stream_tokens(dataset):
        refuse(f"{folder} was made from {made_from}, vocab={holds}; rename your text, or {remedy}")
    for name, sha256, size in sum(files.values(), [("tokenizer.json", tokenizer_sha256, None)]):
        check_file(folder / name, size, sha256, remedy)
    tokens = {split: map_files([folder / name for name, _, _ in files[split]]) for split in files}
    tokens = {"train_other": tokens["train"], "val_other": tokens["val"], **tokens}
    try:
        tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
        encoding = make_encoding(tokenizer)
        sizes = [len(base64.b64decode(token)) for token in tokenizer["mergeable_ranks"]]
        token_bytes = np.zeros(vocab, dtype=np.int64)
        token_bytes[:len(sizes) * encoding.spellings] = np.repeat(sizes, encoding.spellings)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        refuse(f"{folder / 'tokenizer.json'} is unreadable ({type(error).__name__}); {remedy}")
    return Corpus(encoding=encoding, vocab_size=vocab, token_bytes=token_bytes, meta=meta, folder=folder,
                  **tokens)


def corpus_id(corpus):
    """What tells a corpus and its tokenizer from all others: the hashes in its meta.json."""
    meta = corpus.meta
    return [meta["tokenizer_sha256"], *(meta[split]["sha256"] for split in splits_of(meta["dataset"]))]


def windows(tokens, starts, length):
    return torch.from_numpy(tokens[starts[:, None] + np.arange(length)].astype(np.int64))


def last_start(tokens, length):
    if not 0 < length <= len(tokens):
        raise ValueError(f"length={length} must be from 1 to {len(tokens)}, the tokens there are")
    return len(tokens) - length


def batch_starts(tokens, seed, step, batch_size, length, rank=0, ranks=1, stream=0):
    """Where in `tokens` the rows of `get_batch` begin, int [batch_size / ranks]."""
    if batch_size % ranks:
        raise ValueError(f"batch_size={batch_size} must be a multiple of the {ranks} ranks")
    rng = np.random.default_rng([seed, stream, step])
    starts = rng.integers(last_start(tokens, length) + 1, size=batch_size)
    return np.split(starts, ranks)[rank]


def get_batch(tokens, seed, step, batch_size, length, rank=0, ranks=1, stream=0):
    """LongTensor [batch_size / ranks, length]: this rank's windows of `tokens` ([n], a split) at a step.

    A pure function: a resumed run reads what it would have read, and the ranks together read the same windows
    whatever their number. stream: an int that sets apart independent uses of one seed.
    ValueError if `tokens` is shorter than `length` or the ranks do not divide batch_size.
    """
    return windows(tokens, batch_starts(tokens, seed, step, batch_size, length, rank, ranks, stream), length)


def val_windows(tokens, n, length):
    """LongTensor [n, length]: n windows of `tokens` ([m]), evenly spread. ValueError if m < length."""
    return windows(tokens, np.linspace(0, last_start(tokens, length), n).astype(np.int64), length)
