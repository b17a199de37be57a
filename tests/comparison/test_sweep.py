from shadowtune.comparison.sweep import best_settings


class Trial:
    """A trial that has been done."""

    def __init__(self, rate, accuracy=0.5, loss=1.0, error=None, method="lora"):
        self.task, self.method, self.setting = "t", method, {"rate": rate}
        self._row = {"error": error, "evaluations": [{"accuracy": accuracy, "loss": loss}] if error is None else []}

    def result(self):
        return self._row


def test_the_most_accurate_trial_of_each_method_is_best_and_the_loss_decides_between_equals():
    trials = [Trial(1, 0.5, 0.1), Trial(2, 0.7, 0.9), Trial(3, 0.7, 0.8), Trial(4, 0.1, 0.2, method="dora")]
    assert best_settings(trials, "accuracy") == {("t", "lora"): {"rate": 3}, ("t", "dora"): {"rate": 4}}


def test_the_loss_alone_can_decide():
    assert best_settings([Trial(1, 0.5, 0.1), Trial(2, 0.7, 0.9)], "loss") == {("t", "lora"): {"rate": 1}}


def test_a_failed_trial_is_worse_than_any():
    assert best_settings([Trial(1, error="nan"), Trial(2, 0.0, 99.0)], "accuracy") == {("t", "lora"): {"rate": 2}}


def test_where_all_failed_there_is_nothing_to_choose():
    trials = [Trial(1, error="nan"), Trial(2, error="other"), Trial(3, method="dora")]
    assert best_settings(trials, "accuracy") == {("t", "dora"): {"rate": 3}}
