"""Reading checkpoints that others wrote with ``torch.save``, without running anything that is in them.

A pickle is a program, and a checkpoint is data. The standard library's unpickler follows the program here, but what it
may reach is ours: no name is imported, a few stand for tensors and plain containers, every other class for an inert
``Record``, and calling any other function is refused.
"""

import io
import math
import pickle
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING  # old protocols use the module names of Python 2
from collections.abc import Callable
from pathlib import Path

import torch

from patchsae.weights.files import load_tensors

#: Bytes of what is not tensors, and names, that one file may use; official ones have some ten thousands and dozens.
LARGEST_PICKLE, MOST_NAMES = 2**23, 1000
#: What a file in the format before torch 1.6 begins with, and the version of that format.
LEGACY = 0x1950A86A20F9469CFC6C, 1001
#: Classes of Python's own that only hold values; they become records like the classes of other packages.
VALUE_CLASSES = ("argparse.", "collections.", "datetime.", "decimal.", "fractions.", "pathlib.",
                 "types.SimpleNamespace", "uuid.")
#: Calls that become records though they are not named like classes.
INERT = ("torch.device", "numpy.dtype", "numpy.ndarray", *(
    f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")))


class Refused(ValueError):
    """Why a file is not read: the middle of a sentence."""


class Record(dict):
    """An object of a class that is not imported: its attributes; ``kind`` and ``arguments`` say what made it."""

    kind, inert, arguments = "", True, ()
    __hash__ = object.__hash__  # as what it stands for has

    def __new__(cls, *arguments, **named):
        if not cls.inert:
            raise Refused(f"it asks to call {short(cls.kind)!r}, which no checkpoint needs")
        record = super().__new__(cls)
        record.arguments = (*arguments, *named.values())
        return record

    def __init__(self, *arguments, **named):
        """Arguments are not attributes."""

    def __setstate__(self, state):
        for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):
            self.update(part if isinstance(part, dict) else {} if part is None else {"state": part})


class Tuple(tuple):
    """A tuple that cannot be the key of a dictionary: the hash of nested ones can take for ever."""

    __hash__ = None


def short(text: str, most: int = 80) -> str:
    """Text of a file as a message may show it: on one line, and not long."""
    return ascii(text[:most])[1:-1]


def _tensor(memory, offset, size, stride, *_) -> torch.Tensor:
    """A tensor as a view of its memory, a flat tensor; that it lies inside is checked by torch."""
    if math.prod(size) > len(memory):
        raise Refused(f"a tensor of shape {short(str(list(size)))} reaches beyond its {len(memory):,} values")
    return torch.as_strided(memory, tuple(size), tuple(stride), offset)


#: What a name stands for, where it stands for more than a record.
KNOWN: dict[str, Callable | torch.dtype] = {
    "collections.OrderedDict": dict, "collections.defaultdict": lambda _=None, items=(): dict(items),
    "builtins.set": set, "builtins.frozenset": frozenset, "torch.Size": Tuple,
    "_codecs.encode": lambda text, encoding: text.encode({"latin1": "latin1"}[encoding]),  # bytes of old protocols
    "copyreg._reconstructor": lambda kind, *_: kind(),
    "torch._utils._rebuild_tensor": _tensor, "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch.jit._pickle.restore_type_tag": lambda value, _: value,
    **{f"torch.jit._pickle.build_{kind}list": list for kind in ("int", "double", "bool", "tensor")},
    **{str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
    **{f"torch.{kind}Storage": dtype for kind, dtype in {
        "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
        "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
        "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128}.items()}}
#: Instructions that make tuples, and those that no checkpoint needs: objects registered in this process as extensions,
#: buffers beside the file, and byte arrays of any length that is claimed.
TUPLES = pickle.TUPLE + pickle.TUPLE1 + pickle.TUPLE2 + pickle.TUPLE3
LEFT_OUT = pickle.EXT1 + pickle.EXT2 + pickle.EXT4 + pickle.NEXT_BUFFER + pickle.READONLY_BUFFER + pickle.BYTEARRAY8


def _unhashable(load_tuple: Callable) -> Callable:
    """An instruction that makes a tuple, changed to make one that cannot be a key."""
    def load(self):
        load_tuple(self)
        self.stack[-1] = Tuple(self.stack[-1])
    return load


class Reader(pickle._Unpickler):
    """The unpickler written in Python, since its instructions can be changed.

    ``memory(dtype, key, numel)`` gives the flat tensor that lies under one or more tensors.
    """

    dispatch = {code: _unhashable(load) if code in TUPLES else load
                for code, load in pickle._Unpickler.dispatch.items() if code not in LEFT_OUT}

    def __init__(self, file: io.BytesIO, memory: Callable[[torch.dtype, str, int], torch.Tensor]):
        super().__init__(file, encoding="latin1")
        self.memory, self.names = memory, {}

    def find_class(self, module: str, name: str):
        """What a name stands for; nothing is imported."""
        kind = f"{IMPORT_MAPPING.get(module, module)}.{name}"
        if kind not in self.names:
            inert = kind in INERT or name.rpartition(".")[2].lstrip("_")[:1].isupper() and (
                kind.split(".")[0] not in sys.stdlib_module_names or kind.startswith(VALUE_CLASSES))
            self.names[kind] = KNOWN.get(kind) or type("Record", (Record,), {"kind": kind, "inert": inert})
        if len(self.names) > MOST_NAMES:
            raise Refused(f"it uses more than {MOST_NAMES:,} names, more than any checkpoint needs")
        return self.names[kind]

    def persistent_load(self, pid) -> torch.Tensor:
        """Tensor memory: ``("storage", type, key, device, length)``."""
        kind, dtype, key, _, numel, *view = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(numel, int) or any(view):
            raise Refused("it holds tensor data of an unknown kind")
        return self.memory(dtype, str(key), numel)

    def load_build(self):
        """Attributes of a record; those of a plain container (``_metadata`` of a state dict) are left out."""
        state, top = self.stack.pop(), self.stack[-1]
        if isinstance(top, Record):
            top.__setstate__(state)
        elif not isinstance(top, (dict, torch.Tensor)):
            raise Refused(f"it gives attributes to a {type(top).__name__}, which has none")

    dispatch[pickle.BUILD[0]] = load_build


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
        if not isinstance(content, dict):
            raise Refused("it holds no dictionary of weights")
        return content
    except Refused as reason:
        raise ValueError(f"{path} is not read: {reason}; fetch it again from a source you trust.") from None
    except Exception as error:  # damaged bytes fail in as many ways as there are bytes
        reason = f"{type(error).__name__} {short(str(error))}".strip()
        raise ValueError(f"{path} is damaged or no torch checkpoint ({reason}); fetch it again.") from error


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by their names: of a safetensors file, or of a checkpoint."""
    return load_tensors(path) if path.suffix == ".safetensors" else state_dict_of(read_foreign(path), path)


def state_dict_of(content: dict, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint's entry ``state_dict``, or of all of one that has none, by their names.

    Those of records, which scripted models are read as, have dotted names; a record is met once.
    """
    inner = content.get("state_dict", content)
    if not isinstance(inner, dict):
        raise ValueError(f"{path} has no dictionary as its state_dict; give a file of weights.")
    tensors, seen, todo = {}, set(), [("", inner)]
    while todo:
        before, attributes = todo.pop()
        for name, value in attributes.items():
            if isinstance(name, str) and torch.is_tensor(value):
                tensors[before + name] = value
            elif isinstance(name, str) and isinstance(value, Record) and id(value) not in seen and len(before) < 1000:
                seen.add(id(value))
                todo.append((f"{before}{name}.", value))
    return tensors


def _read_zip(path: Path):
    """The format since torch 1.6: members ``<name>/data.pkl`` and, per memory, ``<name>/data/<key>``."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()  # scripted models have their code beside these
                   if info.filename.split("/")[1:2] in (["data.pkl"], ["data"], ["byteorder"])}
        pickles = [name for name in members if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise Refused(f"it is a zip file with {len(pickles)} members called data.pkl, so torch did not write it")
        root, claimed = pickles[0].split("/")[0], sum(info.file_size for info in members.values())
        if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
            raise Refused("it holds compressed data, which torch never writes")
        if claimed > path.stat().st_size:
            raise Refused(f"its members claim {claimed:,} bytes in a file of {path.stat().st_size:,}")
        if f"{root}/byteorder" in members and archive.read(f"{root}/byteorder") != b"little":
            raise Refused("its numbers are in the byte order of another kind of machine")
        if members[pickles[0]].file_size > LARGEST_PICKLE:
            raise Refused("what is not tensors has more bytes than any checkpoint needs")
        raw = {}

        def memory(dtype: torch.dtype, key: str, numel: int) -> torch.Tensor:
            name = f"{root}/data/{key}"
            if name not in members or members[name].file_size != numel * dtype.itemsize:
                raise Refused(f"tensor data {short(name)} is missing or of another size than it should be")
            if key not in raw:
                raw[key] = bytearray(archive.read(name))
            return torch.frombuffer(raw[key], dtype=dtype) if numel else torch.empty(0, dtype=dtype)

        return Reader(io.BytesIO(archive.read(pickles[0])), memory).load()


def _read_legacy(path: Path):
    """The format before torch 1.6: five pickles in a row, then for each memory its length as int64 and its values."""
    memories, size = {}, path.stat().st_size

    def memory(dtype: torch.dtype, key: str, numel: int) -> torch.Tensor:
        if key not in memories:
            if not 0 <= numel * dtype.itemsize <= size - sum(values.nbytes for values in memories.values()):
                raise Refused(f"its tensors claim more than the {size:,} bytes of the file")
            memories[key] = torch.zeros(numel, dtype=dtype)
        return memories[key]

    with open(path, "rb") as file:
        start = io.BytesIO(file.read(LARGEST_PICKLE))
        magic, version, system, content, keys = (Reader(start, memory).load() for _ in range(5))
        if (magic, version) != LEGACY or not system["little_endian"]:
            raise Refused("it is a pickle, but not a checkpoint of torch on a machine of this byte order")
        file.seek(start.tell())
        for key in keys:
            numel, values = int.from_bytes(file.read(8), "little"), memories.pop(key)
            raw = bytearray(file.read(values.nbytes))
            if numel != len(values) or len(raw) != values.nbytes:
                raise Refused(f"tensor data {short(key)} is cut short")
            if raw:
                values.copy_(torch.frombuffer(raw, dtype=values.dtype))
    if memories:
        raise Refused("it lacks the data of some tensors")
    return content
