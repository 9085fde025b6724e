"""Fifty visitors at once, hostile frames and foreign hosts at the explorer, from this machine (``make stress-app``).

Every visitor opens the page, turns to another image and waits for the answer; whoever is told to wait asks again. All
of it ends three minutes after the server's start at the latest, and with it every process that was started.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from jupyter_client.session import Session
from jupyter_server.services.kernels.connection.base import deserialize_msg_from_ws_v1, serialize_msg_to_ws_v1
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest
from tornado.iostream import StreamClosedError
from tornado.websocket import WebSocketClosedError, websocket_connect

ROOT = Path(__file__).resolve().parents[1]
PROTOCOL = "v1.kernel.websocket.jupyter.org"
#: Seconds that a visitor stays, and in which the server must answer whoever is next, whatever it was sent.
STAY, ALIVE = 2, 60
#: Seconds that the server may take to start, and all the rest; and the most visitors.
START, LIMIT, MOST = 300, 180, 50


class Explorer:
    """A server of its own. ``peak``: the most memory that it and its kernels took, shared pages counted once."""

    def __init__(self, visitors: int):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address, self.visitors, self.peak, self.processes = f"http://127.0.0.1:{self.port}/", visitors, 0, set()

    async def __aenter__(self):
        environment = os.environ | {"IPYTHONDIR": str(ROOT / "build" / "ipython"), "PROFILE": "mini"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "patchsae", "app", "--port", str(self.port), "--visitors", str(self.visitors)]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        self.watching = asyncio.create_task(self._watch())
        return self

    async def answering(self) -> None:
        """Wait until it answers."""
        while self.process.poll() is None:
            with contextlib.suppress(OSError):
                return (await asyncio.open_connection("127.0.0.1", self.port))[1].close()
            await asyncio.sleep(0.5)
        raise OSError("The explorer's server ended before it answered; start it alone to see why.")

    async def __aexit__(self, *_):
        self.watching.cancel()
        self.process.terminate()
        _, left = psutil.wait_procs(self.processes, timeout=20)
        for process in left:
            process.kill()
        self.process.wait()

    async def _watch(self) -> None:
        while True:
            total = 0
            with contextlib.suppress(psutil.Error):
                server = psutil.Process(self.process.pid)
                self.processes |= {server, *server.children(recursive=True)}
            for process in self.processes:
                with contextlib.suppress(psutil.Error):
                    memory = process.memory_full_info()
                    total += getattr(memory, "pss", memory.rss)
            self.peak = max(self.peak, total)
            await asyncio.sleep(2)

    async def get(self, path: str = "", **headers):
        """What the server answers, whatever its status."""
        request = HTTPRequest(self.address + path, headers=headers, request_timeout=LIMIT, connect_timeout=LIMIT)
        return await AsyncHTTPClient(max_clients=200).fetch(request, raise_error=False)

    async def connect(self, kernel: str, protocol: str | None = PROTOCOL, **headers):
        """A websocket to a kernel."""
        address = f"ws://127.0.0.1:{self.port}/api/kernels/{kernel}/channels?session_id={os.urandom(8).hex()}"
        request = HTTPRequest(address, headers=headers, connect_timeout=LIMIT)
        return await websocket_connect(request, subprotocols=[protocol] if protocol else None)


def frame_of(kind: str, content: dict) -> bytes:
    """The frame of a message."""
    return serialize_msg_to_ws_v1(Session().msg(kind, content), "shell", lambda part: json.dumps(
        part, default=str).encode())


def update(model: str, state: dict) -> bytes:
    """The frame in which a page says what was chosen."""
    return frame_of("comm_msg", {"comm_id": model, "data": {"method": "update", "state": state, "buffer_paths": []}})


async def visit(explorer: Explorer, number: int) -> bool:
    """Open the page, however often one has to ask, and use it; whether somebody was told to wait."""
    told = False
    while (page := await explorer.get(f"?dataset=nouns/test&image={number}")).code == 503:
        assert "asks again" in page.body.decode()
        told = True
        await asyncio.sleep(random.uniform(0.5, 1) * int(page.headers["Retry-After"]))
    text = page.body.decode()
    kernel, model = re.search(r'"kernelId": "([^"]+)"', text)[1], re.search(r'"model_id": "([^"]+)"', text)[1]
    line = await explorer.connect(kernel)
    with tempfile.TemporaryDirectory() as folder:  # no code of a visitor's is run
        await line.write_message(frame_of("execute_request", {"code": f"open({folder!r} + '/a', 'w')"}), binary=True)
        await line.write_message(update(model, {"image": number + 1, "scope": "words", "query": "\u00b2 \ud83d",
                                                "threshold": float("nan"), "asked": 1}), binary=True)
        await _answer(line)
        assert not os.listdir(folder)
    await asyncio.sleep(STAY)
    line.close()
    token = re.search("_xsrf=([^;]*)", " ".join(page.headers.get_list("Set-Cookie")))[1]
    await AsyncHTTPClient().fetch(f"{explorer.address}voila/api/shutdown/{kernel}", method="POST",  # as the page does
                                  body=f"_xsrf={token}", headers={"Cookie": f"_xsrf={token}"})
    return told


async def _answer(line) -> None:
    """Wait until the kernel says that what was asked for is there."""
    while True:
        _, parts = deserialize_msg_from_ws_v1(await line.read_message())
        if json.loads(parts[3]).get("data", {}).get("state", {}).get("answered") == 1:
            return


def hostile_frames(n: int) -> list:
    """Frames that no page sends: counts and offsets beyond the frame, cut and changed ones, headers that are none."""
    numbers = random.Random(0)
    good, deep = update("0" * 32, {"image": 1}), b"[" * 100_000
    frames = [b"\xff" * 40, b"", b"\0" * 8, b"\xff" * 8 + b"\0" * 100_000, (2**40).to_bytes(8, "little") + good[8:],
              good[:-1], good + b"x", good.decode("latin-1"), "{}", "[" * 100_000,
              serialize_msg_to_ws_v1([deep, b"{}", b"{}", b"{}"], "shell"),
              serialize_msg_to_ws_v1([b"[]", b"{}", b"{}", b"{}"], "shell"),
              serialize_msg_to_ws_v1([b"{}"], "shell"),
              serialize_msg_to_ws_v1([b"{}", b"{}", b"{}", b"1" * 9], "shell"),
              serialize_msg_to_ws_v1([b'{"msg_id": 1, "msg_type": [], "session": {}}', b"{}", b"{}", b"{}"], "shell"),
              serialize_msg_to_ws_v1([b"{}"] * 40, "shell")]
    while len(frames) < n:
        frame = bytearray(good)
        frame[numbers.randrange(56)] ^= 1 << numbers.randrange(8)  # the count or an offset
        frames.append(bytes(frame) if numbers.random() < 0.5 else numbers.randbytes(numbers.randrange(200)))
    return frames[:n]


async def attack(explorer: Explorer, kernel: str, frame, times: int = 1) -> bool:
    """Send a frame; whether the line was closed at once, and somebody else was answered in time."""
    # Texts are sent in the older protocol, which has no count to lie about and is not spoken here.
    line = await explorer.connect(kernel, PROTOCOL if isinstance(frame, bytes) else None)
    with contextlib.suppress(WebSocketClosedError, StreamClosedError):
        for _ in range(times):
            await line.write_message(frame, binary=isinstance(frame, bytes))
    while await asyncio.wait_for(line.read_message(), ALIVE) is not None:
        pass
    await asyncio.wait_for(explorer.get("voila/static/main.js"), ALIVE)
    return line.close_code == 1002


def foreign_hosts(port: int) -> list[str]:
    """Host headers under which nobody opened the explorer."""
    names = ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "evil.example@127.0.0.1", "0.0.0.0",
             "[::]", "127.0.0.2", "2130706433", "localhost.", "10.0.0.1", "xn--lcalhost-54a", "127.0.0.1:80@evil"]
    return [*(f"{name}:{port}" for name in names), *names, f"localhost:{port}:80", f"127.0.0.1:{port}.evil.example"]


async def intrude(explorer: Explorer, kernel: str, host: str) -> bool:
    """Ask for the page, a file and a kernel under a foreign name; whether all was refused."""
    paths = ("", "voila/static/main.js", f"api/kernels/{kernel}")
    codes = [(await explorer.get(path, Host=host)).code for path in paths]
    try:
        (await explorer.connect(kernel, Host=host)).close()
        codes.append(101)
    except HTTPClientError as error:
        codes.append(error.code)
    return set(codes) <= {400, 403}


async def stress(visitors: int, places: int, frames: int) -> dict:
    """All of it at once, against a server with so many places, of which the attackers take one."""
    async def in_turn(work) -> list[bool]:
        return [await one for one in work]

    async with Explorer(places) as explorer:
        await asyncio.wait_for(explorer.answering(), START)
        kernel = re.search(r'"kernelId": "([^"]+)"', (await explorer.get()).body.decode())[1]
        attacks = [attack(explorer, kernel, frame) for frame in hostile_frames(frames - 1)]
        attacks.append(attack(explorer, kernel, update("0" * 32, {"query": "x" * 2**20}), times=80))
        intrusions = [intrude(explorer, kernel, host) for host in foreign_hosts(explorer.port)]
        work = [in_turn(attacks), in_turn(intrusions), *(visit(explorer, number) for number in range(visitors))]
        refused, foreign, *answers = await asyncio.gather(
            *(asyncio.wait_for(one, LIMIT) for one in work), return_exceptions=True)
        problems = [one for one in (refused, foreign, *answers) if isinstance(one, BaseException)]
        return {"visitors": (sum(isinstance(answer, bool) for answer in answers), visitors),
                "told-to-wait": (sum(answer is True for answer in answers), visitors),
                "hostile-frames": (0 if refused in problems else sum(refused), len(attacks)),
                "foreign-hosts": (0 if foreign in problems else sum(foreign), len(intrusions)),
                "peak": explorer.peak / 2**30, "problems": problems}


def main() -> None:
    """Print what came of it; end with an error if anything was not as it must be."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--visitors", type=int, default=MOST, choices=range(1, MOST + 1), metavar="N")
    options.add_argument("--places", type=int, default=8)
    options.add_argument("--frames", type=int, default=200)
    chosen, begin = options.parse_args(), time.monotonic()
    found = asyncio.run(stress(chosen.visitors, chosen.places, chosen.frames))
    for problem in found["problems"][:3]:
        print(repr(problem))
    print("visitors {} of {} answered".format(*found["visitors"]))
    print("visitors {} of {} told to wait first".format(*found["told-to-wait"]))
    print("hostile-frames {} of {} refused".format(*found["hostile-frames"]))
    print("foreign-hosts {} of {} refused".format(*found["foreign-hosts"]))
    print(f"peak-memory {found['peak']:.1f} GB")
    print(f"time {time.monotonic() - begin:.0f} s")
    whole = all(found[name][0] == found[name][1] for name in ("visitors", "hostile-frames", "foreign-hosts"))
    sys.exit(0 if whole and found["peak"] < 4 else "Somebody was not answered, or something not refused; see above.")


if __name__ == "__main__":
    main()
