"""Serve the explorer in a browser: to this machine alone, without its code, and asking nothing of the network.

``APP_PORT`` and ``APP_HOST`` choose another port or address; any address but this machine's own lets others in, and
whoever is in can upload pictures and use this machine's processors.
"""

import os
from pathlib import Path

from traitlets.config import Config
from voila.app import Voila

from patchsae.app.explorer import open_explorer
from patchsae.config import start

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "explorer.ipynb"
HOST, PORT = os.environ.get("APP_HOST", "127.0.0.1"), int(os.environ.get("APP_PORT", "8866"))
#: What the page may load. Voila's template asks another server for icons, and would wait for it without a network.
POLICY = {"default-src": "'self'", "style-src": "'self' 'unsafe-inline'", "img-src": "'self' data: blob:",
          "script-src": "'self' 'unsafe-inline' 'unsafe-eval' blob:", "font-src": "'self' data:",
          "connect-src": "'self' data: blob: ws: wss:", "frame-ancestors": "'self'"}


def settings() -> Config:
    """Voila's settings."""
    csp = "; ".join(f"{what} {where}" for what, where in POLICY.items())
    return Config({
        "Voila": {"ip": HOST, "port": PORT, "port_retries": 0, "open_browser": False, "log_level": "ERROR",
                  "tornado_settings": {"headers": {"Content-Security-Policy": csp}}},
        # The page stands without the pictures of it and the checks.
        "TagRemovePreprocessor": {"enabled": True, "remove_cell_tags": {"static"}},
        # Every visitor has a kernel; one that nobody looks at any more goes.
        "MappingKernelManager": {"cull_interval": 60, "cull_idle_timeout": 1200}})


if __name__ == "__main__":
    # Progress bars have no place on the page.
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    open_explorer(start())  # what takes long the first time is kept, and what is missing is said here
    print(f"The explorer is at http://{HOST}:{PORT} (Ctrl-C ends it).", flush=True)
    Voila.launch_instance(argv=[str(NOTEBOOK)], config=settings())
