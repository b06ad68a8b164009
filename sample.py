"""
Continues a text with the weights of a run, and with its own tokenizer.

    python sample.py out/self_ce --prompt="To be"                     # the end of the meta phase
    python sample.py out/meta_gist --arm=frozen --temperature=0       # the end of an arm, greedily
    python sample.py out/gist_bottleneck --prompt=my.txt --how=full   # a file, from more than its gists

A prompt is read as own text is written, a token at a time. No run was trained beyond its block_size.
"""
import json
import os
import re
import sys
import time
from pathlib import Path

import torch

from checkpoints import read_checkpoint, read_end
from configurator import configure, refuse
from corpus import corpus_id, decode, open_corpus
from model import GPT, GPTConfig, sample_tokens
from planted import units

arm = ""           # the arm whose end writes; "": the end of the meta phase
prompt = "To be"   # the text that is continued, or the name of a file that holds it, in UTF-8
tokens = 200       # how many are written
temperature = 0.8  # what the logits are divided by; 0 takes the likeliest token
seed = 1           # of what is drawn
how = "gist"       # "gist" | "full": what stage 2 keeps of a chunk: its gists, or all, with the control full


def read_run(folder):
    """(checkpoint, corpus) of a run that is past its meta phase, on the CPU."""
    try:
        first = (Path(folder) / "log.jsonl").read_text(encoding="utf-8").partition("\n")[0]
        state = read_checkpoint(folder, json.loads(first)["stage"])
    except (OSError, ValueError, KeyError, TypeError):
        refuse(f"{folder!r} is no run with a log.jsonl; first name the folder of one, such as out/self_ce")
    if state["snapshot"] is None:
        refuse(f"{folder} has not finished its meta phase; go on with it by --resume={folder}")
    corpus = open_corpus(*(state["config"][name] for name in ("dataset", "vocab")))
    if corpus_id(corpus) != state["corpus"]:
        refuse(f"{corpus.folder} holds another corpus or tokenizer than that of {folder}")
    return state, corpus


def model_of(config, weights):
    """The GPT of a run's settings, with these weights."""
    sizes = (config[name] for name in ("n_layer", "n_head", "n_embd"))
    model = GPT(GPTConfig(config["vocab"], config.get("n_gist", 0) + 1, *sizes))
    model.load_state_dict(weights)
    return model


def weights_of(folder, state, arm, full):
    """The weights of the learner, at the end of an arm if it names one, or of the control full."""
    if full and (arm or "full" not in state["snapshot"]):
        refuse(f"how='full' needs the end of a meta phase, --arm=, with full among the controls of {folder}")
    end = state["snapshot"]["full" if full else "learner"]
    return read_end(folder, arm, state["stage"])["weights"] if arm else end


def encode(corpus, text):
    """The ids of a text, of each token its first spelling; refuses what the tokenizer has no tokens for."""
    encoding, planted = corpus.encoding, units(corpus.meta["dataset"], corpus.vocab_size)
    try:  # tiktoken panics at a word that it does not know, unless asked for it alone
        found = ([encoding.encode_single_token(word) for word in re.findall(planted[1], text)]
                 if planted else encoding.encode_ordinary(text))
    except KeyError:
        found = []
    ids = [encoding.spellings * token for token in found]
    if not ids or decode(encoding, ids) != text:
        refuse(f"prompt={text[:40]!r} is not in the run's tokens, as {decode(encoding, corpus.val[:8])!r}")
    return ids


@torch.no_grad()
def go_on(model, ids, n, temperature=0.0, seed=1, chunk=0, forget=False):
    """(n own tokens after the ids, a list; keys and values kept in a layer; ms a token).

    chunk: every so many tokens have gists behind them; 0 is without. forget: then keep the gists alone.
    """
    cache, kept, written, rng = {}, 0, [], torch.Generator().manual_seed(seed)
    gists = [model.config.vocab_size + i for i in range(model.config.n_special - 1)]
    shorter = lambda a: torch.cat((a[:, :, :-chunk - len(gists)], a[:, :, -len(gists):]), 2)
    began = time.perf_counter()
    for at in range(len(ids) + n - 1):
        whole = chunk and (at + 1) % chunk == 0
        read = [ids[at] if at < len(ids) else written[-1], *(gists if whole else ())]
        sees = torch.ones(len(read), kept + len(read), dtype=torch.bool).tril(kept)
        pos = torch.full((len(read),), at)
        logits = model(torch.tensor([read]), pos, sees, read=slice(1), cache=cache)[0, 0]
        if whole and forget:
            cache = {block: (shorter(k), shorter(v)) for block, (k, v) in cache.items()}
        kept += len(read) - (chunk if whole and forget else 0)
        if at >= len(ids) - 1:
            u, scaled = torch.rand((), generator=rng), (logits - logits.max()) / (temperature or 1)
            written.append((sample_tokens(scaled, u) if temperature else scaled.argmax()).item())
    return written, kept, 1e3 * (time.perf_counter() - began) / max(1, len(ids) + n - 1)


def main():
    folder = sys.argv.pop(1) if sys.argv[1:] and not sys.argv[1].startswith("-") else ""
    configure(globals())
    state, corpus = read_run(folder)
    chunk = state["config"]["chunk"] if state["stage"] == "gist_bottleneck" else 0
    model = model_of(state["config"], weights_of(folder, state, arm, how == "full"))
    try:
        data = Path(prompt).read_bytes() if os.path.isfile(prompt) else os.fsencode(prompt)
        ids = encode(corpus, data.decode("utf-8"))
    except (OSError, UnicodeError) as error:
        refuse(f"prompt={prompt!r} cannot be read as UTF-8 ({type(error).__name__})")
    written, kept, ms = go_on(model, ids, tokens, temperature, seed, chunk, how == "gist")
    print(decode(corpus.encoding, ids + written))
    if chunk:
        print(f"{how}: {kept} keys and values kept of {len(ids) + tokens - 1} tokens, {ms:.2f} ms a token")


if __name__ == "__main__":
    main()
