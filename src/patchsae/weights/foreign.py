"""Reading checkpoints that others wrote with ``torch.save``, without running anything that is in them."""

import struct
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import torch

from patchsae.weights.pickles import Machine, Record, Refused, Storage, short

#: Bytes of the pickled part of a zip file, whose tensors lie beside it.
LARGEST_PICKLE = 2**25
#: What a file in the format before torch 1.6 begins with, and the version of that format.
LEGACY_MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001


def read_foreign(path: str | Path) -> dict:
    """The content of a checkpoint written with ``torch.save`` or ``torch.jit.save``, by any version of torch.

    Returns nested dicts (ordered ones as well), lists, tuples, sets, numbers, strings, tensors on the CPU and, for
    objects of every other class, ``Record``; a file that holds one object gives the object's attributes. Nothing in
    the file is imported, called or unpacked to disk, and its tensors take no more memory than the file has bytes. A
    file that is damaged, or asks for a function to be called, is a ``ValueError`` of one sentence.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {path}; give the path of a file written with torch.save.")
    try:
        content = _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
        if isinstance(content, Record):
            content = content.fields
        if not isinstance(content, dict):
            raise Refused("it holds no dictionary of weights")
        return content
    except Refused as reason:
        raise ValueError(f"{path} is not read: {reason}; fetch it again from a source you trust.") from None
    except Exception as error:  # damaged bytes fail in as many ways as there are bytes
        reason = f"{type(error).__name__} {short(str(error))}".strip()
        raise ValueError(f"{path} is damaged or no torch checkpoint ({reason}); fetch it again.") from error


def _read_zip(path: Path):
    """The format since torch 1.6: members ``<name>/data.pkl`` and, per storage, ``<name>/data/<key>``."""
    with zipfile.ZipFile(path) as archive:
        members = _members(archive, path.stat().st_size)
        pickles = [name for name in members if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise Refused(f"it is a zip file with {len(pickles)} members called data.pkl, so torch did not write it")
        root = pickles[0].split("/")[0]
        order = archive.read(f"{root}/byteorder") if f"{root}/byteorder" in members else b"little"
        if order != b"little" or sys.byteorder != "little":
            raise Refused("its numbers are in the byte order of another kind of machine")
        if members[pickles[0]] > LARGEST_PICKLE:
            raise Refused(f"what is not tensors has {members[pickles[0]]:,} bytes, more than any checkpoint needs")
        raw = {}

        def load(dtype: torch.dtype, key: str, numel: int) -> Storage:
            name = f"{root}/data/{key}"
            if members.get(name) != numel * dtype.itemsize:
                raise Refused(f"tensor data {short(name)} is missing or of another size than it should be")
            if key not in raw:
                raw[key] = bytearray(archive.read(name))
            return Storage(_flat(raw[key], dtype))

        return Machine(load).run(BytesIO(archive.read(pickles[0])))


def _members(archive: zipfile.ZipFile, size: int) -> dict[str, int]:
    """Name -> size of the members that hold data; their sizes, as declared, must fit into the file."""
    members = {}
    for info in archive.infolist():
        parts = info.filename.split("/")
        if ".." in parts or not parts[0] or "\\" in info.filename or ":" in parts[0]:
            raise Refused(f"it has a member outside its own folder, {short(info.filename)!r}")
        if info.filename in members:
            raise Refused(f"it has two members called {short(info.filename)!r}")
        if parts[1:2] in (["data.pkl"], ["data"], ["byteorder"]):
            if info.compress_type != zipfile.ZIP_STORED:
                raise Refused(f"its member {short(info.filename)!r} is compressed, which torch never does")
            members[info.filename] = info.file_size
    if sum(members.values()) > size:
        raise Refused(f"its members claim {sum(members.values()):,} bytes in a file of {size:,}")
    return members


def _read_legacy(path: Path):
    """The format before torch 1.6: five pickles in a row, then the storages."""
    storages, total, size = {}, 0, path.stat().st_size

    def load(dtype: torch.dtype, key: str, numel: int) -> Storage:
        nonlocal total
        if key not in storages:
            total += numel * dtype.itemsize
            if numel < 0 or total > size:
                raise Refused(f"its tensors claim {total:,} bytes in a file of {size:,}")
            storages[key] = Storage(torch.zeros(numel, dtype=dtype))
        if (storages[key].values.dtype, len(storages[key].values)) != (dtype, numel):
            raise Refused(f"tensor data {short(key)} is claimed with two types or sizes")
        return storages[key]

    with open(path, "rb") as file:
        if file.read(1) != b"\x80":
            raise Refused("it is neither a zip file nor a pickle, so torch did not write it")
        file.seek(0)
        machine = Machine(load)
        magic, version, system = (machine.run(file) for _ in range(3))
        if (magic, version) != (LEGACY_MAGIC, LEGACY_VERSION) or not system["little_endian"]:
            raise Refused("it is a pickle, but not a checkpoint of torch on a machine of this byte order")
        content, keys = machine.run(file), machine.run(file)
        if sorted(keys) != sorted(storages):
            raise Refused("the list of its tensors does not go with the tensors")
        for key in keys:
            _fill(storages[key].values, file, key)
    return content


def _fill(values: torch.Tensor, file, key: str) -> None:
    """Read one storage of the old format: its length as int64, then its values."""
    (numel,) = struct.unpack("<q", file.read(8))
    raw = bytearray(file.read(values.nbytes))
    if numel != len(values) or len(raw) != values.nbytes:
        raise Refused(f"tensor data {short(key)} is cut short")
    values.copy_(_flat(raw, values.dtype))


def _flat(raw: bytearray, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
