"""One client cannot hold everything."""

import asyncio

import pytest

from shadowtune.config.serving import ServerConfig
from shadowtune.serving.http.desk import Desk
from shadowtune.serving.requests import Request, RequestError
from tests.serving.http.fakes import FakeAnswerer


async def never():
    await asyncio.Event().wait()


def asked(owner, count):
    return [Request("hang", prompt="a b", owner=owner) for _ in range(count)]


def test_a_part_of_the_places_is_left_to_other_clients():
    async def run():
        desk = Desk(FakeAnswerer(), ServerConfig(max_requests=8), dict)
        flows = [await desk.open(asked("greedy", 3), 3, never) for _ in range(2)]
        with pytest.raises(RequestError, match="6 answers of this client are under way, of at most 6") as refused:
            await desk.open(asked("greedy", 1), 1, never)
        assert refused.value.status == 429
        flows.append(await desk.open(asked("other", 2), 2, never))
        await desk.close(flows.pop(0), 200)
        flows.append(await desk.open(asked("greedy", 3), 3, never))
        for flow in flows:
            await desk.close(flow, 200)
        assert not desk._owners

    asyncio.run(run())


def test_keys_and_addresses_are_owners(asking, chat):
    from shadowtune.config.serving import hash_key

    client = asking(key_hashes=(hash_key("one"), hash_key("two")))
    for key in ("one", "two", "one"):
        client.post("/v1/chat/completions", json=chat(), headers={"authorization": f"Bearer {key}"})
    first, second, third = (request.owner for request in client.answerer.asked)
    assert first == third != second and "one" not in first
    keyless = asking()
    keyless.post("/v1/chat/completions", json=chat())
    assert keyless.answerer.asked[0].owner == "testclient"
