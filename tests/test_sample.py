"""What a run's weights write, and from what they keep of what they have read."""
import base64
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import in_process

import sample
from corpus import make_encoding
from gists import layout, read
from model import GPT, GPTConfig

CHUNK, VOCAB = 4, 32
TINY = ("--n_layer=2 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --eval_windows=4 --meta_steps=4 "
        "--self_steps=4 --eval_interval=4 --self_learning_rate=0.1 --arms=real --controls=full --device=cpu")


def network(n_special):
    """A GPT with random weights, none of them zero: an untrained one writes the same after all."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(VOCAB, n_special, n_layer=2, n_head=2, n_embd=16))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


def greedy(logits_of, ids, n):
    """What `go_on` should write: the likeliest token after all so far, n times, each by a pass over all."""
    ids = list(ids)
    for _ in range(n):
        ids.append(logits_of(torch.tensor([ids])).argmax().item())
    return ids[-n:]


@pytest.mark.parametrize("length", [1, 9])
def test_what_is_written_greedily_is_what_a_pass_over_all_says_each_time(length):
    model, ids = network(1), torch.randint(VOCAB, (length,)).tolist()
    written, kept, _ = sample.go_on(model, ids, 12)
    assert written == greedy(lambda x: model(x)[0, -1], ids, 12) and kept == length + 11


@pytest.mark.parametrize("n_gist", [1, 2])
@pytest.mark.parametrize("how", ["gist", "full"])
@pytest.mark.parametrize("length", [3, 9, 12])
def test_text_written_in_chunks_is_that_of_a_pass_under_the_mask(length, how, n_gist):
    model, ids = network(n_gist + 1), torch.randint(VOCAB, (length,)).tolist()

    def logits_of(x):
        more = -x.size(1) % CHUNK
        lay = layout(x.size(1) + more, CHUNK, n_gist, VOCAB, "cpu")
        return read(model, lay, torch.nn.functional.pad(x, (0, more)), how)[0, x.size(1) - 1]

    written, kept, _ = sample.go_on(model, ids, 10, chunk=CHUNK, forget=how == "gist")
    assert written == greedy(logits_of, ids, 10)
    chunks, rest = divmod(length + 9, CHUNK)
    assert kept == chunks * (n_gist + (CHUNK if how == "full" else 0)) + rest


def test_what_is_drawn_depends_on_seed_and_temperature_alone():
    drawn = lambda *how: sample.go_on(network(1), [3], 20, *how)[0]
    assert drawn(1.0, 1) == drawn(1.0, 1) != drawn(1.0, 2)
    assert drawn(1e-40, 1) == drawn(0.0, 2)


def test_a_word_that_a_planted_language_does_not_have_is_refused(capsys):
    words = [base64.b64encode(word).decode() for word in (b"ab ", b"cd ")]
    tokenizer = dict(name="words", pattern=r"\S+\s", end_of_text=None, mergeable_ranks=words, spellings=4)
    corpus = SimpleNamespace(encoding=make_encoding(tokenizer), meta=dict(dataset="planted-shift"),
                             vocab_size=128, val=np.array([4, 0]))
    assert sample.encode(corpus, "cd ab ") == [4, 0]
    for text in ("", "ab", "ab  cd ", "To be "):
        with pytest.raises(SystemExit):
            sample.encode(corpus, text)
        assert "is not in the run's tokens, as 'cd ab '" in capsys.readouterr().err


# ---- the command line

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a finished run of stage 2, four steps each phase."""
    path = tmp_path_factory.mktemp("runs") / "gist"
    main("gist_bottleneck.py", *TINY.split(), f"--out_dir={path}")
    return path


def main(script, *arguments):
    """Runs a script, for fixtures of any scope."""
    with pytest.MonkeyPatch.context() as patch:
        in_process(patch, script, *map(str, arguments))


def test_the_command_line_goes_on_from_a_text_or_a_file_by_the_weights_named(folder, tmp_path, capsys):
    told, prompt = [], tmp_path / "prompt.txt"
    prompt.write_text("To be ü\n", encoding="utf-8")
    for words in ("--prompt=To be ü\n", f"--prompt={prompt}", "--how=full", "--arm=real"):
        main("sample.py", folder, f"--prompt={prompt}", "--tokens=11", words)
        told.append(capsys.readouterr().out)
    text, file, full, arm = told
    assert all(out.startswith("To be ü\n") for out in told)
    assert text.rpartition(",")[0] == file.rpartition(",")[0] != arm.rpartition(",")[0]
    assert "gist: 7 keys and values kept of 19 tokens" in text and "full: 23 keys" in full


@pytest.mark.parametrize("words, says", [
    (["--prompt="], "prompt='' is not in the run's tokens"), (["--arm=self"], "holds no end of arm 'self'"),
    (["--arm=real", "--how=full"], "needs the end of a meta phase"), (["--how=none"], "is not one of"),
    (["--promt=a"], "did you mean 'prompt'?")])
def test_what_cannot_be_written_is_refused(folder, capsys, words, says):
    with pytest.raises(SystemExit) as stop:
        main("sample.py", folder, *words)
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_a_folder_that_is_no_run_and_a_file_that_is_no_text_are_refused(folder, tmp_path, capsys):
    (tmp_path / "latin").write_bytes(b"\xfc")
    wrong = [folder, f"--prompt={tmp_path}/latin"]
    for words, says in (([], "is no run"), ([tmp_path], "is no run"), (wrong, "cannot be read as UTF-8")):
        with pytest.raises(SystemExit) as stop:
            main("sample.py", *words)
        assert stop.value.code == 2 and says in capsys.readouterr().err


def test_full_of_a_run_without_that_control_is_refused(capsys):
    with pytest.raises(SystemExit):
        sample.weights_of("out/gist", dict(snapshot=dict(learner={})), "", full=True)
    assert "with full among the controls of out/gist" in capsys.readouterr().err
