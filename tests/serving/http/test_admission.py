"""Admission control: capacity is shared between clients."""

import pytest

from shadowtune.config.serving import ServerConfig
from shadowtune.serving.http.admission import AdmissionController
from shadowtune.serving.requests import RequestError
from tests.serving.http.fakes import FakeBackend


def test_some_capacity_is_reserved_for_other_clients():
    admission = AdmissionController(FakeBackend(), ServerConfig(max_requests=8))
    for _ in range(2):
        admission.acquire("greedy", 3)
    with pytest.raises(RequestError, match="6 answers of this client are under way, of at most 6") as refused:
        admission.acquire("greedy", 1)
    assert refused.value.status == 429
    admission.acquire("other", 2)
    admission.release("greedy", 3)
    admission.acquire("greedy", 3)
    for owner, count in (("greedy", 3), ("greedy", 3), ("other", 2)):
        admission.release(owner, count)
    assert not admission._owners and admission.in_progress == 0


def test_keys_and_addresses_are_owners(asking, chat):
    from shadowtune.config.serving import hash_key

    client = asking(key_hashes=(hash_key("one"), hash_key("two")))
    for key in ("one", "two", "one"):
        client.post("/v1/chat/completions", json=chat(), headers={"authorization": f"Bearer {key}"})
    first, second, third = (request.owner for request in client.backend.asked)
    assert first == third != second and "one" not in first
    keyless = asking()
    keyless.post("/v1/chat/completions", json=chat())
    assert keyless.backend.asked[0].owner == "testclient"
