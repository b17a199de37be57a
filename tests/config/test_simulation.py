import pytest

from shadowtune.config.simulation import Arrivals, SimulationConfig
from shadowtune.errors import ConfigError


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
