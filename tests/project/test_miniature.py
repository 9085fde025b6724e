"""``PROFILE=paper`` in miniature: the real formats on made-up files, checked, fetched from a server of the test's own,
and run through notebooks 01 to 05, with an autoencoder trained here and with the authors' file."""

import hashlib
import http.server
import json
import re
import threading
from pathlib import Path

import pytest
from make_miniature import MODEL, REVISION, main
from notebook_key import notebook_key
from test_notebooks import REPOSITORY, RUN, python

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def miniature(tmp_path_factory) -> Path:
    """A project folder that holds what the paper's profile reads."""
    folder = tmp_path_factory.mktemp("paper") / "miniature"
    main(folder)
    return folder


def run(miniature: Path, profile: str, *arguments: str, **variables: str) -> str:
    """What an interpreter says in the repository, about the miniature."""
    home = {"PATCHSAE_HOME": str(miniature), "HF_HOME": str(miniature / "huggingface"), "TQDM_DISABLE": "1"}
    return python(REPOSITORY, profile, *arguments, **(home | variables))


def contents(folder: Path) -> dict[str, str]:
    """Every file of a folder and the hash of its bytes."""
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def test_it_is_small_and_the_same_every_time(miniature, tmp_path):
    main(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(miniature)
    assert sum(path.stat().st_size for path in miniature.rglob("*") if path.is_file()) < 4e6
    with pytest.raises(SystemExit, match="already"):
        main(tmp_path / "again")


#: Calls ``check`` for profiles, one after another; whatever stops is printed too.
CHECK = """
import sys
from patchsae.project import check
for name in sys.argv[1:]:
    try:
        print(check.run(name, False))
    except FileNotFoundError as error:
        print("STOPS", error)
"""


def test_check_counts_the_images_once(miniature):
    """A subset is whole as it is; by the published counts every task lacks images, and ImageNet stops everything."""
    text = (miniature / "profiles" / "miniature.toml").read_text()
    (miniature / "profiles" / "whole.toml").write_text(text.replace("subset = true", "subset = false"))
    (miniature / "data" / "whole").mkdir()
    (miniature / "data" / "whole" / "images").symlink_to(miniature / "data" / "miniature" / "images")
    subset, whole = run(miniature, "miniature", "-c", CHECK, "miniature", "whole").split("Profile whole")
    assert "MISSING" not in subset and re.findall(r"absent +(\S+)", subset) == ["CIFAR100"]
    assert "MISSING  ImageNet" in whole and "absent   Caltech101" in whole
    assert "(16 of 4,128 train images, 12 of 2,465 test images)" in whole
    assert "6 classes that are not the 1000 of ImageNet" in whole.partition("STOPS")[2]
    noted = json.loads((miniature / "data" / "miniature" / "run" / "image_counts.json").read_text())
    assert (noted["imagenet"]["train"], noted["imagenet"]["test"], noted["ucf101"]["train"]) == (60, 24, 16)


def test_other_weights_and_hidden_images_are_other_keys(miniature, monkeypatch):
    """What a notebook computes is out of date when the authors' file is another one, or an image is not there."""
    monkeypatch.setenv("PATCHSAE_HOME", str(miniature))

    def key():
        return notebook_key("02_latent_statistics", "given", REPOSITORY)

    before, weights = key(), miniature / "out.pt"
    image = next((miniature / "data" / "miniature" / "images" / "dtd").rglob("*.jpg"))
    content = weights.read_bytes()
    weights.write_bytes(content + b" ")
    other = key()
    weights.write_bytes(content)
    hidden = image.rename(image.with_name(f".{image.name}"))
    fewer = key()
    hidden.rename(image)
    assert len({before, other, fewer}) == 3 and key() == before


# Fetching

class Hub(http.server.BaseHTTPRequestHandler):
    """A hub with one model, which behaves as the server's ``mode`` says. /mode/<mode> changes that."""

    def log_message(self, *_) -> None:
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        server, path = self.server, self.path.partition("?")[0]
        if path.startswith("/mode/"):
            server.mode, server.cuts = path.removeprefix("/mode/"), 0
            return self.answer(200)
        if server.mode in ("401", "404", "503"):
            return self.answer(int(server.mode))
        if server.mode == "gated":
            return self.answer(403, X_Error_Code="GatedRepo")
        files = {name: file.read_bytes() for name, file in server.files.items()}
        info = [{"rfilename": name, "path": name, "type": "file", "size": len(body), "oid": "0" * 40}
                | ({"lfs": {"sha256": (digest := hashlib.sha256(body).hexdigest()), "oid": digest, "size": len(body),
                            "pointerSize": 134}} if name == WEIGHTS else {}) for name, body in files.items()]
        if path == f"/api/models/{MODEL}/revision/{REVISION}":
            return self.answer(200, json.dumps({"id": MODEL, "sha": REVISION, "siblings": info}).encode())
        if path == f"/api/models/{MODEL}/tree/{REVISION}":
            return self.answer(200, json.dumps(info).encode())
        name = path.removeprefix(f"/{MODEL}/resolve/{REVISION}/")
        return self.file(name, files[name]) if name in files else self.answer(404)

    def file(self, name: str, body: bytes) -> None:
        digest, server = hashlib.sha256(body).hexdigest(), self.server
        named = {"ETag": f'"{digest}"', "X_Linked_Etag": f'"{digest}"', "X_Linked_Size": str(len(body)),
                 "X_Repo_Commit": REVISION}
        if name == WEIGHTS and server.mode == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        cut = name == WEIGHTS and self.command == "GET" and (server.mode == "broken" or server.mode == "cut"
                                                             and not server.cuts)
        self.answer(200, body[:len(body) // 2] if cut else body, len(body), **named)
        server.cuts += cut


@pytest.fixture
def hub(miniature):
    """A running server that has the miniature's model."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.mode, server.cuts = "well", 0

    snapshot = miniature / "huggingface" / "hub" / f"models--{MODEL.replace('/', '--')}" / "snapshots" / REVISION
    server.files = {file.name: file for file in snapshot.iterdir()}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


#: Fetches once in each mode of the server, and prints what was said.
FETCH = """
import json, os, sys, time, urllib.request
wait, time.sleep = time.sleep, lambda seconds: wait(min(seconds, 0.01))
from huggingface_hub import constants
from patchsae.project import fetch
for mode in sys.argv[1:]:
    if mode == "down":
        constants.ENDPOINT = "http://127.0.0.1:9"  # where nobody answers
    urllib.request.urlopen(os.environ["MODE"] + mode).read()
    try:
        said = fetch.run("miniature")
    except OSError as error:
        said = str(error)
    print("SAID", json.dumps([mode, said.splitlines()]))
"""


def test_every_way_a_server_can_fail_is_another_sentence(miniature, hub, tmp_path):
    address = f"http://127.0.0.1:{hub.server_port}"
    said = run(miniature, "miniature", "-c", FETCH, *"401 404 gated 503 broken corrupt cut well down".split(),
               HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0", HF_ENDPOINT=address, MODE=f"{address}/mode/",
               HF_HUB_DISABLE_XET="1")
    lines = {mode: lines for mode, lines in map(json.loads, re.findall(r"^SAID (.*)", said, re.M))}
    model = {mode: text[0].partition(": ")[2] for mode, text in lines.items()}
    images = {mode: next(line for line in text if line.startswith("cifar100")) for mode, text in lines.items()}
    assert all("caltech101: there" in text and len(text) == 15 for text in lines.values())  # nothing stops the rest
    for mode, words in {"401": "log in here", "404": "of that name", "gated": "licence must be accepted",
                        "503": "(503); try again"}.items():
        for told, page in ((model[mode], MODEL), (images[mode], "uoft-cs/cifar100")):
            assert words in told and page in told and told.endswith((".", "private."))
    assert "transfer broke off" in model["broken"] and "check the network" in model["down"]
    assert len({re.sub(r"\w+/\w+", "", text) for text in model.values()}) == 8
    # Corrupt bytes are removed; cut once, the library goes on by itself; the next two find the same files.
    assert "model.safetensors" in model["corrupt"] and "was removed" in model["corrupt"]
    assert model["cut"] == model["well"] and hashlib.sha256(
        hub.files[WEIGHTS].read_bytes()).hexdigest() in model["well"]
    assert all(text[-1].endswith("could not be fetched.") for text in lines.values())


#: The notebooks under one profile after another. Figures are drawn once and small: to draw them three times, for the
#: screen and two files, takes most of the time of a small run.
NOTEBOOKS = f"""
import io, os, pathlib, sys
from matplotlib.figure import Figure
draw, drawn = Figure.savefig, {{}}

def savefig(figure, file, format, **options):
    if id(figure) not in drawn:
        draw(figure, content := io.BytesIO(), format="png", dpi=20)
        drawn[id(figure)] = figure, content.getvalue()
    (file.write_bytes if isinstance(file, pathlib.Path) else file.write)(drawn[id(figure)][1])

Figure.savefig = savefig
for profile in sys.argv[2:]:
    os.environ["PROFILE"] = profile
    exec({RUN!r})
"""


def test_notebooks_run_with_weights_of_both_kinds(miniature):
    """One image is damaged and CIFAR-100 is not there: both are said and stop nothing."""
    said = run(miniature, "miniature", "-c", NOTEBOOKS, "0[1-5]*.ipynb", "miniature", "given")
    done = re.findall(r"^DONE: (\S+)", said, re.M)
    assert len(done) == 10 and len(set(done)) == 5 and "LEFT OUT" not in said
    assert said.count("Left out, for want of their images: cifar100") == 10
    for profile in ("miniature", "given"):
        names = {path.stem for path in (miniature / "figures" / profile).glob("*.png")}
        assert len(names) > 15 and {"02_latent_scatter", "03_reference_images", "05_masking"} <= names
    assert list((miniature / "data" / "miniature" / "run" / "sae").iterdir())
