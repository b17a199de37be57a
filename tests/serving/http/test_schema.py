"""Valid and invalid requests generated from the OpenAPI document: no server errors, responses as documented.

SHADOWTUNE_SCHEMA_CASES sets how many are made for each operation.
"""

import collections
import dataclasses
import os

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

schemathesis = pytest.importorskip("schemathesis")

from schemathesis import GenerationMode  # noqa: E402

from shadowtune.config.serving import ServerConfig  # noqa: E402
from shadowtune.serving.http.app import create_app  # noqa: E402
from tests.serving.http.fakes import FakeAdapters, FakeBackend, FakePolicy  # noqa: E402

CASES = int(os.environ.get("SHADOWTUNE_SCHEMA_CASES", "30"))
SEEN: collections.Counter[int] = collections.Counter()
"""Responses by status."""


class Willing(FakeBackend):
    """Answers by every name, so that what is right gets an answer."""

    async def generate(self, request):
        return await super().generate(dataclasses.replace(request, model="echo"))


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


OPERATIONS = {result.ok().label: result.ok() for result in SCHEMA.get_all_operations()}
"""By label. They are this file's own parameters: schemathesis' own all have one name, of which xdist runs the first."""


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("label", OPERATIONS)
def test_no_request_is_a_server_error(label, mode):
    @given(case=OPERATIONS[label].as_strategy(generation_mode=mode))
    @settings(
        max_examples=CASES,
        deadline=None,
        database=None,
        derandomize=CASES <= 100,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    def ask(case):
        SEEN[case.call_and_validate(checks=CHECKS).status_code] += 1

    try:
        ask()
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE  # an operation without anything that could be wrong


def test_both_right_and_wrong_requests_were_made():
    assert SEEN[200] > CASES and SEEN[400] > CASES
