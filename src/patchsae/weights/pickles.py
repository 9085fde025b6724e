"""Reading a pickle as data: its instructions are followed here, over plain values, and nothing in it is run.

A pickle is a program, and a checkpoint is data. No module that a pickle names is imported and no function called. A few
names have a meaning here (tensors and plain containers), an object of any other class becomes an inert ``Record``, and
the call of any other function is refused.
"""

import math
import pickletools
import sys
from _compat_pickle import IMPORT_MAPPING
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

#: Instructions of one file. Official checkpoints have some tens of thousands.
MOST_INSTRUCTIONS = 5_000_000
#: Classes of Python's own that only hold values; they become records like the classes of other packages.
VALUE_CLASSES = ("argparse.", "collections.", "datetime.", "decimal.", "fractions.", "pathlib.",
                 "types.SimpleNamespace", "uuid.")
DTYPES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "Untyped": torch.uint8, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128}


class Refused(ValueError):
    """Why a file is not read: the middle of a sentence."""


class Name(NamedTuple):
    """A class or function that a file names: only the name, ``"module.name"``."""

    text: str


@dataclass(eq=False, repr=False)
class Record:
    """An object of a class that is not imported: its name, what it was made from, and its attributes."""

    kind: str
    arguments: tuple = ()
    fields: dict = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Record of {short(self.kind)} with {len(self.fields)} fields>"


class Storage(NamedTuple):
    """The memory of one or more tensors: a flat tensor."""

    values: torch.Tensor


def short(text: str, most: int = 80) -> str:
    """Text of a file as a message may show it: on one line, and not long."""
    return ascii(text[:most])[1:-1]


# What a file may call

def _tensor(storage, offset, size, stride, *_) -> torch.Tensor:
    """A tensor as a view of its storage; its extent must lie inside."""
    if not isinstance(storage, Storage) or len(size) != len(stride) or min([offset, *size, *stride]) < 0:
        raise Refused("a tensor has no valid shape")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride)) if math.prod(size) else 0
    if last >= max(1, len(storage.values)) or math.prod(size) > len(storage.values):
        raise Refused(f"a tensor of shape {short(str(list(size)))} reaches beyond its {len(storage.values):,} values")
    return torch.as_strided(storage.values, tuple(size), tuple(stride), offset)


def _dict(items=()) -> dict:
    pairs = list(items.items() if isinstance(items, dict) else items)
    _hashable(*(key for key, _ in pairs))
    return dict(pairs)


def _set(items=()) -> set:
    _hashable(*items)
    return set(items)


def _encode(text: str, encoding: str) -> bytes:
    """How bytes are written in old pickles."""
    if encoding != "latin1":
        raise Refused("it holds bytes in an unknown encoding")
    return text.encode("latin1")


def _record(kind: str) -> Callable[..., Record]:
    return lambda *arguments: Record(kind, arguments)


#: All that is ever called, by the names that files use.
CALLS: dict[str, Callable] = {
    "collections.OrderedDict": _dict,
    "collections.defaultdict": lambda _=None, items=(): _dict(items),
    "builtins.set": _set, "builtins.frozenset": _set, "_codecs.encode": _encode,
    "copyreg._reconstructor": lambda name, *_: _instance(name, ()),
    "torch._utils._rebuild_tensor": _tensor, "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch.jit._pickle.restore_type_tag": lambda value, _: value,
    **{f"torch.jit._pickle.build_{kind}list": list for kind in ("int", "double", "bool", "tensor")},
    "torch.Size": tuple, "torch.device": _record("torch.device"),
    "numpy.dtype": _record("numpy.dtype"), "numpy.ndarray": _record("numpy.ndarray"),
    **{f"{module}.{name}": _record(f"numpy.{name}") for name in ("scalar", "_reconstruct")
       for module in ("numpy.core.multiarray", "numpy._core.multiarray")}}


def _name(module: str, name: str) -> Name:
    """What a file names; old protocols use the module names of Python 2."""
    return Name(f"{IMPORT_MAPPING.get(module, module)}.{name}")


def _call(name, arguments: tuple):
    """What a call comes to: a value of the list above, an inert record of what is named like a class, or a refusal."""
    if not isinstance(name, Name) or not isinstance(arguments, tuple):
        raise Refused("it asks for the result of a call to be called, which no checkpoint needs")
    if name.text in CALLS:
        return CALLS[name.text](*arguments)
    if not name.text.rpartition(".")[2].lstrip("_")[:1].isupper():
        raise Refused(f"it asks to call {short(name.text)!r}, which no checkpoint needs")
    return _instance(name, arguments)


def _instance(name: Name, arguments: tuple) -> Record:
    """An inert record, unless it is of a class of Python's own that does more than hold values."""
    if name.text.split(".")[0] in sys.stdlib_module_names and not name.text.startswith(VALUE_CLASSES):
        raise Refused(f"it asks for an object of {short(name.text)!r}, which no checkpoint needs")
    return Record(name.text, tuple(arguments))


def _hashable(*keys) -> None:
    """Refuse what may not be a key of a dict or in a set. Nested tuples may not: their hash can take for ever."""
    for key in keys:
        if not isinstance(key, (str, bytes, int, float, type(None), torch.Tensor, Record, Name)):
            raise Refused(f"it has a {type(key).__name__} as the key of a dictionary or in a set")


# The instructions

MARK = object()
#: Instructions whose argument is the value they stand for.
CONSTANTS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING",
             "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE",
             "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
#: Instructions that make a fixed value or an empty container.
NEW: dict[str, Callable] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_DICT": dict,
    "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set, "MARK": lambda: MARK}
#: The version (all are read alike), a hint for reading ahead, and the end.
NOTHING_TO_DO = {"PROTO", "FRAME", "STOP"}


class Machine:
    """The stack machine of pickle, over plain values. ``load(dtype, key, numel) -> Storage`` gives tensor memory."""

    def __init__(self, load: Callable[[torch.dtype, str, int], Storage]):
        self.load, self.instructions = load, 0

    def run(self, file):
        """Go through one pickle of a binary file and return the object it describes."""
        self.stack, self.memo = [], {}
        for opcode, argument, _ in pickletools.genops(file):
            self.instructions += 1
            if self.instructions > MOST_INSTRUCTIONS:
                raise Refused(f"it has more than {MOST_INSTRUCTIONS:,} instructions, more than any checkpoint needs")
            if opcode.name in CONSTANTS:
                self.stack.append(argument)
            elif opcode.name in NEW:
                self.stack.append(NEW[opcode.name]())
            elif opcode.name not in NOTHING_TO_DO:
                self.act(opcode.name, argument)
        return self.stack.pop()

    def act(self, instruction: str, argument) -> None:
        """Do what an instruction with operands on the stack asks for."""
        method = getattr(self, f"on_{instruction.lower()}", None)
        if method is None:
            raise Refused(f"it holds the pickle instruction {instruction}, which no checkpoint needs")
        method() if argument is None else method(argument)

    def pop(self, n: int) -> list:
        """The top ``n`` values."""
        values = self.stack[-n:]
        del self.stack[-n:]
        return values

    def marked(self) -> list:
        """Everything above the last mark, which goes with it."""
        last = next(i for i in range(len(self.stack) - 1, -1, -1) if self.stack[i] is MARK)
        return self.pop(len(self.stack) - last)[1:]

    def on_pop(self):
        self.pop(1)

    def on_pop_mark(self):
        self.marked()

    def on_dup(self):
        self.stack.append(self.stack[-1])

    def on_put(self, key):
        self.memo[key] = self.stack[-1]

    on_binput = on_long_binput = on_put

    def on_memoize(self):
        self.memo[len(self.memo)] = self.stack[-1]

    def on_get(self, key):
        self.stack.append(self.memo[key])

    on_binget = on_long_binget = on_get

    def on_tuple(self):
        self.stack.append(tuple(self.marked()))

    def on_tuple1(self):
        self.stack.append(tuple(self.pop(1)))

    def on_tuple2(self):
        self.stack.append(tuple(self.pop(2)))

    def on_tuple3(self):
        self.stack.append(tuple(self.pop(3)))

    def on_list(self):
        self.stack.append(self.marked())

    def on_dict(self):
        items = self.marked()
        self.stack.append({})
        self.set_items(items)

    def on_frozenset(self):
        self.stack.append(frozenset(_set(self.marked())))

    def on_additems(self):
        items = _set(self.marked())
        self.stack[-1].update(items)

    def on_append(self):
        self.extend(self.pop(1))

    def on_appends(self):
        self.extend(self.marked())

    def extend(self, values: list) -> None:
        """Append to the list on top; to a record of a list's subclass as its field ``elements``."""
        top = self.stack[-1]
        (top.fields.setdefault("elements", []) if isinstance(top, Record) else top).extend(values)

    def on_setitem(self):
        self.set_items(self.pop(2))

    def on_setitems(self):
        self.set_items(self.marked())

    def set_items(self, items: list) -> None:
        """Fill the dict on top, or the fields of a record of a dict's subclass, from key, value, key, value..."""
        top = self.stack[-1]
        (top.fields if isinstance(top, Record) else top).update(_dict(zip(items[::2], items[1::2])))

    def on_global(self, text):
        self.stack.append(_name(*text.split(" ", 1)))

    def on_stack_global(self):
        self.stack.append(_name(*self.pop(2)))

    def on_reduce(self):
        self.stack.append(_call(*self.pop(2)))

    def on_newobj(self):
        self.stack.append(_instance(*self.pop(2)))

    def on_newobj_ex(self):
        name, arguments, named = self.pop(3)
        self.stack.append(_instance(name, (*arguments, named)))

    def on_inst(self, text):
        self.stack.append(_call(_name(*text.split(" ", 1)), tuple(self.marked())))

    def on_obj(self):
        name, *arguments = self.marked()
        self.stack.append(_call(name, tuple(arguments)))

    def on_build(self):
        """Attributes of a record; those of a plain container (``_metadata`` of a state dict) are left out."""
        (state,), top = self.pop(1), self.stack[-1]
        if isinstance(top, Record):
            parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
            for part in parts:
                top.fields.update(part if isinstance(part, dict) else {} if part is None else {"state": part})
        elif not isinstance(top, (dict, torch.Tensor)):
            raise Refused(f"it gives attributes to a {type(top).__name__}, which has none")

    def on_binpersid(self):
        """Tensor memory: ``("storage", type, key, device, length)``."""
        kind, name, key, _, numel, *view = self.pop(1)[0]
        dtype = DTYPES.get(name.text.removeprefix("torch.").removesuffix("Storage"))
        if kind != "storage" or dtype is None or not isinstance(numel, int) or view not in ([], [None]):
            raise Refused(f"it holds tensor data of the unknown kind {short(name.text)!r}")
        self.stack.append(self.load(dtype, str(key), numel))
