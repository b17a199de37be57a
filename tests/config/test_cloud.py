import pytest

from shadowtune.config.cloud import CloudConfig
from shadowtune.errors import ConfigError


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
