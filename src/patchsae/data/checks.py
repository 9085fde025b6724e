"""What public functions are given is what their parameters' types say; anything else is refused where it comes in.

A room that ends in ``guard(globals())`` has its public functions and methods checked. An ``int`` is a whole number and
no truth value, a ``float`` is finite, a list of words is no word, and a ``Path`` may be given as text. ``Annotated``
types narrow that: numbers by pydantic's ``Field``, tensors by a shape. Values of tensors are not looked at, since on a
GPU everything would have to wait for them.
"""

import collections.abc
import functools
import inspect
import math
import numbers
import operator
import re
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from pydantic.fields import FieldInfo

from patchsae.config import Layer, Natural, NotNegative, Rate, Seed, Whole, as_path

__all__ = ["Layer", "Natural", "NotNegative", "Rate", "Seed", "Whole", "guard", "indices"]
#: Tensors: of floating point where no other type is named, and of one precision then, "any" aside. A letter is the same
#: number throughout a call, and that of the models among its arguments: D their width, S latents, H pixels a side.
(Floats, Pixels, BatchTokens, Tokens, Latents, Some, Embeddings, Texts, OfLatents, Chosen, SomeOf, TokenIds) = (
    Annotated[torch.Tensor, shape] for shape in (
        "...", "any B,3,H,H", "B,T,D", "...,D", "...,S", "...,K", "...,P", "N,P", "bool S", "bool K", "index K",
        "int C,L"))
#: At least one word; how classes are called; where tensors are.
Words = Annotated[Sequence[str], Field(min_length=1)]
Template = Annotated[str, Field(pattern=r"[^{}]*\{\}[^{}]*")]
Templates = Annotated[Sequence[Template], Field(min_length=1)]
Indices = int | slice | Sequence[int] | np.ndarray | torch.Tensor
Device = Annotated[str | torch.device, "device"]
OBJECT_SIZES = {"d_model": "D", "n_latents": "S", "width": "D", "image_size": "H"}
#: What stands in front of a shape -> the kinds of numpy's types that it stands for.
TYPES = {"": "f", "any": "f", "int": "iu", "index": "iu", "bool": "b", "uint8": "u", "number": "fiub"}
NUMBERS = {int: (numbers.Integral, "a whole number"), float: (numbers.Real, "a finite number")}
MANY = (list, tuple, Sequence, Iterable, collections.abc.Iterator)


class _Unfit(Exception):
    """What should have been given."""


def guard(room: dict) -> None:
    """Check what the public functions and methods of a room are given; ``room``: its ``globals()``."""
    for name, value in list(room.items()):
        if name[0] != "_" and getattr(value, "__module__", "") == room["__name__"]:
            if inspect.isclass(value) and not issubclass(value, tuple | Exception):
                for key, member in list(vars(value).items()):
                    plain = member.__func__ if isinstance(member, classmethod) else member
                    if inspect.isfunction(plain) and (key[0] != "_" or key == "__init__"):
                        setattr(value, key, type(member)(checked(plain)) if plain is not member else checked(plain))
            elif callable(value) and not inspect.isclass(value):
                room[name] = checked(value)


def checked(function: Callable) -> Callable:
    """A function that refuses arguments that are not of its parameters' types."""
    signature = inspect.signature(function)
    parameters = {name: p.annotation for name, p in signature.parameters.items()
                  if p.annotation is not p.empty and not isinstance(p.annotation, str)
                  and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    if not parameters:
        return function
    title = function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def call(*arguments, **named):
        bound = signature.bind(*arguments, **named)
        sizes = _sizes(bound.arguments.values())
        for name, value in bound.arguments.items():
            if name in parameters and value is not signature.parameters[name].default:
                try:
                    bound.arguments[name] = _fitting(value, parameters[name], sizes)
                except _Unfit as wanted:
                    raise ValueError(f"The argument {name} of {title} is {shown(value)}; give {wanted}.") from None
        return function(*bound.args, **bound.kwargs)

    for name in ("cache_clear", "cache_info"):
        if hasattr(function, name):
            setattr(call, name, getattr(function, name))
    return call


def shown(value) -> str:
    """A value as an error names it."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}"
    plain = value is None or isinstance(value, str | bytes | numbers.Number | list | tuple | dict)
    return " ".join(reprlib.repr(value).split()) if plain else f"a {type(value).__name__}"


def _sizes(values) -> dict[str, int]:
    """The sizes of the models among arguments, and whether they compute in double precision."""
    sizes = {}
    for value in (value for value in values if hasattr(value, "fingerprint")):
        for name, letter in OBJECT_SIZES.items():
            if isinstance(size := getattr(value, name, None), int) and sizes.setdefault(letter, size) != size:
                raise ValueError(f"Models of width {size} and {sizes[letter]} are given where one takes the tokens of "
                                 "the other; choose some that go together.")
        if torch.is_tensor(weights := getattr(value, "W_enc", getattr(value, "logit_scale", None))):
            sizes["double"] = weights.dtype == torch.float64
    return sizes


def _fitting(value, kind, sizes: dict):
    """The value as a kind of parameter takes it, or ``_Unfit``."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _narrowed(_fitting(value, parts[0], sizes), parts[1:], sizes)
    if origin in (typing.Union, types.UnionType):
        return _of_one(value, parts, sizes)
    if origin is Literal:
        if not isinstance(value, str | bool) or value not in parts:
            raise _Unfit(f"one of {', '.join(map(str, parts))}")
        return value
    if kind in NUMBERS:
        return _number(value, kind)
    if kind is Path:
        return _path(value)
    if origin in MANY or kind in MANY:
        return _many(value, parts, sizes)
    if origin is dict and isinstance(value, dict) and parts[1] is torch.Tensor:
        value = {key: _fitting(part, torch.Tensor, sizes) for key, part in value.items()}
    kind = origin or kind
    if kind is np.ndarray and isinstance(value, np.ndarray) and min(value.strides, default=0) < 0:
        return np.ascontiguousarray(value)  # torch and Pillow take no others
    if inspect.isclass(kind) and not _is(value, kind):
        article = "an" if kind.__name__[0] in "AEIOaeio" else "a"
        raise _Unfit("text" if kind is str else "True or False" if kind is bool else f"{article} {kind.__name__}")
    return value


def _of_one(value, kinds: tuple, sizes: dict):
    """The value as the first of several kinds takes it; text that may be a path is one that can be there."""
    wanted = []
    for kind in kinds if isinstance(value, str) else sorted(kinds, key=lambda kind: kind is str):
        try:
            return (_path(value) and value) if kind is str and Path in kinds else _fitting(value, kind, sizes)
        except _Unfit as unfit:
            wanted += [str(unfit)] if kind is not types.NoneType else []
    raise _Unfit(" or ".join(dict.fromkeys(wanted)))


def _is(value, kind: type) -> bool:
    """Whether it is an object of a class, or has what the class says that another one must have."""
    needs = getattr(kind, "needs", ())
    return isinstance(value, kind) or bool(needs) and all(hasattr(value, name) for name in needs)


def _number(value, kind: type):
    """A number of Python, whatever library it came from."""
    wide, wanted = NUMBERS[kind]
    if isinstance(value, bool | np.bool_) or not isinstance(value, wide) or not math.isfinite(value):
        raise _Unfit(wanted)
    return value.item() if isinstance(value, np.generic) else value


def _path(value) -> Path:
    """A path that a file may have."""
    try:
        return as_path(value)
    except ValueError:
        raise _Unfit("a path") from None


def _many(value, parts: tuple, sizes: dict):
    """A list, of words, numbers, paths or objects one by one."""
    if isinstance(value, str | bytes | dict) or not np.iterable(value):
        raise _Unfit("a list")
    pairs = bool(parts) and tuple in (parts[0], typing.get_origin(parts[0]))
    if pairs and not all(isinstance(part, tuple) for part in value):
        raise _Unfit("a list of pairs")
    one_by_one = parts and (parts[0] in (str, int, float, Path) or typing.get_origin(parts[0]) is Annotated)
    if one_by_one or parts and inspect.isclass(parts[0]) and isinstance(value, list | tuple):
        few = [_fitting(part, parts[0], sizes) for part in value]
        return tuple(few) if isinstance(value, tuple) else few
    return value


def _narrowed(value, rules: tuple, sizes: dict):
    """The value if it keeps the rules that narrow its type."""
    for rule in rules:
        if rule == "device":
            _refuse_device(value)
        elif isinstance(rule, str):
            _refuse_shape(value, rule, sizes)
        for bound in rule.metadata if isinstance(rule, FieldInfo) else ():
            _refuse_beyond(value, bound)
    return value


def _refuse_beyond(value, bound) -> None:
    """Stop at a number beyond a bound, too few values, or text of another form."""
    for name, words in (("ge", "of at least"), ("gt", "above"), ("le", "of at most"), ("lt", "below")):
        if hasattr(bound, name) and not getattr(operator, name)(value, getattr(bound, name)):
            raise _Unfit(f"a number {words} {getattr(bound, name)}")
    if hasattr(bound, "min_length") and len(value) < bound.min_length:
        raise _Unfit("at least one")
    if hasattr(bound, "pattern") and not re.fullmatch(bound.pattern, value):
        raise _Unfit("text with one {} for the name of the class")


def _refuse_device(value) -> None:
    """Stop at a device that is not in this machine."""
    try:
        kind = torch.device(value).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", getattr(torch.accelerator.current_accelerator(), "type", "cpu")):
        raise _Unfit("cpu, or a device that this machine has")


def _refuse_shape(array, rule: str, sizes: dict) -> None:
    """Stop where a tensor or an array has another type or shape than a rule says."""
    name, _, shape = rule.rpartition(" ")
    letters, lengths = shape.split(","), list(array.shape)
    wanted = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
    wanted = f"{'float' if name in ('', 'any') else name} of shape [{wanted}]"
    kind = str(array.dtype).removeprefix("torch.").replace("bfloat", "float")[:1]
    fits = kind in TYPES[name] and (array.dtype.itemsize == 1 or name != "uint8")
    fits = fits and ("K" in letters or 0 not in lengths)
    if letters[0] == "...":
        letters, before = letters[1:], tuple(lengths[:max(0, len(lengths) - len(letters) + 1)])
        lengths, fits = lengths[len(before):], fits and sizes.setdefault("...", before) == before
    fits = fits and len(letters) == len(lengths)
    for letter, length in zip(letters, lengths):
        fits = fits and length == (int(letter) if letter.isdecimal() else sizes.setdefault(letter, length))
    if not fits:
        raise _Unfit(wanted)
    if name == "" and torch.is_tensor(array):
        double = array.dtype == torch.float64
        if sizes.setdefault("double", double) != double:
            raise _Unfit("the precision of the weights and of the other arguments")
    if name == "index" and array.numel() and array.device.type == "cpu":
        if not 0 <= array.min() <= array.max() < sizes["S"]:
            raise _Unfit(f"latents from 0 to {sizes['S'] - 1}")


def indices(values, n: int, what: str) -> np.ndarray:
    """Positions among n things as int64, one or several of them; ``what``: what an error calls them."""
    if isinstance(values, slice):
        return np.arange(n)[values]
    array = np.asarray(values.cpu() if torch.is_tensor(values) else values)
    flags = isinstance(values, list | tuple) and any(isinstance(value, bool) for value in values)
    if array.dtype.kind not in "iu" and array.size or array.ndim > 1 or array.dtype == object or flags:
        raise ValueError(f"The {what} are {shown(values)}; give whole numbers from 0 to {n - 1}.")
    if array.size and not 0 <= array.min() <= array.max() < n:
        raise ValueError(f"The {what} {array.min()} to {array.max()} are not all there; give some from 0 to {n - 1}.")
    return array.astype(np.int64)
