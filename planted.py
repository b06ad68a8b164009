"""
Planted corpora: texts and spellings of which it is known what there is to learn.

    planted-synonyms   words for meanings; a chain says which 8 of the meanings may follow each. A meaning has
                       4 ids, drawn at each use: its spelling is noise. The optimum is known.
    planted-shift      64 meanings of one word each along such a chain; before each word, 4 times in 10, a
                       filler: two texts say the same at different places. The optimum is known.
    planted-facts      128 facts, each told again every 2,000 to 8,000 tokens. Half of them are asked for in
                       training, the other half in validation: their answers must have been learned.
    plays-spellings    the plays, each token with 4 ids. Which ids are one token is known.

The first three are made here, of constants alone; a word, with the space after it, is a token.
"""
import heapq
import itertools
import math
import re
from bisect import bisect
from collections import Counter

import numpy as np
import tiktoken

import wordings
from configurator import refuse

TOKENS = {"train": 1_000_000, "val": 100_000}   # of each; planted-facts ends with its sentence
SEED = 1
# The corpora made here, and what of; another text under an old name would be taken for it.
SOURCES = dict.fromkeys(("planted-synonyms", "planted-shift"), f"seed {SEED}")
SOURCES["planted-facts"] = f"seed {SEED}, told again"
SPELLING, CHAIN, WALK, FACTS, SHIFT = range(5)  # what is random, each with a stream of its own

SPELLINGS = 4              # ids of a token in planted-synonyms and plays-spellings
SUCCESSORS = 8             # how many meanings may follow each
SHIFT_MEANINGS, FILLERS, FILLER_CHANCE = 64, 4, 0.4
PLACES = 128               # answers in planted-facts
LAGS = 2000, 8000          # tokens from telling to telling, at least and at most

VOCAB = {"planted-facts": 512, "planted-shift": SHIFT_MEANINGS + FILLERS}
SYNONYMS_VOCAB = 64, 512   # ids of planted-synonyms, at least and at most
CHARACTERS = 64, 192       # ids of plays-spellings in characters, at least and at most
BPE_SPELLINGS = SPELLINGS * 256                 # ids of plays-spellings in tokens, at least


# ---- what prepare_data asks of a corpus

def check_vocab(dataset, vocab):
    """Refuses a vocabulary that the planted corpus `dataset` cannot have. Other corpora pass."""
    needed = VOCAB.get(dataset, vocab)
    if vocab != needed:
        refuse(f"vocab={vocab}: the words of {dataset} are its tokens, and they are --vocab={needed}")
    low, high = wordings.VOCAB
    if dataset == wordings.NAME and not low <= vocab <= high:
        refuse(f"vocab={vocab} must be from {low} to {high}: so many words of {dataset} are kept")
    low, high = SYNONYMS_VOCAB
    if dataset == "planted-synonyms" and (vocab % SPELLINGS or not low <= vocab <= high):
        refuse(f"vocab={vocab} must be a multiple of {SPELLINGS} from {low} to {high}: of {dataset}, "
               f"each meaning has {SPELLINGS} ids")
    low, high = CHARACTERS
    if dataset == "plays-spellings" and (vocab % SPELLINGS or vocab < low or high < vocab < BPE_SPELLINGS):
        refuse(f"vocab={vocab} must be a multiple of {SPELLINGS}, the ids of each token of {dataset}:\n"
               f"from {low} to {high} for the commonest characters in lower case, or from {BPE_SPELLINGS} on "
               f"for a BPE ({SPELLINGS * 512} for one of 512)")


def units(dataset, vocab):
    """(name, pattern) of the tokens of a planted corpus, or None where they are a BPE's."""
    if dataset in SOURCES:
        return "words", r"\S+\s"
    if dataset == wordings.NAME:
        return "words", wordings.PATTERN
    if dataset == "plays-spellings" and vocab < BPE_SPELLINGS:
        return "characters", r"(?s)."
    return None


def unit_tokens(dataset, vocab, texts):
    """(name, pattern, tokens by rank) of all `units` in a list of str."""
    name, pattern = units(dataset, vocab)
    found = set().union(*(re.findall(pattern, text) for text in texts))
    return name, pattern, [unit.encode() for unit in sorted(found)]


def known(dataset, vocab):
    """What meta.json says of a planted corpus beyond what it says of all."""
    if dataset == "plays-spellings":
        return {"spellings": SPELLINGS}
    if dataset == "planted-synonyms":
        return {"spellings": SPELLINGS, "optimum_nats": round(optimum(dataset, vocab), 6)}
    if dataset == "planted-shift":
        return {"optimum_nats": round(optimum(dataset, vocab), 6)}
    if dataset == "planted-facts":
        return {"places": PLACES, "chance_nats": round(math.log(PLACES), 6), "lags": LAGS}
    return {}


def documents(dataset, vocab):
    """Yields (split, None, text), one document a split, of a corpus made here."""
    if dataset == "planted-facts":
        yield from fact_documents()
        return
    words = synonym_words(vocab // SPELLINGS) if dataset == "planted-synonyms" else shift_words()
    for split, length in TOKENS.items():
        yield split, None, "".join(f"{word} " for word in itertools.islice(words, length))


# ---- the languages

def dice(stream):
    return np.random.default_rng([SEED, stream])


def invent(rng, count, letters):
    """A list of `count` different words of so many letters, vowels and consonants in turn."""
    words = {}
    while len(words) < count:
        first = rng.integers(2)
        kinds = (["aeiou", "bdfghjklmnprstvwz"] * letters)[first:first + letters]
        words["".join(kind[rng.integers(len(kind))] for kind in kinds)] = True
    return list(words)


def chain(meanings):
    """float64 [meanings, meanings]: how likely each meaning (column) is after each (row), as the ids go."""
    rng, p = dice(CHAIN), np.zeros((meanings, meanings))
    for share in rng.dirichlet(np.ones(SUCCESSORS), meanings).T:
        p[np.arange(meanings), rng.permutation(meanings)] += share  # so that each has as many predecessors
    return p


def optimum(dataset, vocab):
    """The least cross entropy on planted-synonyms or planted-shift, in nats a token."""
    p = chain(vocab // SPELLINGS if dataset == "planted-synonyms" else SHIFT_MEANINGS)
    often = np.linalg.matrix_power(p, 1024)[0]  # share of each meaning, in the long run
    meaning = often @ -(p * np.log(np.where(p > 0, p, 1))).sum(1)
    if dataset == "planted-synonyms":
        return meaning + math.log(SPELLINGS)
    q = FILLER_CHANCE  # a meaning takes 1 + q tokens: is there a filler, if so which; after it a word is sure
    whether = -q * math.log(q) - (1 - q) * math.log(1 - q)
    return (meaning + whether + q * math.log(FILLERS)) / (1 + q)


def walk(rng, meanings):
    """A walk along the chain, as many meanings as there are tokens in both splits."""
    reach = np.cumsum(chain(meanings), axis=1)
    reach[:, -1] = 1  # what rounding left
    reach, at = reach.tolist(), 0
    for chance in rng.random(sum(TOKENS.values())).tolist():
        at = bisect(reach[at], chance)
        yield at


def synonym_words(meanings):
    rng = dice(WALK)
    words = sorted(invent(rng, meanings, 4))
    for meaning in walk(rng, meanings):
        yield words[meaning]


def shift_words():
    """The walk with fillers before its words. Ids 0 to 63 are meanings, as in `chain`, the others fillers."""
    rng = dice(SHIFT)
    words = sorted(invent(rng, SHIFT_MEANINGS + FILLERS, 4))
    path = list(walk(rng, SHIFT_MEANINGS))
    filled = rng.random(len(path)) < FILLER_CHANCE
    fillers = rng.integers(SHIFT_MEANINGS, len(words), size=len(path))
    for meaning, has_filler, filler in zip(path, filled.tolist(), fillers.tolist()):
        if has_filler:
            yield words[filler]
        yield words[meaning]


def fact_documents():
    """Facts, one of each name, told again and again at LAGS; half of them are asked for too in training, the
    other half in validation alone. Between them stand other sentences."""
    rng = dice(FACTS)
    words = iter(invent(rng, 128 + 128 + PLACES + 120, 5))
    names, things, places, verbs = (list(itertools.islice(words, n)) for n in (128, 128, PLACES, 120))
    names, places = ([word.capitalize() for word in kind] for kind in (names, places))
    facts = list(zip(names, rng.permutation(things), rng.permutation(places)))

    def draw(words):
        return words[rng.integers(len(words))]

    for split, length in TOKENS.items():
        asked = range(64) if split == "train" else range(64, 128)
        due = [(rng.integers(LAGS[1]), i, True) for i in range(len(facts))]
        due += [(rng.integers(*LAGS) + at, i, False) for at, i, _ in due if i in asked]
        heapq.heapify(due)
        text, now = [], 0
        while now < length:
            sentence = f"{draw(names)} {draw(verbs)}s the {draw(things)} .\n"
            if due[0][0] <= now:
                _, i, told = due[0]
                name, thing, place = facts[i]
                sentence = (f"{name} keeps the {thing} in {place} .\n" if told else
                            f"where does {name} keep the {thing} ? {place} .\n")
                heapq.heapreplace(due, (now + rng.integers(*LAGS), i, told))
            text.append(sentence)
            now += len(sentence.split())
        yield split, None, "".join(text)


def few_characters(documents, n):
    """The documents in lower case, with none but the n characters that are the commonest in training."""
    documents = [(split, title, text.lower()) for split, title, text in documents]
    counts = Counter(itertools.chain.from_iterable(text for split, _, text in documents if split == "train"))
    kept = {character for character, _ in counts.most_common(n)}
    for split, title, text in documents:
        yield split, title, "".join(filter(kept.__contains__, text))


# ---- spellings

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


# ---- what is known of a corpus

def true_classes(corpus):
    """int64 [vocab_size]: the class of each id, which is the token that it spells: itself, unless spelled."""
    return np.arange(corpus.vocab_size) // corpus.encoding.spellings


def planted_answers(tokens, corpus):
    """int64 [n, 2]: where in `tokens`, of a split of planted-facts, each answer stands, and where its fact
    was last told. Questions whose fact is not told before them are left out.

    KeyError: a corpus without the words.
    """
    told, asked = (corpus.encoding.encode_single_token(word) for word in ("in ", "? "))
    tokens, stated, found = np.asarray(tokens).tolist(), {}, []
    for i in range(4, len(tokens) - 1):  # NAME keeps the THING in PLACE; does NAME keep the THING ? PLACE
        pair = tokens[i - 4], tokens[i - 1]
        if tokens[i] == told:
            stated[pair] = i + 1
        elif tokens[i] == asked and pair in stated:
            found.append((i + 1, stated[pair]))
    return np.array(found, dtype=np.int64).reshape(-1, 2)
