"""Losses on maps, against cases worked out by hand and finite differences."""

import math

import pytest
import torch

from dittune.words.map_losses import contrast, neglect, retention, segregation, unevenness


def maps(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 5, dtype=torch.float64, generator=generator)


def test_segregation_sums_over_pairs():
    left = torch.zeros(2, 4)
    left[:, :2] = 1
    assert segregation(torch.stack([left, 1 - left])) == 0
    assert segregation(torch.stack([left, left])) == 0.5
    assert segregation(torch.stack([left, left, 1 - left])) == 0.5
    assert segregation(torch.stack([left, left, left])) == 1.5
    assert segregation(left[None]) == 0


def test_retention_is_at_least_a_half_a_map():
    mask = torch.zeros(1, 2, 4, dtype=torch.bool)
    mask[..., :2] = True
    assert retention(mask.float(), mask) == 0.5
    assert retention(1 - mask.float(), mask) == 1
    assert retention(0.5 * mask.float(), mask).item() == pytest.approx(1 - 1 / 3)


def test_neglect_is_of_the_word_that_is_seen_least():
    values = torch.zeros(2, 2, 2)
    values[0, 0, 0], values[1, 1, 1] = 0.9, 0.3
    assert neglect(values).item() == pytest.approx(0.7)
    assert neglect(values.clamp_min(1.0)) == 0
    assert neglect(values + 1.0) == 0  # never below 0
    assert neglect(values, 0.5).item() == pytest.approx(0.2) and neglect(values, 0.3) == 0


def contrast_by_hand(vectors, labels, temperature):
    """NT-Xent in plain numbers, pair by pair."""
    rows = [row / row.norm() for row in vectors]
    count, terms = len(rows), []
    for i in range(count):
        for j in range(count):
            if i == j or labels[i] != labels[j]:
                continue
            top = math.exp(float(rows[i] @ rows[j]) / temperature)
            others = [
                math.exp(float(rows[i] @ rows[n]) / temperature)
                for n in range(count)
                if labels[n] != labels[i]
            ]
            terms.append(-math.log(top / (top + sum(others))))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("labels", [[0, 0, 1, 1], [0, 1, 0, 2], [0, 0, 0, 1, 1, 2]])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_contrast_by_hand(labels, temperature):
    torch.manual_seed(1)
    vectors = torch.randn(len(labels), 7, dtype=torch.float64)
    ours = contrast(vectors, torch.tensor(labels), temperature)
    assert ours.item() == pytest.approx(contrast_by_hand(vectors, labels, temperature), rel=1e-9)
    assert contrast(5 * vectors, torch.tensor(labels), temperature).item() == pytest.approx(
        ours.item()
    )


def test_contrast_does_not_depend_on_the_order_of_words():
    torch.manual_seed(1)
    vectors, labels = torch.randn(5, 7), torch.tensor([0, 0, 1, 1, 2])
    order = torch.tensor([4, 1, 3, 0, 2])
    torch.testing.assert_close(
        contrast(vectors[order], labels[order], 0.5), contrast(vectors, labels, 0.5)
    )


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2], [0]])
def test_contrast_needs_a_pair_and_another_label(labels):
    vectors = torch.randn(len(labels), 4, requires_grad=True)
    loss = contrast(vectors, torch.tensor(labels), 0.5)
    assert loss == 0
    loss.backward()
    assert not vectors.grad.any()


def test_unevenness_by_hand():
    # Two words, four pixels, one bump. theta = 0.4, so that each should have a fifth.
    values = torch.tensor([[0.9, 0.9, 0.9, 0.9], [0.0, 0.0, 0.0, 0.4]], dtype=torch.float64)
    peak = 0.0 + (0.4 * 0.7 - 0.9) ** 2  # the quantile lies at 0.9 * 3 = 2.7
    shares = (0.9 - 0.2) ** 2 + (0.1 - 0.2) ** 2
    weights = torch.tensor([[0.5], [2.0]], dtype=torch.float64)
    expected = peak / 2 + 80 * shares / 2 + 0.09 * (0.25 + 4) / 2
    assert unevenness(values, weights).item() == pytest.approx(expected)


def test_unevenness_of_many_words_shares_everything():
    values = torch.full((10, 6), 0.1, dtype=torch.float64)  # 0.2 * 10 words would be 2
    even = unevenness(values, torch.zeros(10, 1, dtype=torch.float64))
    assert even.item() == pytest.approx((0.1 - 0.9) ** 2)


@pytest.mark.parametrize(
    "loss",
    [
        segregation,
        lambda x: retention(x, maps(seed=4) > 0.5),
        neglect,
        lambda x: contrast(x.flatten(1), torch.tensor([0, 0, 1]), 0.5),
        lambda x: unevenness(x.flatten(1), x[:, 0]),
    ],
    ids=["segregation", "retention", "neglect", "contrast", "unevenness"],
)
def test_gradients_are_those_of_finite_differences(loss):
    values = maps().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(values), values)
    assert gradient.any()
    assert torch.autograd.gradcheck(loss, (values,))
