"""``patchsae app``: the explorer in a browser, for this machine alone unless it is told otherwise.

Voila shows a page of two cells, and every visitor has a kernel (see ``kernels``). What a stranger can send is looked at
before Jupyter's server reads it: whom a request is for, whether there is room, and the form of every frame.
"""

import functools
import json
import os
import re
import socket
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from tornado.routing import HostMatches
from tornado.web import Finish, RequestHandler
from traitlets import Int
from traitlets.config import Config
from voila.app import Voila

from patchsae.app import kernels

HERE = Path(__file__).parent
#: What the page may load. Voila's template asks another server for icons, and would wait for it without a network.
POLICY = {"default-src": "'self'", "style-src": "'self' 'unsafe-inline'", "img-src": "'self' data: blob:",
          "script-src": "'self' 'unsafe-inline' 'unsafe-eval' blob:", "font-src": "'self' data:",
          "connect-src": "'self' data: blob: ws: wss:", "frame-ancestors": "'self'"}
#: Seconds after which those who wait ask again, and after which a visit ends that nobody looks at or uses any more.
ASK_AGAIN, GONE, FORGOTTEN = 10, 60, 1200
#: What a visitor may send: bytes a second on average, bytes at once, and what a frame counts beyond its bytes.
RATE, BURST, FRAME = 2**20, 2**26, 10_000
PROTOCOL = "v1.kernel.websocket.jupyter.org"


class Door(NamedTuple):
    """Where the explorer listens, under which other names it answers, and to how many visitors at a time."""

    host: str
    port: int
    names: tuple[str, ...]
    visitors: int

    def foreign(self) -> str:
        """A pattern of names that are none of ours: a web site may bind its own to this machine's address."""
        ours = ("127.0.0.1", "localhost", "[::1]", self.host, *self.names)
        return f"(?!({'|'.join(re.escape(name.lower()) for name in ours)})$).*"


class _Refusal(RequestHandler):
    def prepare(self) -> None:
        self.set_status(403)
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish("The explorer does not answer under this name; open it under the address that it printed, or start "
                    "it with --allow-host and this name.\n")


def well_formed(frame) -> bool:
    """Whether a frame of Jupyter's websocket protocol is one: its offsets lie within it, its header is a message's.

    ``[n, offsets of the n parts' borders]``, 8 bytes each, little-endian; then the channel, header, parent, metadata,
    content, and buffers.
    """
    if not isinstance(frame, bytes) or len(frame) < 64:
        return False
    borders = int.from_bytes(frame[:8], "little")
    if not 6 <= borders <= 16 or 8 * (borders + 1) > len(frame):
        return False
    offsets = [int.from_bytes(frame[8 * i:8 * i + 8], "little") for i in range(1, borders + 1)]
    if offsets != sorted(offsets) or offsets[0] != 8 * (borders + 1) or offsets[-1] != len(frame):
        return False
    try:
        frame[offsets[0]:offsets[1]].decode()
        parts = [json.loads(frame[i:j]) for i, j in zip(offsets[1:5], offsets[2:6])]
    except (ValueError, RecursionError):
        return False
    return all(isinstance(part, dict) for part in parts) and all(
        isinstance(parts[0].get(key), str) for key in ("msg_id", "msg_type", "session"))


class Frames(ZMQChannelsWebsocketConnection):
    """A visitor's websocket; one that sends what no page sends, or more than any page would, is closed."""

    sent, at = 0.0, 0.0

    def handle_incoming_message(self, incoming_msg) -> None:
        """Pass a message on to the kernel, and forget so much a second of what came before."""
        now = time.monotonic()
        self.sent, self.at = max(0, self.sent - RATE * (now - self.at)) + len(incoming_msg) + FRAME, now
        if self.sent > BURST or self.subprotocol != PROTOCOL or not well_formed(incoming_msg):
            self.websocket_handler.close(1002, "This is not what the explorer's page sends.")
        else:
            super().handle_incoming_message(incoming_msg)


class Visits(AsyncMappingKernelManager):
    """The kernels of visitors: at most so many, and none that nobody looks at."""

    most = Int(1).tag(config=True)
    starting = 0

    async def start_kernel(self, **options) -> str:
        """Start a visitor's kernel, which counts from now on."""
        self.starting += 1
        try:
            return await super().start_kernel(**options)
        finally:
            self.starting -= 1

    async def cull_kernel_if_idle(self, kernel_id: str) -> None:
        """End a visit whose page was closed, that nobody uses, or whose kernel died."""
        kernel = self.get_kernel(kernel_id)
        patience = FORGOTTEN if self._kernel_connections.get(kernel_id) else GONE
        if datetime.now(UTC) - kernel.last_activity > timedelta(seconds=patience) or not await kernel.is_alive():
            await self.shutdown_kernel(kernel_id)


def _admit(handler, notebook, cwd) -> None:
    """Send away whom there is no room for, before a kernel is started."""
    visits, _ = handler.kernel_manager, handler.xsrf_token  # sets the cookie by which a page that closes may say so
    if len(visits) + visits.starting >= visits.most:
        handler.set_status(503)
        handler.set_header("Retry-After", str(ASK_AGAIN))
        page = (HERE / "busy.html").read_text(encoding="utf-8")
        handler.finish(page.format(seconds=ASK_AGAIN, visitors=visits.most))
        raise Finish


class Server(Voila):
    """Voila behind a door."""

    def init_handlers(self) -> list:
        """Voila's handlers, behind one for whatever is meant for somebody else."""
        self.app.listen = functools.partial(self.app.listen, max_body_size=2**20)  # nothing is posted here
        return [(HostMatches(self.app.settings["foreign"]), _Refusal), *super().init_handlers()]


def settings(door: Door) -> Config:
    """Voila's settings."""
    csp = "; ".join(f"{what} {where}" for what, where in POLICY.items())
    return Config({
        "Voila": {"ip": door.host, "port": door.port, "port_retries": 0, "open_browser": False, "log_level": "ERROR",
                  "config_file_paths": [], "kernel_websocket_connection_class": Frames,
                  "tornado_settings": {"headers": {"Content-Security-Policy": csp}, "foreign": door.foreign()}},
        "VoilaConfiguration": {"multi_kernel_manager_class": Visits, "prelaunch_hook": _admit, "file_allowlist": [],
                               "allow_template_override": "NO", "allow_theme_override": "NO"},
        "Visits": {"most": door.visitors, "cull_interval": 5, "cull_idle_timeout": GONE},
        "KernelManager": {"transport": "ipc", "autorestart": False}})


def prepare(profile: str | None) -> None:
    """Compute and keep what takes long the first time; what is missing is said here."""
    from patchsae.app.explorer import Explorer
    from patchsae.studies.study import open_study

    Explorer(open_study(profile)).warm()


def run(profile: str | None, door: Door) -> None:
    """Serve the explorer of a profile until it is interrupted."""
    if not 0 < door.port < 2**16 or door.visitors < 1:
        raise ValueError(f"The app was asked to serve {door.visitors} visitors at port {door.port}; give a port from 1 "
                         "to 65535, and at least one visitor.")
    # Progress bars have no place on the page.
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"} | ({"PROFILE": profile} if profile else {})
    try:
        family = socket.AF_INET6 if ":" in door.host else socket.AF_INET
        socket.create_server((door.host, door.port), family=family).close()
    except OSError as error:
        raise OSError(f"The explorer cannot listen at {door.host}, port {door.port} ({error.strerror}); choose another "
                      "with --host and --port.") from error
    with ProcessPoolExecutor(1, get_context("spawn")) as apart:  # its memory and its GPU are free afterwards
        apart.submit(prepare, profile).result()
    kernels.load()
    print(f"The explorer is at http://{door.host}:{door.port} for {door.visitors} visitors at a time (Ctrl-C ends it).",
          flush=True)
    Server.launch_instance(argv=[str(HERE / "page.ipynb")], config=settings(door))
