"""The GPT against slower and more obvious references, in float64."""
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, jvp

from conftest import small_gpt
from model import (GIST, GPT, GPTConfig, OWN, OWN_GIST, TRUE, adamw, attention_mask, norm, rollout,
                   rotary_table, rotate, sample_tokens)

KINDS = dict(x=TRUE, y=OWN, G=GIST, H=OWN_GIST)
TWO_CHUNKS = torch.tensor([0, 0, 1, 1])


def grid(text):
    """(names of the columns, bool [L, L]) of a mask written out as a table, a row for each token."""
    head, *rows = [line.split() for line in text.strip().splitlines()]
    assert [row[0] for row in rows] == head
    return head, torch.tensor([[cell == "1" for cell in row[1:]] for row in rows])


def mask_of(names, chunk, pos, earlier):
    kind = [KINDS[name[0]] for name in names]
    return attention_mask(torch.tensor(kind), torch.tensor(chunk), torch.tensor(pos), earlier)


# ---- who sees whom

def test_text_and_triples_are_causal():
    alone = torch.full((6,), TRUE), torch.zeros(6).long(), torch.arange(6)
    for earlier in ("text", "gist", "full", "none"):
        assert torch.equal(attention_mask(*alone, earlier), torch.ones(6, 6).tril().bool())


def test_own_chunks_beside_true_ones_see_the_truth_before_their_chunk_alone():
    names, table = grid("""    x0 x1 x2 x3 y0 y1 y2 y3
                            x0  1  .  .  .  .  .  .  .
                            x1  1  1  .  .  .  .  .  .
                            x2  1  1  1  .  .  .  .  .
                            x3  1  1  1  1  .  .  .  .
                            y0  .  .  .  .  1  .  .  .
                            y1  .  .  .  .  1  1  .  .
                            y2  1  1  .  .  .  .  1  .
                            y3  1  1  .  .  .  .  1  1""")
    assert torch.equal(mask_of(names, [0, 0, 1, 1] * 2, [0, 1, 2, 3] * 2, "text"), table)


@pytest.mark.parametrize("earlier, table", [
    ("gist", """    x0 x1 G0 x2 x3 G1
                x0   1  .  .  .  .  .
                x1   1  1  .  .  .  .
                G0   1  1  1  .  .  .
                x2   .  .  1  1  .  .
                x3   .  .  1  1  1  .
                G1   .  .  1  1  1  1"""),
    ("full", """    x0 x1 G0 x2 x3 G1
                x0   1  .  .  .  .  .
                x1   1  1  .  .  .  .
                G0   1  1  1  .  .  .
                x2   1  1  1  1  .  .
                x3   1  1  1  1  1  .
                G1   1  1  1  1  1  1"""),
    ("none", """    x0 x1 G0 x2 x3 G1
                x0   1  .  .  .  .  .
                x1   1  1  .  .  .  .
                G0   1  1  1  .  .  .
                x2   .  .  .  1  .  .
                x3   .  .  .  1  1  .
                G1   .  .  .  1  1  1"""),
    ("text", """    x0 x1 G0 x2 x3 G1
                x0   1  .  .  .  .  .
                x1   1  1  .  .  .  .
                G0   1  1  1  .  .  .
                x2   1  1  .  1  .  .
                x3   1  1  .  1  1  .
                G1   1  1  .  1  1  1""")])
def test_of_earlier_chunks_one_sees_what_is_named(earlier, table):
    names, table = grid(table)
    assert torch.equal(mask_of(names, [0, 0, 0, 1, 1, 1], [0, 1, 1, 2, 3, 3], earlier), table)


def test_of_several_gists_each_sees_those_before_it_and_own_gists_see_own_text():
    names, table = grid("""     x0 x1 G0 Ga x2 x3 G1 Gb y2 y3 H1 Hb
                            x0   1  .  .  .  .  .  .  .  .  .  .  .
                            x1   1  1  .  .  .  .  .  .  .  .  .  .
                            G0   1  1  1  .  .  .  .  .  .  .  .  .
                            Ga   1  1  1  1  .  .  .  .  .  .  .  .
                            x2   .  .  1  1  1  .  .  .  .  .  .  .
                            x3   .  .  1  1  1  1  .  .  .  .  .  .
                            G1   .  .  1  1  1  1  1  .  .  .  .  .
                            Gb   .  .  1  1  1  1  1  1  .  .  .  .
                            y2   .  .  1  1  .  .  .  .  1  .  .  .
                            y3   .  .  1  1  .  .  .  .  1  1  .  .
                            H1   .  .  1  1  .  .  .  .  1  1  1  .
                            Hb   .  .  1  1  .  .  .  .  1  1  1  1""")
    chunk, pos = [0] * 4 + [1] * 8, [0, 1, 1, 1] + [2, 3, 3, 3] * 2
    assert torch.equal(mask_of(names, chunk, pos, "gist"), table)


def test_an_unknown_past_is_refused():
    with pytest.raises(ValueError, match="earlier='half' must be one of text, gist, full, none"):
        mask_of(["x0"], [0], [0], "half")


# ---- the network

def test_rotation_is_complex_multiplication_and_depends_on_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    at = lambda x, p: rotate(x, rotary_table(torch.tensor([p]), 8, torch.float64))
    angle = 5 * 10000.0 ** (-torch.arange(4) / 4)
    turned = torch.complex(q[..., :4], q[..., 4:]) * torch.polar(torch.ones(4), angle).to(torch.complex128)
    assert torch.allclose(at(q, 5), torch.cat((turned.real, turned.imag), -1), atol=1e-6)
    assert torch.allclose((at(q, 9) * at(k, 4)).sum(), (at(q, 25) * at(k, 20)).sum(), atol=1e-6)
    assert not torch.allclose((at(q, 9) * at(k, 4)).sum(), (at(q, 9) * at(k, 7)).sum(), atol=1e-3)


def test_network_equals_one_written_with_loops():
    model, tokens = small_gpt(), torch.tensor([[3, 1, 4, 1, 5, 13]])
    params = dict(model.named_parameters())
    x = norm(params["embed.weight"][tokens[0]])
    for i in range(2):
        q, k = (norm(x) @ params[f"blocks.{i}.attention.qk.weight"].T).chunk(2, -1)
        v = norm(x) @ params[f"blocks.{i}.attention.v.weight"].T
        heads = []
        for h in range(2):
            part = slice(8 * h, 8 * h + 8)
            table = rotary_table(torch.arange(6), 8, torch.float64)
            qh, kh = (rotate(y[:, part][:, None], table)[:, 0] for y in (q, k))
            rows = [(qh[t] @ kh[:t + 1].T / 8 ** 0.5).softmax(-1) @ v[:t + 1, part] for t in range(6)]
            heads.append(torch.stack(rows))
        x = x + torch.cat(heads, -1) @ params[f"blocks.{i}.attention.out.weight"].T
        hidden = F.gelu(norm(x) @ params[f"blocks.{i}.up.weight"].T)
        x = x + hidden @ params[f"blocks.{i}.down.weight"].T
    assert torch.allclose(model(tokens)[0], norm(x) @ params["head.weight"].T, atol=1e-10)


def test_until_stops_before_a_block_and_read_selects_positions():
    model, tokens = small_gpt(layers=3), torch.randint(0, 13, (2, 5))
    shorter = small_gpt(layers=3)
    shorter.load_state_dict(model.state_dict())
    del shorter.blocks[2]
    assert torch.allclose(model(tokens, until=2) @ model.head.weight.T, shorter(tokens))
    assert torch.allclose(model(tokens, until=3) @ model.head.weight.T, model(tokens))
    for read in (slice(3, 4), torch.tensor([4, 0])):
        assert torch.allclose(model(tokens, until=2, read=read), model(tokens, until=2)[:, read])


def test_embeddings_as_input_equal_tokens_and_carry_a_gradient():
    model, tokens = small_gpt(), torch.tensor([[3, 1, 4, 13]])
    weights = F.one_hot(tokens, 14).double().requires_grad_()
    soft = model(weights @ model.embed.weight)
    assert torch.allclose(soft, model(tokens), atol=1e-12)
    soft.square().sum().backward()
    assert weights.grad.abs().min() > 0


def test_both_attention_paths_agree_under_every_mask():
    model, tokens = small_gpt(), torch.randint(0, 13, (3, 8))
    kind = torch.tensor([TRUE] * 4 + [OWN] * 4)
    mask = attention_mask(kind, TWO_CHUNKS.repeat(2), torch.arange(4).repeat(2))
    for m in (None, mask):
        assert torch.allclose(model(tokens, mask=m), model(tokens, mask=m, fused=False), atol=1e-10)
    assert not torch.allclose(model(tokens), model(tokens, mask=mask), atol=1e-3)


def test_explicit_attention_survives_second_order_in_both_modes():
    model, tokens = small_gpt(), torch.randint(0, 13, (2, 5))
    params = {n: p.detach() for n, p in model.named_parameters()}
    loss = lambda p: functional_call(model, p, (tokens,), dict(fused=False)).log_softmax(-1).square().mean()
    w = {n: torch.randn_like(p) for n, p in params.items()}
    along = lambda p: sum((g * w[n]).sum() for n, g in grad(loss)(p).items())
    double_backward = grad(along)(params)
    forward_over = jvp(grad(loss), (params,), (w,))[1]
    shift = lambda e: grad(loss)({n: p + e * w[n] for n, p in params.items()})
    up, down = shift(1e-5), shift(-1e-5)
    for n in params:
        assert torch.allclose(double_backward[n], forward_over[n], atol=1e-9)
        assert torch.allclose(double_backward[n], (up[n] - down[n]) / 2e-5, atol=1e-6)


def test_untrained_model_predicts_uniformly_and_refuses_heads_that_do_not_fit():
    model = GPT(GPTConfig(vocab_size=11, n_embd=16, n_head=2))
    assert torch.equal(model(torch.randint(0, 11, (1, 4))), torch.zeros(1, 4, 11))
    with pytest.raises(ValueError, match="n_embd=18 must be an even multiple of n_head=4"):
        GPT(GPTConfig(n_embd=18, n_head=4))


def test_weights_decay_but_embeddings_do_not_and_nothing_is_left_out():
    model = small_gpt()
    groups = adamw(model, 0.1).param_groups
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert [len(g["params"]) for g in groups] == [len(list(model.parameters())) - 1, 1]
    assert groups[1]["params"][0] is model.embed.weight


# ---- writing text

CHANCE = torch.rand(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("u", [None, CHANCE], ids=["likeliest", "sampled"])
def test_cached_rollout_of_many_starts_equals_a_full_forward_for_every_token(u):
    model, x, starts = small_gpt(), torch.randint(0, 13, (2, 9)), [1, 4, 9]
    own = rollout(model, x, starts, 4, u)
    for b in range(2):
        for i, s in enumerate(starts):
            seen = x[b, :s]
            for j in range(4):
                logits = model(seen[None])[0, -1]
                token = logits.argmax() if u is None else sample_tokens(logits, u[b, i, j])
                assert own[b, i, j] == token
                seen = torch.cat((seen, token[None]))


def test_branches_of_several_tokens_equal_full_forwards_and_grow_apart_from_one_another():
    model, x, starts = small_gpt(), torch.randint(0, 13, (2, 6)), torch.tensor([2, 5])
    spans, cache = torch.randint(0, 13, (2, 2, 3, 4)), {}
    model(x, cache=cache)
    sees, pos = torch.arange(6) < starts[:, None], starts[:, None] + torch.arange(4)
    said = []
    for _ in range(2):  # dict(cache) begins anew
        grown = dict(cache)
        said.append(torch.cat([model.branch(spans[..., part], pos[:, part], sees, grown)
                               for part in (slice(0, 1), slice(1, 3), slice(3, 4))], 3))
    assert torch.equal(*said)
    last = model.branch(spans, pos, sees, dict(cache), read=slice(2, None))
    assert torch.allclose(last, said[0][..., 2:, :], atol=1e-12)
    entering = model.branch(spans, pos, sees, dict(cache), until=1)
    for b, n, m in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(3)):
        text = torch.cat((x[b, :starts[n]], spans[b, n, m]))[None]
        assert torch.allclose(said[0][b, n, m], model(text)[0, -4:], atol=1e-12)
        assert torch.allclose(entering[b, n, m], model(text, until=1)[0, -4:], atol=1e-12)


def test_a_cache_goes_on_as_one_forward_and_needs_pos_and_mask():
    model, x, cache = small_gpt(), torch.randint(0, 13, (2, 6)), {}
    model(x[:, :4], cache=cache)
    rest = model(x[:, 4:], torch.tensor([4, 5]), torch.ones(6, 6).tril().bool()[4:], cache=cache)
    assert torch.allclose(rest, model(x)[:, 4:], atol=1e-12)
    with pytest.raises(ValueError, match="pos and mask must be given"):
        model(x, cache=cache)


def test_rollout_refuses_a_start_without_a_prefix_and_one_behind_the_text():
    for starts in ([0, 3], [3, 6]):
        with pytest.raises(ValueError, match="starts must lie in 1 ... 5"):
            rollout(small_gpt(), torch.zeros(1, 5).long(), starts, 2)


def test_sampling_follows_the_distribution():
    logits = torch.tensor([0.1, 0.2, 0.7]).log().expand(1000, 3)
    drawn = sample_tokens(logits, (torch.arange(1000) + 0.5) / 1000)
    assert torch.bincount(drawn).tolist() == [100, 200, 700]
