import random
from dataclasses import replace

import pytest

from shadowtune.config.serving import Prices, Weights
from shadowtune.errors import ConfigError, ShadowtuneError
from shadowtune.evaluation.report import new_figure, png
from shadowtune.serving.edge.calibration import (
    calibrate,
    fit_learned_router,
    out_of_fold_confidences,
    plot_calibration,
)
from shadowtune.serving.edge.confidence import Signals, learned_confidence
from shadowtune.serving.edge.thresholds import CalibrationExample, CalibrationTarget


def rows(count=400, seed=0, tagged=0.0):
    """The edge is right as often as ``margin`` says; the other signals are noise; the cloud is always right."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        logprob, margin, entropy, first = (draw.uniform(0.01, 0.99) for _ in range(4))
        right = float(draw.random() < margin)
        found.append(
            CalibrationExample(Signals(logprob, margin, entropy, first, 3), draw.random() < tagged, right, 1.0, 5.0)
        )
    return found


def mixed(count=600, seed=0):
    """The edge is right where ``margin`` and ``first`` together say so: neither alone is enough."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        logprob, margin, entropy, first = (draw.uniform(0.01, 0.99) for _ in range(4))
        right = float(margin + first + draw.gauss(0, 0.1) > 1)
        found.append(CalibrationExample(Signals(logprob, margin, entropy, first, 3), False, right, 1.0, 5.0))
    return found


def made(data, target=("deferral-rate", 0.3), signal="auto", minimum=0):
    return calibrate(data, CalibrationTarget(*target), signal, "[REMOTE]", Prices(), minimum)


def test_the_signal_that_tells_most_is_found_and_the_threshold_holds_on_the_other_half():
    done = made(rows())
    quality = {each.router: each for each in done.qualities}
    assert done.policy.signal in ("margin", "learned")
    for name in ("logprob", "entropy", "first", "random"):
        assert quality["margin"].checked.value > quality[name].checked.value + 0.05
    assert quality["oracle"].checked.value >= quality["margin"].checked.value
    assert done.promised.deferral_rate <= 0.3
    assert done.found.deferral_rate == pytest.approx(done.promised.deferral_rate, abs=0.1)
    assert done.found.accuracy == pytest.approx(done.promised.accuracy, abs=0.1)
    assert len(done.scores) == 200
    assert sum(done.scores) / 200 == pytest.approx(done.found.accuracy)


def test_what_is_learned_from_all_signals_beats_each_of_them_on_rows_it_never_saw():
    done = made(mixed())
    assert done.policy.signal == "learned"
    assert done.policy.weights is not None
    quality = {each.router: each.checked.value for each in done.qualities}
    others = [value for name, value in quality.items() if name not in ("learned", "oracle")]
    assert quality["learned"] > max(others) + 0.02


def test_a_signal_that_was_asked_for_is_taken():
    done = made(rows(), signal="first")
    assert (done.policy.signal, done.policy.weights) == ("first", None)
    assert done.promised in done.policy.curve
    assert done.policy.threshold == done.promised.threshold


def test_the_same_rows_give_the_same_policy():
    assert made(rows()).policy == made(rows()).policy


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_rows_are_enough(count):
    done = made([CalibrationExample(Signals(0.5, 0.5, 0.5, 0.5, 1), False, 0.0, 1.0, 1.0)] * count, ("accuracy", 1.0))
    assert done.promised.deferral_rate == 1
    assert (done.found is None) == (count == 1)


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_an_edge_that_is_always_or_never_right_is_learned(right):
    data = [CalibrationExample(row.signals, False, right, 1.0, 1.0) for row in rows(40)]
    done = made(data, ("accuracy", 1.0), "learned")
    assert done.promised.deferral_rate == 1 - right
    assert all((sure > 0.5) == bool(right) for sure in out_of_fold_confidences(data))


def test_the_tag_is_always_deferred_and_teaches_nothing():
    data = rows(tagged=0.5)
    assert fit_learned_router(data) == fit_learned_router([row for row in data if not row.tagged])
    assert fit_learned_router([row for row in data if row.tagged]) == Weights(0, 0, 0, 0, 0, 0)
    with pytest.raises(ShadowtuneError, match="tag alone"):
        made(data, ("deferral-rate", 0.1))
    assert made(data, ("deferral-rate", 0.7)).found.deferral_rate == pytest.approx(0.7, abs=0.1)


def test_held_out_confidences_do_not_know_their_own_row():
    data = rows(50)
    turned = [data[0].__class__(data[0].signals, False, 1 - data[0].edge_score, 1.0, 5.0), *data[1:]]
    assert out_of_fold_confidences(data)[0] == out_of_fold_confidences(turned)[0]
    assert out_of_fold_confidences(data)[1] != out_of_fold_confidences(turned)[1]


def test_more_regularized_than_certain():
    data = [CalibrationExample(Signals(n / 10, 0.5, 0.5, 0.5, 2), False, float(n > 5), 1.0, 1.0) for n in range(1, 10)]
    weights = fit_learned_router(data)
    sure = [learned_confidence(weights, row.signals) for row in data]
    assert sure == sorted(sure)
    assert sure[0] < 0.2 < 0.8 < sure[-1]
    assert abs(weights.logprob) < 100


def test_qualities_have_intervals_that_hold_them():
    done = made(rows())
    quality = {each.router: each for each in done.qualities}
    assert quality["margin"].auroc.low > 0.7 > quality["entropy"].auroc.low
    assert quality["entropy"].auroc.low < 0.5 < quality["entropy"].auroc.high
    assert quality["margin"].calibration_error.value < 0.12 < quality["entropy"].calibration_error.value
    for each in done.qualities:
        measured = [each.checked, each.auroc, each.calibration_error]
        assert all(one.low <= one.value <= one.high + 1e-9 for one in measured[: 1 if each.auroc is None else 2])
    assert (quality["oracle"].auroc, quality["random"].calibration_error) == (None, None)
    assert sum(each.count for each in done.policy.reliability) == 200


def test_a_guaranteed_loss_is_kept_on_new_rows():
    done = made(rows(2000), ("accuracy-loss", 0.1), "margin")
    assert done.found is None
    assert done.promised in done.policy.curve and done.policy.examples == 1000
    new = [row for row in rows(20_000, seed=9) if row.signals.margin >= done.policy.threshold]
    assert sum(1 - row.edge_score for row in new) / 20_000 <= 0.1
    assert done.promised.deferral_rate < 0.75


def test_a_deferral_head_gives_signals_and_without_one_they_are_refused():
    headed = [
        replace(row, signals=replace(row.signals, agreement=row.signals.margin, deferral=row.signals.first))
        for row in rows()
    ]
    done = made(headed, signal="agreement")
    assert done.policy.signal == "agreement" and done.policy.reads_deferral_head
    assert {each.router for each in done.qualities} >= {"agreement", "deferral"}
    assert fit_learned_router(headed).agreement != 0.0
    with pytest.raises(ConfigError, match="needs a deferral head"):
        made(rows(), signal="agreement")
    assert "agreement" not in {each.router for each in made(rows()).qualities}


def test_one_kind_of_rows_is_refused():
    with pytest.raises(ShadowtuneError, match="better in 0 of 400"):
        made([replace(row, edge_score=1.0) for row in rows()], minimum=5)


def test_the_picture_is_drawn():
    figure = new_figure(9, 3.6)
    plot_calibration(figure, made(rows(60)))
    assert png(figure).startswith(b"\x89PNG")
    lines = {line.get_label() for line in figure.axes[0].get_lines()}
    assert {"logprob", "learned", "random", "chosen", "checked"} <= lines


def test_the_picture_has_a_unit_of_costs_and_no_percentage_that_there_cannot_be():
    figure = new_figure(11, 4.5)
    plot_calibration(figure, made(rows()))
    shares, costs = figure.axes
    assert costs.get_xlabel() == "cost of a request, in cloud tokens"
    for low, high in (shares.get_xlim(), shares.get_ylim(), costs.get_ylim()):
        assert 0 <= low < high <= 100
    assert costs.get_xlim()[0] == 0
