"""The watch against streams whose change is known; gold, and the rows of the log."""
import math
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from watch import ROW, Gold, Watch, arms_table, make_row, new_track, note, recovered, summarise, track_gold

TOKENS = 512


def streams(seed, steps, surprise=0.0, agreement=0.0, entropy=0.0, change=None):
    """Healthy streams as stage 1 shows them, float [steps, 3]; from step `change` on, moved by so much."""
    rng = np.random.default_rng(seed)
    healthy = np.stack((4 + 0.1 * rng.standard_normal(steps), rng.binomial(TOKENS, 0.99, steps) / TOKENS,
                        4 + 0.07 * rng.standard_normal(steps)), axis=1)
    if change is not None:
        healthy[change:] += (surprise, agreement, entropy)
    return healthy


@cache
def calibration(seed):
    """The state of a watch that was calibrated on 500 healthy steps."""
    watch = Watch()
    watch.calibrate(streams(seed, 500), TOKENS, 0.99, 256, seed)
    return watch.state_dict()


def calibrated(seed=0):
    watch = Watch()
    watch.load_state_dict(calibration(seed))
    return watch


def first_alarm(seed, steps=2000, probe=lambda step: 0.99, **moved):
    """(step, streams) of the first alarm of a calibrated watch on so many fresh steps, or None."""
    x, watch = torch.tensor(streams(100 + seed, steps, **moved)), calibrated(seed)
    for step in range(10, steps + 1, 10):
        fired = watch.update(step, x[step - 10:step], probe(step))
        if fired:
            return step, fired
    return None


def test_healthy_streams_alarm_no_more_often_than_stated():
    # in each of 4 runs of 10,000 steps the chance is 5 %; two alarms or more would be a 1 % event
    assert sum(first_alarm(seed, 10_000) is not None for seed in range(4)) <= 1


@pytest.mark.parametrize("name, moved", [
    ("surprise", 0.15), ("agreement", -0.02), ("entropy", -0.15)])
def test_each_stream_alarms_soon_after_its_change_and_not_before(name, moved):
    for seed in range(4):
        step, fired = first_alarm(seed, change=1000, **{name: moved})
        assert 1000 < step <= 1100 and fired == [name], (step, fired)


def test_a_change_the_good_way_is_no_alarm():
    assert first_alarm(0, change=1000, surprise=-0.3, agreement=0.01, entropy=0.3) is None


def test_the_probe_alarms_when_the_critic_forgets_the_stored_set():
    step, fired = first_alarm(0, probe=lambda step: 0.99 if step < 1000 else 0.93)
    assert 1000 <= step <= 1100 and fired == ["probe"]


def test_learning_that_slows_down_is_no_alarm():
    for seed in range(2):
        x, watch = streams(seed, 3000), Watch()
        learned = 0.4 * np.log(1 + np.arange(3000) / 50)
        x[:, [0, 2]] -= learned[:, None]  # as a model learns, its entropy falls too
        watch.calibrate(x[:500], TOKENS, 0.99, 256)
        assert not any(watch.update(s, torch.tensor(x[s - 10:s]), 0.99) for s in range(510, 3000, 10))


def test_streams_that_grow_wilder_over_thousands_of_steps_are_no_alarm():
    x, watch = streams(100, 20_000), calibrated()
    x = torch.tensor(x.mean(0) + (x - x.mean(0)) * np.linspace(1, 1.6, 20_000)[:, None])
    assert not any(watch.update(s, x[s - 100:s], 0.99) for s in range(100, 20_001, 100))


def test_without_calibration_the_watch_is_off_and_its_state_survives_a_checkpoint():
    watch = Watch()
    watch.calibrate(streams(0, 50), TOKENS, 0.99, 256)
    assert watch.update(60, torch.full((10, 3), 1e9), 0.0) == []
    watch = calibrated()
    x = torch.tensor(streams(1, 1000, surprise=0.15, change=100))
    watch.update(100, x[:100], 0.99)
    other = Watch()
    other.load_state_dict(watch.state_dict())
    assert watch.update(130, x[100:130], 0.99) == other.update(130, x[100:130], 0.99)
    assert all(type(v) in (int, float) for s in watch.state_dict().values() for v in s.values())
    assert watch.state_dict() == other.state_dict() and not watch.settled()


def test_only_streams_that_are_listened_to_alarm():
    watch = calibrated()
    moved = torch.tensor(streams(1, 100, agreement=-0.5, change=0))
    assert watch.update(100, moved, 0.0, ("surprise", "entropy")) == [] and watch.settled()
    assert watch.update(200, moved, 0.0) == ["agreement", "probe"]


def test_the_order_names_what_moved_first_and_after_a_restart_no_step_before_it():
    watch = calibrated()
    early, late = torch.tensor(streams(1, 200, surprise=0.3, change=100)), torch.tensor(streams(1, 200))
    late[150:, 2] -= 0.3
    watch.update(200, torch.stack((early[:, 0], late[:, 1], late[:, 2]), 1), 0.99)
    order = watch.order()
    assert [name for _, name in order] == ["surprise", "entropy"]
    assert 95 <= order[0][0] <= 105 and 145 <= order[1][0] <= 155
    watch.restart(200)
    assert watch.settled() and watch.order() == []
    watch.update(205, late[-5:], 0.99)  # entropy, which is low still, is above its quarter at once
    assert [name for _, name in watch.order()] == ["entropy"] and watch.order()[0][0] >= 200
    watch.restart(210, late[-10:], 0.99)
    assert watch.state["entropy"]["reference"] == pytest.approx(late[-10:, 2].mean().item())
    assert watch.state["entropy"]["reference"] < 3.8


# ---- gold and the row of the log

def test_gold_is_the_mean_over_all_windows_in_nats_and_in_bits_of_their_own_bytes():
    windows = torch.tensor([[0, 1, 2], [2, 2, 1], [1, 0, 0], [0, 2, 2]])
    run = SimpleNamespace(rank=0, ranks=1, device="cpu", autocast=nullcontext, mean=lambda v: v.item())
    logits = torch.tensor([0.5, 0.2, 0.3]).log()
    say = lambda text: logits.expand(*text.shape, 3)
    nats, bits = Gold(windows, [1, 2, 3], run, batch=3)(say)
    said = [1, 2, 2, 1, 0, 0, 2, 2]
    assert nats == pytest.approx(-sum(logits[t].item() for t in said) / 8)
    assert bits == pytest.approx(nats / math.log(2) * 8 / sum(t + 1 for t in said))
    shares = []
    for rank in range(2):  # the mean over two ranks is that of one
        run.rank, run.ranks = rank, 2
        shares.append(Gold(windows, [1, 2, 3], run, batch=3)(say))
    assert np.mean(shares, 0).tolist() == pytest.approx([nats, bits])


def test_a_hack_is_three_evaluations_above_the_best_and_counts_from_the_first():
    def hack_of(golds):
        track, told = new_track(), []
        for i, nats in enumerate(golds):
            row = dict(step=10 * i, gold_nats=nats, gold_bpb=nats / 2, proxy=None if i == 0 else float(i))
            told.append(track_gold(track, row))
        assert (track["proxy_start"], track["proxy_end"]) == (1, len(golds) - 1)
        assert (track["gold_start"], track["gold_end"]) == (golds[0], golds[-1])
        assert track["bpb_end"] == golds[-1] / 2
        return track["steps_to_hack"], track["gold_best"], [10 * i for i, t in enumerate(told) if t]
    assert hack_of([4, 3.9, 4.05, 4.1, 4.2]) == (20, 3.9, [40])
    assert hack_of([4, 3.9, 4.05, 3.99, 4.2, 4.2]) == (None, 3.9, [])
    assert hack_of([4, 4.09, 4.09, 4.09]) == (None, 4, [])
    assert hack_of([4, 4.2, 4.2, 4.2, 3, 4, 4, 4]) == (10, 3, [30])  # told once
    assert recovered(dict(gold_start=4, gold_end=3.8), dict(gold_start=4, gold_end=3.6)) == pytest.approx(0.5)
    assert recovered(dict(gold_start=4, gold_end=3.8), None) is None
    assert recovered(dict(gold_start=4, gold_end=3.8), dict(gold_start=4, gold_end=4.1)) is None


def test_the_summary_says_what_the_real_arm_makes_of_the_others():
    def tracks(real_hack, **others):
        track = dict(new_track(), gold_start=4.0, gold_best=3.6, gold_end=3.6, bpb_end=2.0)
        return dict(real=dict(track, steps_to_hack=real_hack), **others)
    other = dict(tracks(30)["real"], gold_best=3.7, gold_end=3.7, bpb_end=2.1, alarms=[20, 90], self_steps=50)
    arms = summarise(tracks(None, self=other))
    assert arms["self"]["recovered"] == pytest.approx(0.75) and arms["self"]["self_steps"] == 50
    assert not {"rising", "rising_since"} & set(arms["self"])
    rows = [line.split() for line in arms_table(arms).splitlines()]
    assert rows[2] == ["self", "4.000", "3.700", "3.700", "2.100", "30", "20", "0", "0.75"] and len(rows) == 3
    assert "Gold rose in the real arm too" in arms_table(summarise(tracks(10, self=other)))
    assert "No real arm was run" in arms_table(summarise(dict(self=other)))


def noted(told):
    """What a step adds to the tally where the learner's likeliest token is 0 everywhere and 0 1 2, 3 0 1 is
    observed."""
    logp, tally = torch.tensor([0.4, 0.2, 0.2, 0.2]).log().expand(2, 3, 4), {}
    note(tally, torch.tensor(1.0), logp, torch.tensor([[0, 1, 2], [3, 0, 1]]), told, other=torch.tensor(5.0))
    return tally


def test_agreement_and_echo_are_shares_of_the_told_tokens_of_one_and_of_several_own_texts():
    told = torch.tensor([[0, 1, 0], [0, 2, 1]])
    one = noted(told)
    assert one["agreement"].item() == pytest.approx(3 / 6) and one["echo"].item() == pytest.approx(3 / 6)
    assert one["targets"].tolist() == [3, 2, 1, 0] and one["other"] == 5
    assert one["surprise"].item() == pytest.approx(-(2 * math.log(0.4) + 4 * math.log(0.2)) / 6)
    several = noted(torch.stack((told, torch.tensor([[0, 1, 2], [3, 0, 1]]), torch.zeros(2, 3).long()), 1))
    assert several["agreement"].item() == pytest.approx((3 + 6 + 2) / 18)
    assert several["echo"].item() == pytest.approx((3 + 2 + 6) / 18)
    assert several["targets"].tolist() == [3 + 2 + 6, 2 + 2, 1 + 1, 1]


def test_a_row_holds_the_means_of_the_steps_since_the_last_one_and_none_without_a_step():
    tally, lr = {}, 0.1
    run = SimpleNamespace(stage="s", settings=dict(batch_size=2, block_size=3, meta_steps=10, grad_accum=1),
                          average=lambda tensors: None,
                          progress=SimpleNamespace(speed=lambda steps, each: dict(tok_per_s=steps * each)))
    make = lambda arm: make_row(run, arm, 5, tally, (3.0, 2.0), lr, dict(own=7, outside=None))
    logp, obs = torch.full((2, 3, 4), math.log(0.25)), torch.tensor([[0, 1, 2], [3, 0, 1]])
    for k, told in enumerate((obs, torch.zeros_like(obs))):
        note(tally, torch.tensor(1.0 + k), logp, obs, told, outside=torch.tensor(0.5 * k))
    row, stream = make("self")
    same = pytest.approx(math.log(4))
    entropy = -sum(n / 12 * math.log(n / 12) for n in (8, 2, 1, 1))
    assert row == dict(stage="s", arm="self", step=5, tokens=15 * 6, proxy=1.5, gold_nats=3.0, gold_bpb=2.0,
                       lr=lr, own=7, outside=0.25, grad_norm=None, surprise=same, output_entropy=same,
                       agreement=pytest.approx(2 / 3), echo=pytest.approx(2 / 3), tok_per_s=12,
                       target_top=pytest.approx(8 / 12), target_entropy=pytest.approx(entropy))
    assert stream.shape == (2, 3) and stream[:, 1].tolist() == pytest.approx([1, 1 / 3]) and not tally
    row, stream = make("meta")
    assert {row[k] for k in (*ROW, "proxy", "outside")} == {None}
    assert row["own"] == 7 and row["tokens"] == 5 * 6
    assert stream is None
