"""The explorer's server: what it lets in, how many it serves, and that nobody is lost when many come."""

import asyncio
import json
import random
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from conftest import one_sentence
from jupyter_client.session import Session
from jupyter_server.services.kernels.connection.base import deserialize_msg_from_ws_v1, serialize_msg_to_ws_v1
from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection
from stress_app import foreign_hosts, hostile_frames, stress, update
from tornado.httputil import split_host_and_port
from tornado.routing import HostMatches

from patchsae.app import serve
from patchsae.app.serve import PROTOCOL, Door, Frames, well_formed


def test_frames_of_a_page_pass_whatever_they_hold():
    numbers = random.Random(0)
    for _ in range(200):
        buffers = [numbers.randbytes(numbers.randrange(2000)) for _ in range(numbers.randrange(3))]
        content = {"comm_id": "0" * 32, "data": {"state": {"query": "²\ud83d" * numbers.randrange(40)}}}
        message = Session().msg("comm_msg", content)
        keys = ("header", "parent_header", "metadata", "content")
        parts = [json.dumps(message[key], default=str).encode() for key in keys]
        frame = serialize_msg_to_ws_v1([*parts, *buffers], "shell")
        assert well_formed(frame) and deserialize_msg_from_ws_v1(frame) == ("shell", [*parts, *buffers])


def test_hostile_frames_do_not():
    assert not [frame for frame in hostile_frames(3000) if well_formed(frame)]
    good = update("0" * 32, {"image": 1})
    assert well_formed(good) and not any(well_formed(good[:i]) for i in range(len(good)))
    assert not any(well_formed(frame) for frame in (None, "text", 5, [], bytearray(good)))


def test_only_our_own_names_are_answered():
    def refused(door: Door, host: str) -> bool:
        request = SimpleNamespace(host_name=split_host_and_port(host.lower())[0])
        return HostMatches(door.foreign()).match(request) is not None

    door = Door("127.0.0.1", 8866, (), 8)
    assert not any(refused(door, name + port) for name in ("127.0.0.1", "localhost", "[::1]", "LOCALHOST")
                   for port in ("", ":8866", ":9000"))  # another port may lead here, as through a tunnel
    assert all(refused(door, host) for host in foreign_hosts(8866))
    named = Door("10.0.0.7", 80, ("Demo.example",), 8)
    assert not any(refused(named, host) for host in ("demo.example", "DEMO.example:443", "10.0.0.7"))
    assert all(refused(named, host) for host in ("example", "a.demo.example", "demo-example", "10.0.0.70"))


def test_what_a_visitor_sends_is_counted_and_forgotten(monkeypatch):
    now, taken, closed = [1000.0], [], []
    monkeypatch.setattr(serve.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(ZMQChannelsWebsocketConnection, "handle_incoming_message", lambda _, frame: taken.append(frame))
    handler = type("Handler", (), {"close": lambda _, *why: closed.append(why), "selected_subprotocol": PROTOCOL})
    monkeypatch.setattr(Frames, "websocket_handler", handler())
    large, small = (update("0" * 32, {"query": "x" * size}) for size in (2**20, 100))

    def send(line, frame, times=1, pause=0.0):
        for _ in range(times):
            now[0] += pause
            line.handle_incoming_message(frame)
        return len(closed)

    line, slider = (Frames.__new__(Frames) for _ in range(2))
    assert send(line, large, 60) == 0 and send(line, large, 10) > 0
    before = send(line, large, 1, 60)
    assert send(slider, small, 9000, 0.02) == before  # held for three minutes


@pytest.mark.parametrize("connections, idle, alive, ends", [
    (1, 30, True, False), (1, 600, True, False), (1, 1300, True, True), (0, 30, True, False), (0, 90, True, True),
    (1, 1, False, True)])
def test_visits_end_when_nobody_looks(monkeypatch, connections, idle, alive, ends):
    visits, ended = serve.Visits(), []

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


def test_a_place_that_cannot_be_served_is_one_sentence():
    with serve.socket.create_server(("127.0.0.1", 0)) as taken:
        for host, port, visitors in (("127.0.0.1", taken.getsockname()[1], 8), ("192.0.2.1", 8866, 8),
                                     ("127.0.0.1", 10**6, 8), ("127.0.0.1", 0, 8), ("127.0.0.1", 8866, 0)):
            with pytest.raises((OSError, ValueError), match="port") as error:
                serve.run("mini", Door(host, port, (), visitors))
            assert one_sentence(error.value)


def test_everybody_is_answered():
    found = asyncio.run(stress(visitors=3, places=2, frames=20))
    assert not found["problems"], found["problems"]
    for name in ("visitors", "hostile-frames", "foreign-hosts"):
        assert found[name][0] == found[name][1], found
    assert found["told-to-wait"][0] == 2 and found["peak"] < 4
