"""Requests made from the OpenAPI document, right ones and wrong ones: none is a server error, all are as documented.

SHADOWTUNE_SCHEMA_CASES sets how many are made for each operation.
"""

import collections
import dataclasses
import os

import pytest
from hypothesis import HealthCheck, Phase, settings

schemathesis = pytest.importorskip("schemathesis")

from shadowtune.config.serving import ServerConfig  # noqa: E402
from shadowtune.serving.http.app import create_app  # noqa: E402
from tests.serving.http.fakes import FakeAdapters, FakeAnswerer, FakePolicy  # noqa: E402

CASES = int(os.environ.get("SHADOWTUNE_SCHEMA_CASES", "30"))
SEEN: collections.Counter[int] = collections.Counter()
"""Responses by status."""


class Willing(FakeAnswerer):
    """Answers by every name, so that what is right gets an answer."""

    async def answer(self, request):
        return await super().answer(dataclasses.replace(request, model="echo"))


APP = create_app(
    Willing(), ServerConfig(allow_loading=True, timeout=2.0), "edge", policy=FakePolicy(), adapters=FakeAdapters()
)
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)
CHECKS = [
    schemathesis.checks.not_a_server_error,
    schemathesis.checks.CHECKS.get_one("status_code_conformance"),
    schemathesis.checks.CHECKS.get_one("content_type_conformance"),
    schemathesis.checks.CHECKS.get_one("response_schema_conformance"),
    schemathesis.checks.CHECKS.get_one("negative_data_rejection"),
]


@SCHEMA.parametrize()
@settings(
    max_examples=CASES,
    deadline=None,
    database=None,
    derandomize=CASES <= 100,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
def test_no_request_is_a_server_error(case):
    SEEN[case.call_and_validate(checks=CHECKS).status_code] += 1


def test_both_right_and_wrong_requests_were_made():
    assert SEEN[200] > CASES and SEEN[400] > CASES
