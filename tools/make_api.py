"""Write docs/api.md: the public names, then the rooms of the top level in reading order, from their own docstrings."""

import dataclasses
import importlib
import inspect
import sys
import typing
from pathlib import Path

import patchsae

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
ROOMS = ("clip", "maple", "sae", "variants", "activations", "cache", "train", "latents", "masks", "ablation", "config",
         "data.images", "data.datasets", "data.adapters", "weights.formats", "studies.study")


def public(room) -> list[tuple[str, object]]:
    """Functions and classes that a room defines and does not keep to itself, in the order they stand in."""
    here = [(name, value) for name, value in vars(room).items() if getattr(value, "__module__", "") == room.__name__]
    kept = [(name, value) for name, value in here if name[0] != "_" and (inspect.isclass(value) or callable(value))]
    return sorted(kept, key=lambda pair: inspect.getsourcelines(inspect.unwrap(pair[1]))[1])


def signature(value) -> str:
    """Parameters and their types, without ranges and shapes, which their docstrings say."""
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    makes = inspect.isclass(value) and not dataclasses.is_dataclass(value)
    types = typing.get_type_hints(inspect.unwrap(value.__init__ if makes else value))
    bare = [p.replace(annotation=types.get(p.name, p.annotation)) for p in found.parameters.values()]
    return str(found.replace(parameters=bare)).replace("patchsae.", "")


def entry(name: str, value, level: str = "###") -> str:
    """Signature and docstring of one thing; of a class its public methods too."""
    text = f"{level} `{name}{signature(value)}`\n\n```text\n{inspect.getdoc(value) or ''}\n```\n"
    if inspect.isclass(value):
        methods = [(n, m) for n, m in vars(value).items() if n[0] != "_" and inspect.isfunction(m) and m.__doc__]
        text += "".join(f"\n- `.{n}{signature(m)}`: "
                        f"{inspect.getdoc(m).splitlines()[0]}" for n, m in methods) + "\n" * bool(methods)
    return text


def page() -> str:
    """The whole page."""
    names = ", ".join(f"`{name}`" for name in patchsae.__all__)
    parts = ["# API\n\nMade by `tools/make_api.py` from the docstrings; a test holds the two together.\n\n"
             f"Public names, to be imported from `patchsae`: {names}.\n"]
    for name in ROOMS:
        room = importlib.import_module(f"patchsae.{name}")
        parts.append(f"## patchsae.{name}\n\n{inspect.getdoc(room).splitlines()[0]}\n")
        parts += [entry(*pair) for pair in public(room)]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE.name} is written\n")
