import numpy as np
import pytest

from drafter.decoding.acceptance import Block
from drafter.decoding.clock import Seconds
from drafter.decoding.generation import Decoded
from drafter.metrics import (
    RATIOS,
    Counts,
    acceptance_rate,
    answer_positions,
    block_efficiency,
    by_label,
    by_position,
    by_prompt,
    conversation_and_turn,
    count,
    estimate,
    memory_bound_speedup,
    paired_difference,
    token_rate_ratio,
    turn_id,
)


def counts(tokens=10, target_calls=5, accepted=5, tested=8, seconds=1.0, baseline_tokens=10, baseline_seconds=2.0):
    return Counts(tokens, target_calls, accepted, tested, seconds, baseline_tokens, baseline_seconds)


def simulate(generator, prompts, per_call=2.0, spread=0.5):
    """Prompts of unequal length and difficulty; tokens / target calls is `per_call` in expectation."""
    calls = 10 + generator.poisson(20, prompts)
    rates = per_call * generator.lognormal(-(spread**2) / 2, spread, prompts)  # a mean of `per_call`
    tokens = generator.poisson(rates * calls)
    return {f"p{i}": np.array(counts(tokens=tokens[i], target_calls=calls[i])) for i in range(prompts)}


def test_the_counts_of_a_decoding_made_by_hand():
    decoded = Decoded(
        tokens=[1, 2, 3, 9, 4, 5, 6, 7],
        blocks=[
            Block(
                [1, 2, 3], accepted=3, emitted=[1, 2, 3, 9], acceptance_probabilities=(1.0, 0.5, 0.5), extendable=3
            ),  # all 3 tested
            Block(
                [8, 8, 8], accepted=0, emitted=[4], acceptance_probabilities=(0.0, 1.0, 1.0), extendable=3
            ),  # the first one rejected
            Block(
                [5, 8, 8], accepted=1, emitted=[5, 6], acceptance_probabilities=(0.5, 0.0, 1.0), extendable=3
            ),  # 2 tested
            Block(
                [7, 8, 8], accepted=1, emitted=[7], acceptance_probabilities=(0.9, 0.9, 0.9), extendable=0
            ),  # 7 ends the sequence: 1 tested
        ],
        seconds=Seconds(0.5, 0.1, 0.3),
    )
    baseline = Decoded([1] * 6, [Block([], 0, [1])] * 6, Seconds(0.75))
    assert count(decoded, baseline) == Counts(
        tokens=8,
        target_calls=4,
        accepted=5,
        tested=7,
        seconds=0.5,
        baseline_tokens=6,
        baseline_seconds=0.75,
        drafted=12,
        expected=(1 + 1 + 0.5 + 0.25) + 1 + 1.5 + 1,
        drafting_seconds=0.1,
        verifying_seconds=0.3,
    )
    assert by_position(decoded.blocks) == ([3, 1, 1], [4, 2, 1])


def test_a_decoding_without_drafts_tests_nothing():
    decoded = Decoded(tokens=[1, 2], blocks=[Block([], 0, [1]), Block([], 0, [2])], seconds=Seconds(0.1))
    row = count(decoded, decoded)
    assert (row.accepted, row.tested) == (0, 0)
    assert block_efficiency(np.array(row)) == 1
    assert np.isnan(acceptance_rate(np.array(row)))


def test_each_ratio_of_one_row():
    row = np.array(counts(tokens=12, target_calls=5, accepted=6, tested=8, seconds=2.0, baseline_tokens=10))
    assert block_efficiency(row) == pytest.approx(2.4)
    assert acceptance_rate(row) == pytest.approx(0.75)
    assert token_rate_ratio(row) == pytest.approx((12 / 2.0) / (10 / 2.0))


def test_an_estimate_is_a_ratio_of_sums_and_not_an_average_of_ratios():
    rows = {"long": np.array(counts(tokens=100, target_calls=100)), "short": np.array(counts(tokens=4, target_calls=1))}
    value = estimate(rows, "block_efficiency").value
    assert value == pytest.approx(104 / 101)
    assert value != pytest.approx((1 + 4) / 2)


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_ratio_does_not_depend_on_how_the_counts_are_split(ratio):
    whole = counts(
        tokens=30, target_calls=12, accepted=18, tested=27, seconds=3, baseline_tokens=30, baseline_seconds=5
    )
    parts = [
        counts(tokens=10, target_calls=8, accepted=2, tested=9, seconds=2, baseline_tokens=12, baseline_seconds=1),
        counts(tokens=20, target_calls=4, accepted=16, tested=18, seconds=1, baseline_tokens=18, baseline_seconds=4),
    ]
    split = estimate(by_prompt(["a", "b"], parts), ratio).value
    assert split == pytest.approx(estimate(by_prompt(["a"], [whole]), ratio).value)


def test_counts_that_share_a_prompt_are_added():
    rows = by_prompt(["a", "b", "a"], [counts(tokens=1), counts(tokens=2), counts(tokens=3)])
    assert list(rows) == ["a", "b"]
    assert rows["a"].tolist() == (np.array(counts(tokens=1)) + np.array(counts(tokens=3))).tolist()
    assert rows["b"].tolist() == list(counts(tokens=2))


def test_prompts_without_counts_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        by_prompt(["a", "b"], [counts()])


def test_the_memory_bound_speedup_is_the_papers_formula():
    assert memory_bound_speedup(2.3, 0.0164, 3) == pytest.approx(2.3 / (0.0164 * 3 + 1))
    assert memory_bound_speedup(2.3, 0.0164, 3) == pytest.approx(2.192, abs=0.0005)
    assert memory_bound_speedup(1.0, 0.0, 5) == 1
    # A drafter as large as the target that is always accepted gains nothing: tau = gamma + 1.
    assert memory_bound_speedup(4.0, 1.0, 3) == 1


def test_an_interval_contains_the_value_and_is_deterministic():
    rows = simulate(np.random.default_rng(0), 40)
    first = estimate(rows, "block_efficiency")
    assert first.low < first.value < first.high
    assert estimate(rows, "block_efficiency") == first


def test_one_prompt_or_equal_prompts_have_an_interval_of_width_zero():
    for rows in ({"a": np.array(counts())}, {str(i): np.array(counts()) for i in range(5)}):
        value, low, high = estimate(rows, "block_efficiency")
        assert low == value == high == 2


def test_an_interval_narrows_with_the_root_of_the_number_of_prompts():
    widths = []
    for prompts in (50, 800):
        _, low, high = estimate(simulate(np.random.default_rng(1), prompts), "block_efficiency")
        widths.append(high - low)
    # 16 times the prompts, a quarter of the width; the width itself is known to about 10% from 50 prompts.
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.35)


def test_the_interval_contains_the_truth_about_95_times_in_100():
    generator, simulations, hits = np.random.default_rng(0), 500, 0
    for _ in range(simulations):
        _, low, high = estimate(simulate(generator, 80), "block_efficiency", resamples=400)
        hits += low <= 2.0 <= high
    # 500 simulations know the share to a standard deviation of 1%, and the percentile bootstrap of a skewed ratio over
    # 80 prompts is known to fall short by 1 to 2%: 95% less 2% and three standard deviations below, three above.
    assert 0.90 <= hits / simulations <= 0.98


def test_a_paired_difference_is_the_difference_of_the_two_estimates():
    generator = np.random.default_rng(0)
    ours, theirs = simulate(generator, 30, 2.5), simulate(generator, 30, 2.0)
    expected = estimate(ours, "block_efficiency").value - estimate(theirs, "block_efficiency").value
    difference = paired_difference(ours, theirs, "block_efficiency")
    assert difference.value == pytest.approx(expected)
    assert difference.low < expected < difference.high


@pytest.mark.parametrize("other", [["a", "c"], ["a"], ["a", "b", "c"]])
def test_a_paired_difference_over_different_prompts_is_refused(other):
    ours, theirs = ({name: np.array(counts()) for name in names} for names in (["a", "b"], other))
    with pytest.raises(ValueError, match="same prompts"):
        paired_difference(ours, theirs, "block_efficiency")


def test_a_paired_difference_matches_prompts_by_name_and_not_by_order():
    generator = np.random.default_rng(0)
    ours, theirs = simulate(generator, 30), simulate(generator, 30)
    reordered = dict(reversed(theirs.items()))
    # The same sums in another order: float64 rounding alone.
    assert paired_difference(ours, reordered, "block_efficiency") == pytest.approx(
        paired_difference(ours, theirs, "block_efficiency"), rel=1e-12, abs=1e-12
    )


def test_pairing_narrows_the_interval_of_correlated_measurements():
    generator = np.random.default_rng(0)
    theirs = simulate(generator, 60)
    ours = {prompt: row + np.array(counts(5, 0, 0, 0, 0, 0, 0)) for prompt, row in theirs.items()}
    paired = paired_difference(ours, theirs, "block_efficiency")
    widths = [high - low for _, low, high in (estimate(rows, "block_efficiency") for rows in (ours, theirs))]
    unpaired = float(np.hypot(*widths))  # of a difference of two independent estimates
    # The prompts' difficulty, which is nearly all of the spread here, cancels in the pair.
    assert paired.high - paired.low < unpaired / 4
    assert paired.low > 0


@pytest.mark.parametrize("ratio", RATIOS)
def test_identical_rows_differ_by_exactly_zero(ratio):
    rows = simulate(np.random.default_rng(0), 25)
    copy = {prompt: row.copy() for prompt, row in rows.items()}
    assert paired_difference(rows, copy, ratio) == (0.0, 0.0, 0.0)


def test_turns_of_a_conversation_are_resampled_together():
    rows = by_prompt(["a", "b", "a#2", "a#3"], [counts(tokens=1), counts(tokens=2), counts(tokens=3), counts(tokens=5)])
    assert [row[0] for row in rows.values()] == [9, 2]
    other = by_prompt(["a", "b"], [counts(), counts()])
    with pytest.raises(ValueError, match="needs the same prompts"):  # a conversation of other turns is no pair
        paired_difference(rows, other, "block_efficiency")


@pytest.mark.parametrize(("conversation", "turn"), [("chat:7", 1), ("chat:7", 2), ("chat:7", 12), ("c#:0", 1)])
def test_an_id_of_a_turn_is_read_back(conversation, turn):
    assert conversation_and_turn(turn_id(conversation, turn)) == (conversation, turn)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 600, 2049])
def test_every_token_has_a_range_of_positions(length):
    labels = answer_positions(length)
    assert len(labels) == length
    for position, label in enumerate(labels):
        first, _, last = label.rstrip("+").partition("-")
        assert int(first) <= position <= int(last or position)


def test_tokens_and_target_calls_of_all_labels_add_up():
    blocks = [Block([1, 2], 2, [1, 2, 3]), Block([4], 0, [6]), Block([7, 8], 1, [7, 9])]
    found = by_label(blocks, ["a", "b", "b", "b", "a", "b"])
    assert found == {"a": [5, 2], "b": [1, 1]}  # the first block is an "a" with all its tokens
