import pytest

from shadowtune.errors import ConfigError
from shadowtune.serving.engine.limits import Limits


@pytest.mark.parametrize(
    "wrong", [{"max_rows": 0}, {"max_queue": -1}, {"max_tokens": 0}, {"prefill_tokens": 0}, {"close_seconds": -1.0}]
)
def test_limits_out_of_their_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Limits(**wrong)
    assert Limits(max_queue=0, close_seconds=0.0).speculation is not None
