import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from kvc.core.ranking import Ranking
from kvc.core.results import bootstrap, bootstrap_mean, bootstrap_weights, interval


def sample(seed: int, levels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 200)
    scores = rng.integers(0, levels, 200) / levels + 0.2 * labels if levels else rng.random(200) + 0.2 * labels
    return scores, labels, rng.integers(0, 11, 200)


@pytest.mark.parametrize("levels", [0, 5])  # 5: many ties
def test_values_are_those_of_scikit_learn_with_ties_and_weights(levels: int) -> None:
    for seed in range(5):
        scores, labels, units = sample(seed, levels)
        ranking = Ranking(scores, labels, units)
        resamples = [np.ones(11, dtype=int), *bootstrap_weights(11, seed, 6)]
        for weights in resamples:
            weight = weights[units]
            ap = average_precision_score(labels, scores, sample_weight=weight)
            auc = roc_auc_score(labels, scores, sample_weight=weight)
            assert ranking.average_precision(weights) == pytest.approx(ap, abs=1e-12)
            assert ranking.roc_auc(weights) == pytest.approx(auc, abs=1e-12)


@pytest.mark.parametrize("levels", [0, 5])
def test_best_f1_is_the_best_of_all_thresholds(levels: int) -> None:
    for seed in range(5):
        scores, labels, units = sample(seed, levels)
        best, threshold = Ranking(scores, labels, units).best_f1(np.ones(11))
        brute = max(f1_score(labels, scores >= t) for t in np.unique(scores))
        assert best == pytest.approx(brute, abs=1e-12)
        assert f1_score(labels, scores >= threshold) == pytest.approx(brute, abs=1e-12)


def test_one_class_alone_has_no_value() -> None:
    ranking = Ranking(np.array([0.1, 0.2]), np.array([0, 0]), np.array([0, 1]))
    assert np.isnan(ranking.average_precision(np.ones(2)))
    assert np.isnan(ranking.roc_auc(np.ones(2)))


def test_resampled_away_units_do_not_count() -> None:
    scores, labels, units = sample(3, 5)
    weights = np.ones(11)
    weights[4] = 0
    kept = units != 4
    ap = average_precision_score(labels[kept], scores[kept])
    assert Ranking(scores, labels, units).average_precision(weights) == pytest.approx(ap, abs=1e-12)


def test_bootstrap_weights_draw_n_units_each_time() -> None:
    weights = bootstrap_weights(9, 1, 500)
    assert (weights.sum(1) == 9).all()
    assert np.allclose(weights.mean(0), 1, atol=0.2)
    assert np.array_equal(weights, bootstrap_weights(9, 1, 500))
    assert not np.array_equal(weights, bootstrap_weights(9, 2, 500))


def test_bootstrap_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered, width = 0, []
    for trial in range(200):
        value = bootstrap_mean(rng.normal(0.5, 1, 60).tolist(), trial, 300)
        assert value.low is not None
        assert value.high is not None
        covered += value.low <= 0.5 <= value.high
        width.append(value.high - value.low)
    assert 0.88 <= covered / 200 <= 0.99
    assert np.mean(width) == pytest.approx(2 * 1.96 / np.sqrt(60), rel=0.1)


def test_bootstrap_of_a_statistic_equals_resampling_by_hand() -> None:
    scores, labels, units = sample(2, 0)
    weights = bootstrap_weights(11, 0, 20)
    ours = bootstrap(Ranking(scores, labels, units).average_precision, weights)
    rows = [np.concatenate([np.flatnonzero(units == u) for u in np.repeat(np.arange(11), row)]) for row in weights]
    by_hand = [average_precision_score(labels[row], scores[row]) for row in rows]
    assert np.allclose(ours, by_hand)
    value = interval(0.5, ours, 11)
    assert (value.low, value.high) == pytest.approx(tuple(np.percentile(by_hand, [2.5, 97.5])))


def test_yes_and_no_get_wilsons_interval() -> None:
    def wilson(hits: int, n: int) -> tuple[float, float]:
        z, p = 1.959963984540054, hits / n
        middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)

    for hits, n in ((100, 100), (0, 7), (13, 40)):
        value = bootstrap_mean([1] * hits + [0] * (n - hits), 0)
        assert (value.low, value.high) == pytest.approx(wilson(hits, n), abs=1e-9)
        assert value.value == hits / n
        assert value.n == n
