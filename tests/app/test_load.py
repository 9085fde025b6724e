"""The explorer's server: what it lets in, how many it serves, and that nobody is lost when many come."""

import asyncio
import random
from datetime import UTC, datetime, timedelta

import pytest
from conftest import one_sentence
from jupyter_client.session import Session
from jupyter_server.services.kernels.connection.base import deserialize_msg_from_ws_v1, serialize_msg_to_ws_v1
from stress_app import foreign_hosts, hostile_frames, stress, update
from tornado.httputil import HTTPHeaders, HTTPServerRequest

from patchsae.app import serve
from patchsae.app.serve import Door, Visits, well_formed


def test_frames_of_a_page_pass_whatever_they_hold():
    numbers, session = random.Random(0), Session()
    for _ in range(200):
        buffers = [numbers.randbytes(numbers.randrange(2000)) for _ in range(numbers.randrange(3))]
        content = {"comm_id": "0" * 32, "data": {"state": {"query": "²\ud83d" * numbers.randrange(40)}}}
        message = session.msg("comm_msg", content)
        parts = [session.pack(message[key]) for key in ("header", "parent_header", "metadata", "content")]
        frame = serialize_msg_to_ws_v1([*parts, *buffers], "shell")
        assert well_formed(frame) and deserialize_msg_from_ws_v1(frame) == ("shell", [*parts, *buffers])


def test_hostile_frames_do_not():
    assert not [frame for frame in hostile_frames(3000) if well_formed(frame)]
    good = update(Session(), "0" * 32, {"image": 1})
    assert well_formed(good) and not any(well_formed(good[:i]) for i in range(len(good)))
    assert not any(well_formed(frame) for frame in (None, "text", 5, [], bytearray(good)))


def test_only_our_own_names_are_answered():
    def refused(door: Door, host: str) -> bool:
        headers = HTTPHeaders({"Host": host} if host else {})
        request = HTTPServerRequest("GET", "/", headers=headers, host=host)
        return serve._ForeignHost(door.hosts()).match(request) is not None

    door = Door("127.0.0.1", 8866)
    assert not any(refused(door, f"{name}:8866") for name in ("127.0.0.1", "localhost", "[::1]", "LOCALHOST"))
    assert all(refused(door, host) for host in ["", *foreign_hosts(8866)])
    named = Door("0.0.0.0", 80, ("Demo.example", "other.example:443"))
    assert not any(refused(named, host) for host in ("demo.example", "demo.example:80", "other.example:443"))
    assert all(refused(named, host) for host in ("other.example", "0.0.0.0:80", "demo.example:8866", "example"))


def test_what_a_visitor_sends_is_counted_and_forgotten(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(serve.time, "monotonic", lambda: now[0])
    visits = Visits()
    assert all(visits.may_send("a", 2**20) for _ in range(60)) and visits.may_send("b", 2**20)
    assert not all(visits.may_send("a", 2**20) for _ in range(10)) and visits.may_send("b", 2**20)
    now[0] += 60
    assert visits.may_send("a", 2**20)
    for _ in range(9000):  # a slider that is held for three minutes
        now[0] += 0.02
        assert visits.may_send("c", 500)


@pytest.mark.parametrize("connections, idle, alive, ends", [
    (1, 30, True, False), (1, 600, True, False), (1, 1300, True, True), (0, 30, True, False), (0, 90, True, True),
    (1, 1, False, True)])
def test_visits_end_when_nobody_looks(monkeypatch, connections, idle, alive, ends):
    visits, ended = Visits(), []

    class Kernel:
        last_activity = datetime.now(UTC) - timedelta(seconds=idle)

        async def is_alive(self):
            return alive

    async def shutdown(kernel_id):
        ended.append(kernel_id)

    monkeypatch.setattr(visits, "get_kernel", lambda _: Kernel())
    monkeypatch.setattr(visits, "shutdown_kernel", shutdown)
    visits._kernel_connections = {"a": connections}
    asyncio.run(visits.cull_kernel_if_idle("a"))
    assert ended == (["a"] if ends else [])


def test_room_is_made_by_memory_and_processors(monkeypatch):
    monkeypatch.setattr(serve.os, "cpu_count", lambda: 2)
    each = 400 * 2**20
    for free, expected in ((2**40, 8), (4 * 2**30, 5), (2**20, 1)):
        monkeypatch.setattr(serve.psutil, "virtual_memory", lambda free=free: type("Memory", (), {"available": free}))
        assert serve.room_for(each) == expected


def test_a_place_that_cannot_be_served_is_one_sentence():
    with serve.socket.create_server(("127.0.0.1", 0)) as taken:
        for door in (Door("127.0.0.1", taken.getsockname()[1]), Door("192.0.2.1", 8866), Door("127.0.0.1", 10**6),
                     Door("127.0.0.1", 0), Door("127.0.0.1", 8866, (), -1)):
            with pytest.raises((OSError, ValueError), match="port") as error:
                serve.run("mini", door)
            assert one_sentence(error.value)


def test_everybody_is_answered():
    found = asyncio.run(stress(visitors=8, places=2, frames=30))
    assert not found["problems"], found["problems"]
    for name in ("visitors", "hostile-frames", "foreign-hosts"):
        assert found[name][0] == found[name][1], found
    assert found["told-to-wait"][0] >= 4 and found["peak"] < 4
