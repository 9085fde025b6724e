"""Foreign checkpoints: read alike in every format of torch, and nothing in them ever runs."""

import argparse
import builtins
import contextlib
import inspect
import io
import os
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import damaged, one_sentence, refused

from patchsae.weights.foreign import KNOWN, Record, read_foreign

RAN = []


class Config:
    """A settings object of a module that the reader does not have."""

    def __setstate__(self, state):
        RAN.append(state)
        self.__dict__.update(state)


class Calls:
    """An object whose pickle is a call."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.parts

    def __call__(self):
        """Only what can be called may be the function of a call."""


@pytest.fixture
def foreign_config(monkeypatch):
    """An instance whose class can be imported while it is written, and not when it is read."""
    module = types.ModuleType("sae_training.config")
    monkeypatch.setitem(sys.modules, "sae_training", types.ModuleType("sae_training"))
    monkeypatch.setitem(sys.modules, "sae_training.config", module)
    monkeypatch.setattr(Config, "__module__", module.__name__)
    module.Config = Config
    config = Config()
    config.lr, config.device, config.dtype, config.sizes = 4e-4, torch.device("cuda"), torch.float32, (1, 2)
    config.others = argparse.Namespace(seed=3)
    return config


def weights() -> dict:
    """Tensors of many types and layouts."""
    tensors = torch.nn.Linear(4, 3).half().state_dict()
    tensors["transposed"] = torch.arange(12.0).view(3, 4).t()[1:]
    tensors["shared"] = tensors["transposed"][:, 1:]
    tensors["parameter"] = torch.nn.Parameter(torch.randn(2, 3))
    tensors["scalar"], tensors["empty"] = torch.tensor(2.5), torch.empty(0, 3)
    for dtype in (torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64):
        tensors[str(dtype)] = torch.ones(3).to(dtype)
    return tensors


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal in every bit, shape and type."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_everything_torch_writes_is_read(tmp_path, foreign_config, zipped, protocol):
    tensors = weights()
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.sum().backward()
    optimizer.step()
    scheduler = {"successor": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5), "last_epoch": 3}
    plain = {"none": None, "bytes": b"abc", "set": {1, 2}, "large": 2**80, "list": [1, [2, {}]], "text": "\u00e9\n"}
    content = {"state_dict": tensors, "cfg": foreign_config, "scheduler": scheduler, "plain": plain,
               "optimizer": optimizer.state_dict(), "number": np.float32(2)}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    RAN.clear()
    found = read_foreign(tmp_path / "a.pt")
    assert list(found["state_dict"]) == list(tensors)
    assert all(same(found["state_dict"][name], tensor) for name, tensor in tensors.items())
    assert found["plain"] == plain and found["scheduler"]["last_epoch"] == 3
    live = found["scheduler"]["successor"]
    assert isinstance(live, Record) and live["T_max"] == 5 and live["optimizer"].kind.endswith("SGD")
    momentum = found["optimizer"]["state"][0]["momentum_buffer"]
    assert same(momentum, optimizer.state_dict()["state"][0]["momentum_buffer"])
    config = found["cfg"]
    assert config.kind == "sae_training.config.Config" and not RAN
    assert config["lr"] == 4e-4 and config["dtype"] is torch.float32
    assert config["device"].arguments == ("cuda",) and config["others"] == {"seed": 3}


def test_scripted_module_is_read_as_its_attributes(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).half()
    torch.jit.script(module).save(tmp_path / "a.pt")
    found = read_foreign(tmp_path / "a.pt")
    assert same(found["0"]["weight"], module[0].weight) and same(found["1"]["bias"], module[1].bias)


# Hostile files

def hostile(path) -> dict:
    """Objects whose pickles would do something, by name; all would create ``path``."""
    command = f"touch {path}"
    opened = Calls(builtins.open, str(path), "w")
    return {
        "system": Calls(os.system, command),
        "eval": Calls(builtins.eval, f"open({str(path)!r}, 'w')"),
        "exec": Calls(builtins.exec, f"open({str(path)!r}, 'w')"),
        "open": opened,
        "getattr": Calls(getattr, Calls(__import__, "os"), "system"),
        "nested": Calls(Calls(getattr, Calls(__import__, "os"), "system"), command),
        "inside a list": [[[Calls(os.system, command)]]],
        "as a key": {Calls(os.system, command): 1},
        "with state": Calls(os.system, command, state={"a": 1}),
        "popen": Calls(__import__("subprocess").Popen, ["touch", str(path)]),
        "torch.load": Calls(torch.load, str(path)),
        "numpy": Calls(np.load, str(path)),
        "partial": Calls(__import__("functools").partial, os.system, command),
    }


@pytest.mark.parametrize("name", hostile("x"))
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("beside", [True, False], ids=["beside weights", "alone"])
def test_calls_are_refused_and_none_runs(tmp_path, name, zipped, beside):
    content = hostile(tmp_path / "trace")[name]
    content = {"state_dict": weights(), "cfg": content} if beside else content
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with refused():
        read_foreign(tmp_path / "a.pt")
    assert not (tmp_path / "trace").exists()


def zip_with(path, pickled: bytes, members=None, name="archive/data.pkl", compress=zipfile.ZIP_STORED) -> Path:
    """A zip file around hand-written pickle code."""
    with zipfile.ZipFile(path, "w", compress) as archive:
        archive.writestr(name, pickled)
        for member, content in (members or {}).items():
            archive.writestr(member, content)
    return path


def tensor_code(numel, offset, size, stride, key="0", dtype="FloatStorage"):
    """A pickle of ``{"w": <tensor>}``."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, 2)
    storage = type("Storage", (), {})()
    pickler.persistent_id = lambda x: ("storage", getattr(torch, dtype), key, "cpu", numel) if x is storage else None
    pickler.dump({"w": Calls(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})})
    return buffer.getvalue()


DAMAGE = {
    "longer than its data": tensor_code(7, 0, (7,), (1,)),
    "beyond the end": tensor_code(6, 4, (3,), (1,)),
    "large stride": tensor_code(6, 0, (2, 3), (6, 1)),
    "negative stride": tensor_code(6, 5, (3,), (-1,)),
    "expanded without end": tensor_code(6, 0, (10**12,), (0,)),
    "negative size": tensor_code(-6, 0, (1,), (1,)),
    "another member": tensor_code(6, 0, (2,), (1,), key="../../secret"),
    "no member": tensor_code(6, 0, (2,), (1,), key="9"),
    "shape of text": tensor_code(6, 0, ("a",), (1,)),
    "empty stack": pickle.PROTO + b"\x02" + b"R" + b".",
    "no mark": pickle.PROTO + b"\x02" + b"t" + b".",
    "unknown memo": pickle.PROTO + b"\x02" + b"h\x09" + b".",
    "extension": pickle.PROTO + b"\x02" + b"\x82\x01" + b".",
    "unknown instruction": b"\x80\x02\xff.",
    "unhashable key": b"\x80\x02}]K\x01s.",
    "a number": b"\x80\x02K\x01.",
    "nothing": b"",
    "attributes of a list": b"\x80\x02]}b.",
    "a million digits": b"\x80\x02I" + b"9" * 10**6 + b"\n.",
    "keys that take for ever": b"\x80\x02}K\x01" + b"2\x86" * 64 + b"K\x01s.",
    "keys that take for ever, by memo": b"\x80\x02}K\x01" + b"q\x00h\x00\x86" * 64 + b"K\x01s.",
    "sets that take for ever": b"\x80\x04\x8fK\x01" + b"2\x86" * 64 + b"\x90.",
    "sizes that take for ever": b"\x80\x02}K\x01" + b"q\x000ctorch\nSize\nh\x00h\x00\x86\x85R" * 64 + b"K\x01s.",
    "a memo of gigabytes": b"\x80\x02}r\xff\xff\xff\x7fj\xfe\xff\xff\x7f.",
    "bytes of gigabytes": b"\x80\x05}K\x01\x96" + struct.pack("<Q", 2**45) + b"s.",
    "text of gigabytes": b"\x80\x04}K\x01\x8d" + struct.pack("<Q", 2**45) + b"s.",
    "a buffer from outside": b"\x80\x05}K\x01\x97s.",
    "names without end": b"\x80\x02}" + b"".join(b"ca\nB%d\n0" % i for i in range(2000)) + b".",
    "attributes of a function": b"\x80\x02}ctorch._utils\n_rebuild_tensor_v2\n}X\x0c\x00\x00\x00__defaults__K\x01sb.",
    "attributes of a class": b"\x80\x02}ca\nB\nN}X\x04\x00\x00\x00kindK\x01s\x86b.",
    "a class that is a number": b"\x80\x02}K\x01)\x81.",
    "bytes in a codec of its own": b"\x80\x02}K\x01c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00utf-7\x86Rs.",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_zip_is_one_sentence_and_changes_nothing_for_the_next_file(tmp_path, name):
    before, values = dict(KNOWN), {"archive/data/0": np.arange(6, dtype=np.float32).tobytes()}
    with refused() as error:
        read_foreign(zip_with(tmp_path / "a.pt", DAMAGE[name], values))
    assert len(str(error.value)) < 400 and KNOWN == before
    path = zip_with(tmp_path / "a.pt", tensor_code(6, 0, (2, 3), (3, 1)), values)
    assert same(read_foreign(path)["w"], torch.arange(6.0).view(2, 3)) and inspect.signature(KNOWN[
        "torch._utils._rebuild_tensor_v2"]).parameters["stride"].default is inspect.Parameter.empty


def test_no_module_is_imported(tmp_path):
    read_foreign(zip_with(tmp_path / "a.pt", b"\x80\x02}."))  # the codec of zip files is loaded by the first of them
    before = set(sys.modules)
    for module in ("antigravity", "idlelib.idle", "turtledemo.clock", "torch._inductor", "patchsae.nothing"):
        path = zip_with(tmp_path / "a.pt", b"\x80\x02}K\x01c%s\nThing\ns." % module.encode())
        with contextlib.suppress(ValueError):
            read_foreign(path)
    assert set(sys.modules) == before


class Settings(dict):
    """Settings as some programs keep them: a dictionary with attributes."""


def test_dictionaries_of_other_classes_and_records_in_themselves_are_read(tmp_path):
    settings = Settings(lr=0.1, sizes=(1, 2))
    settings.seed = 3
    around = Settings(inner=settings)
    around["itself"] = around
    torch.save({"cfg": around, "twice": [settings, settings]}, tmp_path / "a.pt")
    found = read_foreign(tmp_path / "a.pt")
    assert found["cfg"]["itself"] is found["cfg"] and found["cfg"].kind.endswith("Settings")
    assert found["cfg"]["inner"] == {"lr": 0.1, "sizes": (1, 2), "seed": 3} and found["twice"][0] is found["twice"][1]


def test_things_inside_each_other_without_end(tmp_path):
    deep = b"]" * 10**5 + b"a" * (10**5 - 1)
    with refused():
        read_foreign(zip_with(tmp_path / "a.pt", b"\x80\x02" + deep + b"."))
    record = b"ca\nB\n)\x81}X\x01\x00\x00\x00a"
    deep = b"\x80\x02" + record * 10**4 + b"K\x01" + b"sb" * 10**4 + b"."
    assert isinstance(read_foreign(zip_with(tmp_path / "a.pt", deep))["a"]["a"], Record)


def test_tensors_take_no_more_memory_than_the_file(tmp_path):
    """A hundred views of one memory, and one tensor under two names."""
    views = {f"row {i}": row for i, row in enumerate(torch.arange(10_000.0).view(100, 100))}
    views |= {"once": (ones := torch.ones(1000)), "again": ones}
    torch.save(views, tmp_path / "a.pt")
    found = read_foreign(tmp_path / "a.pt")
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found.values()}
    assert sum(memory.values()) <= (tmp_path / "a.pt").stat().st_size
    assert all(same(found[name], tensor) for name, tensor in views.items())


def test_zip_bombs_are_refused_and_nothing_is_unpacked(tmp_path):
    code, values = tensor_code(6, 0, (6,), (1,)), {"archive/data/0": bytes(24)}
    good = zip_with(tmp_path / "good.pt", code, values | {"../outside": b"x", "/etc/outside": b"x"})
    assert read_foreign(good)["w"].shape == (6,)
    assert not list(tmp_path.parent.glob("outside")) and not Path("/etc/outside").exists()
    # The central directory claims a terabyte for the tensor's member.
    claim = bytearray(zip_with(tmp_path / "a.pt", code, values).read_bytes())
    at = claim.rindex(b"PK\x01\x02")
    claim[at + 20:at + 28] = struct.pack("<II", 2**32 - 2, 2**32 - 2)
    (tmp_path / "a.pt").write_bytes(claim)
    for words, path in {
            "claim": tmp_path / "a.pt",
            "compressed": zip_with(tmp_path / "b.pt", code, {"archive/data/0": bytes(10**7)}, compress=8),
            "data.pkl": zip_with(tmp_path / "c.pt", code, values, name="archive/other.pkl"),
            "2 members": zip_with(tmp_path / "d.pt", code, values | {"second/data.pkl": code})}.items():
        with refused(words):
            read_foreign(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_flipped_and_truncated_files_are_one_sentence_or_a_dict(tmp_path, zipped):
    """A zip file carries checksums, so there nothing changes unseen; the old format has none."""
    tensors = weights()
    torch.save({"state_dict": tensors, "epoch": 5}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    good, numbers, path = (tmp_path / "a.pt").read_bytes(), np.random.default_rng(0), tmp_path / "b.pt"
    for trial in range(300):
        path.write_bytes(damaged(good, numbers, cut=trial % 3 == 0, flips=1 + trial % 5))
        try:
            found = read_foreign(path)
        except ValueError as error:
            assert one_sentence(error), error
            continue
        if zipped:
            assert all(same(found["state_dict"][name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04", b"\x80\x02.", b"{}", bytes(1000), None])
def test_other_files_and_none_are_one_sentence(tmp_path, content):
    if content is not None:
        (tmp_path / "a.pt").write_bytes(content)
    for path in (tmp_path / "a.pt", tmp_path):
        with refused():
            read_foreign(path)
