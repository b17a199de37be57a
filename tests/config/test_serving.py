import pytest

from shadowtune.config.serving import ServerConfig, hash_key
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
