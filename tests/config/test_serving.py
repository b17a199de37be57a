import json

import pytest

from shadowtune.config.serving import (
    Arrivals,
    CloudConfig,
    CurvePoint,
    PolicyConfig,
    Prices,
    ServerConfig,
    SimulationConfig,
    Weights,
    hash_key,
)
from shadowtune.errors import ConfigError


def test_a_key_is_kept_as_its_sha256():
    assert hash_key("key") == "2c70e12b7a0646f92279f427c7b38e7334d8e5389cff167a1dc30e73f826b683"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", -1),
        ("port", 65536),
        ("max_body_bytes", 0),
        ("max_requests", 0),
        ("max_tokens", 0),
        ("timeout", 0.0),
        ("timeout", float("inf")),
        ("read_timeout", 0.0),
        ("idle_timeout", -1.0),
        ("drain_timeout", -1.0),
    ],
)
def test_values_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=field):
        ServerConfig(**{field: value})


def test_a_key_in_the_clear_is_refused_and_not_quoted():
    with pytest.raises(ConfigError, match="made by hash_key") as refused:
        ServerConfig(key_hashes=("open sesame",))
    assert "sesame" not in str(refused.value)


def test_hashes_stay_out_of_sight():
    assert hash_key("key") not in repr(ServerConfig(key_hashes=(hash_key("key"),)))


@pytest.mark.parametrize(
    "url", ["http://cloud:8000", "http://cloud:8000/", "http://cloud:8000/v1", "http://cloud:8000/v1/"]
)
def test_the_address_may_name_v1_or_not(url):
    assert CloudConfig(url).api == "http://cloud:8000/v1"


@pytest.mark.parametrize(
    "fields", [{"retries": -1}, {"read_timeout": 0}, {"deadline": 0}, {"failures": 0}, {"backoff": float("inf")}]
)
def test_numbers_out_of_their_range_are_refused(fields):
    (name,) = fields
    with pytest.raises(ConfigError, match=name):
        CloudConfig("http://cloud", **fields)


WEIGHTS = Weights(0.1, 1.0, 2.0, 3.0, 4.0, 5.0)


def test_what_is_saved_is_loaded(tmp_path):
    curve = (CurvePoint(0.0, 0.5, 0.0, 0.0), CurvePoint(1.0000000000000002, 0.9, 1.0, 7.0))
    policy = PolicyConfig("confidence", curve[1].threshold, "learned", None, WEIGHTS, Prices(1.0, 2.0, 3.0), curve)
    policy.save(tmp_path / "policy.json")
    assert PolicyConfig.load(tmp_path / "policy.json") == policy


@pytest.mark.filterwarnings("error")
def test_a_policy_of_release_0_1_0_is_loaded(tmp_path):
    point = {"threshold": 0.0, "accuracy": 0.5, "hand_over_rate": 0.25, "cost": 0.0}
    (tmp_path / "policy.json").write_text(json.dumps({"threshold": 0.7, "curve": [point]}))
    policy = PolicyConfig.load(tmp_path / "policy.json")
    assert policy == PolicyConfig(threshold=0.7, curve=(CurvePoint(0.0, 0.5, 0.25, 0.0),))
    policy.save(tmp_path / "policy.json")
    assert json.loads((tmp_path / "policy.json").read_text())["curve"][0]["deferral_rate"] == 0.25


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


def test_requests_come_at_a_rate_or_from_clients_that_wait():
    assert Arrivals.parse("poisson:0.5") == Arrivals(rate=0.5)
    assert Arrivals.parse("closed:3") == Arrivals(rate=None, clients=3)


@pytest.mark.parametrize(
    "text", ["", "poisson", "poisson:0", "poisson:-1", "poisson:nan", "poisson:inf", "closed:0", "closed:1.5", "open:2"]
)
def test_any_other_way_of_coming_is_one_line_that_names_it(text):
    with pytest.raises(ConfigError, match=r"poisson:RATE .* got") as raised:
        SimulationConfig(arrivals=text)
    assert repr(text) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"rtt_ms": -1.0},
        {"jitter_ms": float("nan")},
        {"bandwidth_mbit": 0.0},
        {"price_per_1k_tokens": -0.1},
        {"edge_speed": 0.0},
        {"cloud_speed": float("inf")},
    ],
)
def test_a_number_out_of_its_range_is_named(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        SimulationConfig(**settings)
