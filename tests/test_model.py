"""The GPT against slower and more obvious references, in float64."""
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, jvp

from model import (GIST, GPT, GPTConfig, OWN, TRUE, attention_mask, bottleneck_mask, norm, rollout, rotary_table, rotate,
                   sample_tokens)


def small_gpt(**sizes):
    """A GPT whose zero-initialised matrices are random, so that every part of it shows in the logits."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**dict(vocab_size=11, n_special=1, n_layer=2, n_head=2, n_embd=16), **sizes})).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def table(text):
    return torch.tensor([[c == "1" for c in row.split()] for row in text.strip().splitlines()])


def test_masks_equal_the_tables_written_out():
    pos = torch.arange(6)
    triples = table("""1 . . . . .
                       1 1 . . . .
                       1 1 1 . . .
                       1 1 1 1 . .
                       1 1 1 1 1 .
                       1 1 1 1 1 1""")
    assert torch.equal(attention_mask(torch.full((6,), TRUE), torch.zeros(6).long(), pos), triples)
    rollout_of_two_chunks = table("""1 . . . . . . .
                                     1 1 . . . . . .
                                     1 1 1 . . . . .
                                     1 1 1 1 . . . .
                                     . . . . 1 . . .
                                     . . . . 1 1 . .
                                     1 1 . . . . 1 .
                                     1 1 . . . . 1 1""")
    kind = torch.tensor([TRUE] * 4 + [OWN] * 4)
    chunk = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
    assert torch.equal(attention_mask(kind, chunk, torch.arange(4).repeat(2)), rollout_of_two_chunks)


def test_bottleneck_masks_equal_the_tables_written_out():
    gist = table("""1 . . . . .
                    1 1 . . . .
                    1 1 1 . . .
                    . . 1 1 . .
                    . . 1 1 1 .
                    . . 1 1 1 1""")
    none = gist.clone()
    none[3:, 2] = False
    kind, chunk = torch.tensor([TRUE, TRUE, GIST] * 2), torch.tensor([0] * 3 + [1] * 3)
    assert torch.equal(bottleneck_mask(chunk, kind, "gist"), gist)
    assert torch.equal(bottleneck_mask(chunk, kind, "pool"), gist)
    assert torch.equal(bottleneck_mask(chunk, kind, "full"), torch.ones(6, 6).tril().bool())
    assert torch.equal(bottleneck_mask(chunk, kind, "none"), none)
    spread = table("""1 . . . . . . .
                      1 1 . . . . . .
                      1 1 1 . . . . .
                      1 1 1 1 . . . .
                      . 1 . 1 1 . . .
                      . 1 . 1 1 1 . .
                      . 1 . 1 1 1 1 .
                      . 1 . 1 1 1 1 1""")  # x0 G0 x1 G1, x2 G0 x3 G1
    kind, chunk = torch.tensor([TRUE, GIST] * 4), torch.tensor([0] * 4 + [1] * 4)
    assert torch.equal(bottleneck_mask(chunk, kind, "gist"), spread)
    with pytest.raises(ValueError, match="must be gist"):
        bottleneck_mask(chunk, kind, "half")


def test_what_enters_a_block_is_what_the_blocks_before_it_make():
    model, tokens = small_gpt(n_layer=3), torch.randint(0, 11, (2, 5))
    shorter = small_gpt(n_layer=3)
    shorter.load_state_dict(model.state_dict())
    del shorter.blocks[2]
    assert torch.allclose(model(tokens, residual=2) @ model.head.weight.T, shorter(tokens))
    assert torch.equal(model(tokens, residual=2, read=slice(3, 4)), model(tokens, residual=2)[:, 3:4])


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
    model, tokens = small_gpt(), torch.tensor([[3, 1, 4, 1, 5, 11]])
    params = dict(model.named_parameters())
    x = norm(params["embed.weight"][tokens[0]])
    for i in range(2):
        q, k, v = (norm(x) @ params[f"blocks.{i}.attention.qkv.weight"].T).chunk(3, -1)
        heads = []
        for h in range(2):
            part = slice(8 * h, 8 * h + 8)
            turn = lambda y: rotate(norm(y[:, part])[None, None], rotary_table(torch.arange(6), 8, torch.float64))[0, 0]
            qh, kh = turn(q), turn(k)
            rows = [(qh[t] @ kh[:t + 1].T / 8 ** 0.5).softmax(-1) @ v[:t + 1, part] for t in range(6)]
            heads.append(torch.stack(rows))
        x = x + torch.cat(heads, -1) @ params[f"blocks.{i}.attention.out.weight"].T
        x = x + (norm(x) @ params[f"blocks.{i}.up.weight"].T).relu() ** 2 @ params[f"blocks.{i}.down.weight"].T
    assert torch.allclose(model(tokens)[0], norm(x) @ params["head.weight"].T, atol=1e-10)


def test_soft_one_hot_input_equals_token_input_and_carries_a_gradient():
    model, tokens = small_gpt(), torch.tensor([[3, 1, 4, 11]])
    weights = F.one_hot(tokens, 12).double().requires_grad_()
    soft = model(weights @ model.embed.weight)
    assert torch.allclose(soft, model(tokens), atol=1e-12)
    soft.square().sum().backward()
    assert weights.grad.abs().min() > 0


def test_both_attention_paths_agree_under_every_mask():
    model, tokens = small_gpt(), torch.randint(0, 11, (3, 8))
    kind, chunk = torch.tensor([TRUE] * 4 + [OWN] * 4), torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
    mask = attention_mask(kind, chunk, torch.arange(4).repeat(2))
    for m in (None, mask):
        assert torch.allclose(model(tokens, mask=m), model(tokens, mask=m, fused=False), atol=1e-10)


def test_explicit_attention_survives_second_order_in_both_modes():
    model, tokens = small_gpt(), torch.randint(0, 11, (2, 5))
    params = {n: p.detach() for n, p in model.named_parameters()}
    loss = lambda p: functional_call(model, p, (tokens,), dict(fused=False)).log_softmax(-1).square().mean()
    w = {n: torch.randn_like(p) for n, p in params.items()}
    along = lambda p: sum((g * w[n]).sum() for n, g in grad(loss)(p).items())
    double_backward = grad(along)(params)
    forward_over = grad(lambda p: jvp(loss, (p,), (w,))[1])(params)
    shift = lambda e: grad(loss)({n: p + e * w[n] for n, p in params.items()})
    up, down = shift(1e-5), shift(-1e-5)
    for n in params:
        assert torch.allclose(double_backward[n], forward_over[n], atol=1e-9)
        assert torch.allclose(double_backward[n], (up[n] - down[n]) / 2e-5, atol=1e-6)


@pytest.mark.parametrize("u", [None, torch.rand(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))])
def test_cached_rollout_of_many_starts_equals_a_full_forward_for_every_token(u):
    model, x, starts = small_gpt(), torch.randint(0, 11, (2, 9)), [1, 4, 9]
    own = rollout(model, x, starts, 4, u)
    for b in range(2):
        for i, s in enumerate(starts):
            seen = x[b, :s]
            for j in range(4):
                logits = model(seen[None])[0, -1]
                token = logits.argmax() if u is None else sample_tokens(logits, u[b, i, j])
                assert own[b, i, j] == token
                seen = torch.cat((seen, token[None]))


def test_rollout_refuses_a_start_without_a_prefix():
    with pytest.raises(ValueError, match="starts must lie in 1 ... 5"):
        rollout(small_gpt(), torch.zeros(1, 5).long(), [0, 3], 2)


def test_a_filled_cache_needs_pos_and_mask():
    cache, model = {}, small_gpt()
    model(torch.zeros(1, 3).long(), cache=cache)
    with pytest.raises(ValueError, match="pos and mask must be given"):
        model(torch.zeros(1, 1).long(), cache=cache)


def test_sampling_follows_the_distribution():
    logits = torch.tensor([0.1, 0.2, 0.7]).log().expand(1000, 3)
    drawn = sample_tokens(logits, (torch.arange(1000) + 0.5) / 1000)
    assert torch.bincount(drawn).tolist() == [100, 200, 700]


def test_untrained_model_predicts_uniformly_and_learns_every_parameter():
    model = GPT(GPTConfig(vocab_size=11, n_embd=16, n_head=2))
    assert torch.equal(model(torch.randint(0, 11, (1, 4))), torch.zeros(1, 4, 11))
    with pytest.raises(ValueError, match="n_embd=18 must be an even multiple of n_head=4"):
        GPT(GPTConfig(n_embd=18, n_head=4))
