import json

import pytest

from shadowtune.config.policy import CurvePoint, PolicyConfig, Prices, Weights
from shadowtune.errors import ConfigError

WEIGHTS = Weights(0.1, 1.0, 2.0, 3.0, 4.0, 5.0)


def test_what_is_saved_is_loaded(tmp_path):
    curve = (CurvePoint(0.0, 0.5, 0.0, 0.0), CurvePoint(1.0000000000000002, 0.9, 1.0, 7.0))
    policy = PolicyConfig("confidence", curve[1].threshold, "learned", None, WEIGHTS, Prices(1.0, 2.0, 3.0), curve)
    policy.save(tmp_path / "policy.json")
    assert PolicyConfig.load(tmp_path / "policy.json") == policy


def test_a_part_of_a_policy_is_one(tmp_path):
    (tmp_path / "policy.json").write_text('{"threshold": 1}')
    assert PolicyConfig.load(tmp_path / "policy.json") == PolicyConfig(threshold=1.0)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "confidant"}, "did you mean confidence"),
        ({"threshold": 1.1}, "threshold must be"),
        ({"threshold": float("nan")}, "threshold must be"),
        ({"signal": "learned"}, "needs its weights"),
        ({"kind": "tag", "tag": None}, "needs a tag"),
    ],
)
def test_what_is_no_policy_is_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        PolicyConfig(**fields)


def test_a_negative_price_is_refused():
    with pytest.raises(ConfigError, match="prompt must be at least 0"):
        Prices(prompt=-1.0)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"treshold": 1}', '{"curve": [{"threshold": 1}]}', "[" * 100_000, "\udcff"]
)
def test_a_damaged_file_is_named_on_one_line(tmp_path, text):
    (tmp_path / "policy.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ConfigError, match=r"policy\.json: ") as caught:
        PolicyConfig.load(tmp_path / "policy.json")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*none\.json"):
        PolicyConfig.load(tmp_path / "none.json")


def test_the_file_is_plain_json(tmp_path):
    PolicyConfig().save(tmp_path / "policy.json")
    assert json.loads((tmp_path / "policy.json").read_text())["prices"] == {
        "prompt": 1.0,
        "completion": 1.0,
        "request": 0.0,
    }
