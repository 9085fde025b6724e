"""Calls every public function, setting of a profile and command with arguments that are wrong or odd: ``make fuzz``.

A case ends well in the answer of the valid call, where the changed argument means the same or is not used; in a finite
answer, where the changed argument is legal; in numbers that are not finite, where such went into arithmetic; or in one
sentence of this package's own. Anything else is a failure: an error of another library, another answer than the valid
one for an argument that means nothing, a hang. The seed decides which elements are changed, and with ``--part`` which
cases are run. ``--only 417`` runs one case and shows what it ends in.
"""

import argparse
import contextlib
import dataclasses
import importlib
import inspect
import io
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).resolve().parents[1]
HOME = Path(tempfile.mkdtemp(prefix="fuzz-"))
os.environ |= {"PATCHSAE_HOME": str(HOME), "PATCHSAE_FIGURES": str(HOME / "figures"), "TQDM_DISABLE": "1",
               "HF_HUB_OFFLINE": "1", "PROFILE": "mini"}
sys.path[:0] = [str(SOURCE / "tests"), str(SOURCE / "tools")]

import make_api  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from conftest import damaged, one_sentence  # noqa: E402
from fuzz_calls import CALLS, World  # noqa: E402

import patchsae  # noqa: E402
from patchsae import __main__ as command_line  # noqa: E402
from patchsae.clip import Clip  # noqa: E402
from patchsae.config import PROFILES, load_profile  # noqa: E402
from patchsae.data.images import Images  # noqa: E402
from patchsae.latents import LatentStatistics  # noqa: E402
from patchsae.maple import Prompts  # noqa: E402

SECONDS, MEMORY = 20, 40 * 2**30
#: What a case may end in. "same": the valid answer. "unused": the same, of an argument that means nothing. "finite":
#: any finite answer. "loud": one that is not finite, or the valid one. "never": a sentence alone. "any": an answer,
#: since arithmetic may give infinity, or 0 of minus infinity. In all, a sentence.
SAME, UNUSED, FINITE, LOUD, NEVER, ANY = "same", "unused", "finite", "loud", "never", "any"
#: Arguments that may be negative, and words of which there are a few.
SIGNED = {"layer", "layers", "later", "i", "scale", "value", "otherwise", "n", "spread"}
CHOICES = {"split", "tokens", "selection", "precision", "activation", "device", "per_image"}
#: Hashes, which of NaN are hashes too.
HASHES = ("cache.made_of", "cache.cache_folder", "studies.study.fingerprint", "data.images.content_id",
          "data.images.hash_of")
#: Arguments that may be one value or several, and those that may be anything; L0 counts NaN as silent.
SEVERAL, FREE = {"latents", "rows", "seed", "labels"}, {"ids", "pixels", "otherwise"}
#: Answers that hold NaN where there is nothing to be said, as their docstrings state.
UNDEFINED = ("latents.", "masks.overlap", "studies.study.Study.statistics", "studies.study.Study.answers")


class Case(NamedTuple):
    """``call`` with ``arguments()``; ``good``: the answer of the valid call, or how to come by it."""

    name: str
    call: Callable
    may: str
    good: Callable


# Mutations ----------------------------------------------------------------------------------------------

def mutations(name: str, value, optional: bool, w: World, rng) -> Iterator[tuple[str, object, str]]:
    """Odd values for an argument, each with its name and what it may end in."""
    for odd in (None, "words", 3, 1.7, object(), [], {}, b"words"):
        if type(odd) is not type(value) and not (odd is None and optional) and not _alike(odd, value):
            yield repr(odd)[:20], odd, UNUSED
    if isinstance(value, torch.Tensor | np.ndarray) and value.dtype != object:
        yield from _arrays(value, rng)
    elif isinstance(value, bool):
        yield from (("1", int(value), SAME), ("2", 2, UNUSED), ("yes", "yes", UNUSED))
    elif isinstance(value, int):
        negative = FINITE if name in SIGNED else NEVER
        yield from (("-1", -1, negative), ("-10**9", -10**9, negative), ("0", 0, FINITE), ("10**15", 10**15, FINITE),
                    ("nan", math.nan, UNUSED), ("True", True, UNUSED), ("text", str(value), UNUSED),
                    ("[n]", [value], UNUSED), ("as float", float(value), SAME), ("as int64", np.int64(value), SAME))
    elif isinstance(value, float):
        negative = FINITE if name in SIGNED else NEVER
        yield from ((str(x), x, NEVER) for x in (math.nan, math.inf, -math.inf))
        yield from (("-1", -1.0, negative), ("0", 0.0, FINITE), ("1e30", 1e30, FINITE), ("True", True, UNUSED),
                    ("text", str(value), UNUSED), ("[x]", [value], UNUSED), ("as float64", np.float64(value), SAME))
    elif isinstance(value, str):
        yield from ((x[:8] or "empty", x, NEVER if name in CHOICES else FINITE)
                    for x in ("", "nonsense", "\0", "ü" * 999, "../x", "{}"))
    elif isinstance(value, Path):
        yield from _paths(value, w, rng)
    elif isinstance(value, list | tuple | range):
        yield from _lists(name, list(value))
    elif isinstance(value, dict):
        yield from (("a value None", value | dict.fromkeys(list(value)[:1]), UNUSED),
                    ("one less", dict(list(value.items())[1:]), FINITE), ("one more", value | {"x": 3}, UNUSED))
    elif isinstance(value, Images):
        empty, ds = w.ds, w.ds
        empty.labels, empty.pixels = empty.labels[:0], empty.pixels[:0]
        ds.pixels = torch.full((12, 3, 16, 16), math.nan)
        yield from (("no images", empty, FINITE), ("NaN images", ds, LOUD))
        for kind, pixels in (("int32 first", w.images.transpose(0, 3, 1, 2).astype(np.int32)),
                             ("grey", w.images[..., 0]), ("larger", np.repeat(np.repeat(w.images, 2, 1), 2, 2))):
            yield kind, patchsae.ArrayDataset(pixels, ds.labels, class_names=ds.class_names), FINITE
    elif isinstance(value, patchsae.SparseAutoencoder):
        bad, yes = w.sae(), w.sae()
        bad.W_enc.data[0, 0] = bad.W_dec.data[0, 0] = math.nan
        yield from (("NaN weights", bad, LOUD), ("another width", patchsae.SparseAutoencoder(7, 9), FINITE),
                    ("same weights", yes, FINITE), ("clip", w.clip, FINITE))
    elif isinstance(value, LatentStatistics):
        names = [f.name for f in dataclasses.fields(value)]
        less = {n: getattr(value, n)[:-1] for n in names[:8]} | {"class_counts": value.class_counts[:, :-1]}
        yield from (("another autoencoder", dataclasses.replace(value, sae_hash="0" * 16), FINITE),
                    ("fewer latents", dataclasses.replace(value, **less), FINITE),
                    ("another block", dataclasses.replace(value, block=0), FINITE),
                    ("silent", dataclasses.replace(value, class_counts=value.class_counts * 0), FINITE))


def _alike(odd, value) -> bool:
    """Whether one may stand for the other."""
    kinds = ((list, tuple, dict, range), (int, float), (str, Path))
    return any(isinstance(odd, kind) and isinstance(value, kind) for kind in kinds) and type(value) is not bool


def _arrays(x, rng) -> Iterator[tuple[str, object, str]]:
    """The same for a tensor or an array."""
    tensor = torch.as_tensor(x)
    array = tensor.detach().numpy()
    make = (lambda a: torch.from_numpy(np.asarray(a))) if x is tensor else np.asarray
    if array.dtype.kind == "f":
        for odd in (math.nan, math.inf, -math.inf):
            bad = array.copy()
            bad.reshape(-1)[rng.integers(bad.size)] = odd
            yield str(odd), make(bad), LOUD if math.isnan(odd) else ANY
        yield from (("zeros", make(array * 0), ANY), ("1e30", make(array * 0 + 1e30), ANY),
                    ("negative", make(-abs(array)), FINITE), ("as float64", make(array.astype(float)), SAME),
                    ("as int", make(array.astype(np.int8)), FINITE))
    elif array.dtype.kind == "b":
        yield from (("as int", make(array.astype(int)), SAME), ("as float", make(array.astype(float)), SAME))
    else:
        yield from (("as float + 0.5", make(array + 0.5), UNUSED), ("large", make(array.astype(int) + 10**9), FINITE),
                    ("as int32", make(array.astype(np.int32)), SAME), ("as bool", make(array > 0), FINITE),
                    ("negative", make(-1 - array.astype(int)), FINITE))
    yield from (("complex", make(array.astype(complex)), UNUSED), ("none", make(array[:0]), FINITE),
                ("one row", make(array[0]), FINITE), ("rank + 1", make(array[None]), FINITE),
                ("a column less", make(array[..., :-1].copy()), FINITE),
                ("a column more", make(np.concatenate([array, array[..., :1]], -1)), FINITE),
                ("a row less", make(array[:-1].copy()), FINITE), ("axes turned", make(array.T.copy()), FINITE),
                ("list", array.tolist(), SAME), ("text", make(array).__repr__(), UNUSED),
                ("other strides", make(np.asfortranarray(array)), SAME))
    yield ("negative strides", array[::-1].copy()[::-1], SAME)


def _lists(name: str, value: list) -> Iterator[tuple[str, object, str]]:
    """The same for a list."""
    yield from (("empty", [], FINITE), ("twice", value + value[:1], FINITE), ("a string", "word", UNUSED),
                ("a None in it", [*value[1:], None], UNUSED), ("nested", [value], UNUSED),
                ("tuple", tuple(value), SAME))
    if value and all(isinstance(x, int) for x in value):
        yield from ((str(x), [*value[1:], x], UNUSED) for x in (1.7, math.nan, math.inf, "1", True))
        negative = FINITE if name in SIGNED else NEVER
        yield from (("-1", [*value[1:], -1], negative), ("10**9", [*value[1:], 10**9], FINITE),
                    ("array", np.array(value), SAME), ("tensor", torch.tensor(value), SAME))
    if value and all(isinstance(x, str) for x in value):
        yield from ((repr(x), [*value[1:], x], UNUSED) for x in (3, b"b", ["a"]))
        yield from ((repr(x), [*value[1:], x], FINITE) for x in ("", "\0", "{}{x}"))


def _paths(path: Path, w: World, rng) -> Iterator[tuple[str, object, str]]:
    """The same for a path."""
    bad = w.folder / "new" / "damaged"
    shutil.rmtree(bad.parent, ignore_errors=True)
    (bad.parent / "some").mkdir(parents=True)
    if path.is_dir():
        shutil.copytree(path, bad)
    elif path.is_file():
        shutil.copy(path, bad)
    for cut in (True, False):
        for file in sorted(p for p in (bad, *bad.rglob("*")) if p.is_file()):
            whole = file.read_bytes()
            file.write_bytes(damaged(whole, rng, cut))
            yield f"{file.name} {'cut' if cut else 'flipped'}", bad, FINITE
            file.write_bytes(whole)
    file = w.folder / "sae" / "config.json"
    yield from (("as text", str(path), SAME), ("not there", w.folder / "nowhere" / "x", FINITE),
                ("a file", file, FINITE),
                ("below a file", file / "x", FINITE), ("a folder", bad.parent / "some", FINITE), ("empty", "", FINITE),
                ("zero byte", "a\0b", FINITE), ("long", "x" * 5000, FINITE))


# Cases --------------------------------------------------------------------------------------------------

def public_names() -> list[str]:
    """What the API page names, with the rooms: functions, classes, and their methods."""
    names = []
    for room in make_api.ROOMS:
        for name, value in make_api.public(importlib.import_module(f"patchsae.{room}")):
            record = inspect.isclass(value) and issubclass(value, tuple | Exception)
            names += [] if record or dataclasses.is_dataclass(value) and room == "config" else [f"{room}.{name}"]
            if inspect.isclass(value) and not record:
                names += [f"{room}.{name}.{n}" for n, m in vars(value).items()
                          if n[0] != "_" and (inspect.isfunction(m) or isinstance(m, classmethod))]
    return names


def _function(name: str) -> Callable:
    """What a public name is."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            found = importlib.import_module(".".join(["patchsae", *parts[:cut]]))
            for part in parts[cut:]:
                found = getattr(found, part)
            return found
    raise KeyError(name)


def call_cases(w: World, seed: int) -> Iterator[Case]:
    """Every public function, each argument in turn changed."""
    for number, (name, arguments) in enumerate(CALLS.items()):
        function = _function(name)

        def call(name=name, function=function, arguments=arguments, changed: str = "", make=None):
            shutil.rmtree(w.folder / "new", ignore_errors=True)
            values = arguments(w)
            if changed:
                values[changed] = make(values[changed])
            method = getattr(values.pop("self"), name.split(".")[-1]) if "self" in values else function
            return leaves(method(**values))

        yield Case(name, call, FINITE, call)
        parameters = inspect.signature(function.__init__ if inspect.isclass(function) else function).parameters
        for key, value in arguments(w).items():
            given = parameters.get(key)
            optional = given is not None and (given.default is None or "None" in str(given.annotation))
            rng = np.random.default_rng([seed, number])
            for i, (what, _, may) in enumerate(() if key == "self" else mutations(key, value, optional, w, rng)):
                def make(value, i=i, key=key, optional=optional, number=number):
                    every = mutations(key, value, optional, w, np.random.default_rng([seed, number]))
                    return next(odd for j, (_, odd, _) in enumerate(every) if j == i)

                free = name.startswith(HASHES) or what == "3" and key in SEVERAL or key in FREE or what == "nan" and (
                    name == "variants.JumpReLU.sparsity")
                may = ANY if free else may
                yield Case(f"{name}: {key} {what}", lambda c=call, k=key, m=make: c(changed=k, make=m), may, call)


def setting_cases(w: World) -> Iterator[Case]:
    """Every setting of the mini profile with other values."""
    text = (PROFILES / "mini.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text)
    settings = [(section, key, value) for section, content in table.items() if isinstance(content, dict)
                for key, value in content.items()] + [("", k, v) for k, v in table.items() if not isinstance(v, dict)]
    odd = ["nan", "inf", "-inf", "-1", "0", "1", "1.7", "-1.7", "true", '"word"', '""', "[]", "{}", "1979-05-27",
           "1000000000000000", "1e30", '["a", "a"]', "[1, 1]", "[1.5]", '"\\u0000"', None]
    for section, key, _ in settings:
        for new in odd:
            def call(section=section, key=key, new=new):
                changed = {s: dict(c) if isinstance(c, dict) else c for s, c in table.items()}
                (changed[section] if section else changed).pop(key)
                lines = [f"{key} = {new}"] if new is not None else []
                body = [f"{k} = {json.dumps(v)}" for k, v in changed.items() if not isinstance(v, dict)]
                body += lines if not section else []
                for name, content in changed.items():
                    if isinstance(content, dict):
                        body += [f"[{name}]", *(f"{k} = {json.dumps(v)}" for k, v in content.items())]
                        body += lines if name == section else []
                (w.folder / "odd.toml").write_text("\n".join(body), encoding="utf-8")
                profile = load_profile(w.folder / "odd.toml")
                place = getattr(profile, section) if section else profile
                got = place.get(key) if isinstance(place, dict) else getattr(place, key)
                got, wrote = (got, tomllib.loads(lines[0])[key]) if lines else (None, None)
                same = wrote == (list(got) if isinstance(got, tuple) else got)
                if not same or isinstance(wrote, bool) != isinstance(got, bool):
                    raise AssertionError(f"{wrote!r} was read as {got!r}")
                negative = isinstance(got, int | float) and got < 0 and section != "bounds" and "layer" not in key
                if negative or isinstance(got, float) and not math.isfinite(got):
                    raise AssertionError(f"{got!r} was accepted")
                return leaves(profile)

            yield Case(f"setting {section}.{key} = {new}", call, FINITE, call)


def command_cases(w: World) -> Iterator[Case]:
    """Commands with arguments that end before anything is computed."""
    mixed = w.folder / "mixed"
    for name, content in (("cat/a.png", b"no image"), ("dog/b.png", b""), ("cat/notes.txt", b"x"),
                          ("d\u00f6g/c d.gif", b"G")):
        (mixed / name).parent.mkdir(parents=True, exist_ok=True)
        (mixed / name).write_bytes(content)
    images, clip, sae = w.folder / "images", w.folder / "clip", w.folder / "sae"
    (w.folder / "damaged.toml").write_text("seed = [", encoding="utf-8")
    (w.folder / "bytes.toml").write_bytes(bytes(range(256)))
    odd_profiles = ["", "nowhere", "../mini", str(w.folder), str(w.folder / "damaged.toml"), "a\0b",
                    str(w.folder / "bytes.toml"), "x" * 5000, "mini.toml", "/dev/null", "ü"]
    lines = [[], ["nonsense"], ["--help"], ["--profile", "mini"], ["rehearsal"], ["rehearsal", "x"]]
    lines += [[name, "--help"] for name in command_line.COMMANDS]
    lines += [[name, "--profile", odd] for name in ("train", "latents", "cache", "check", "fetch", "dashboard", "reset",
                                                    "artifacts") for odd in odd_profiles if odd or name == "check"]
    lines += [[name, "--nonsense"] for name in command_line.COMMANDS]
    lines += [["new", odd, "--images", str(images), "--model", str(clip), "--yes"]
              for odd in ("", "a b", "../x", "mini", "a/b", "ü", "-", "a\0b", "x" * 300, "{}", "birds")]
    lines += [["new", "birds", "--images", str(odd), "--model", str(clip), "--yes"]
              for odd in ("", "nowhere", mixed, sae, clip / "config.json", "a\0b", images / "cat", "x" * 5000)]
    lines += [["new", "birds", "--images", str(images), "--model", str(odd), "--yes"]
              for odd in ("", "nowhere", images, sae, clip / "config.json", "a\0b", "a/b/c", "x" * 5000, "a b@c")]
    lines += [["new", "birds", "--images", str(images), "--model", str(clip), "--masks", str(odd), "--yes"]
              for odd in ("nowhere", clip / "config.json", "a\0b", images)]
    lines += [["new", "birds"], ["new"], ["check", "--profile"], ["cache", "--dtype", "int8"], ["cache", "--dtype"],
              ["cache", "--verify", "--yes", "--profile", "nowhere"], ["reset", "--profile", "mini"],
              ["check", "--profile", "mini", "--quiet"], ["check", "--profile", "mini"], ["check", "extra"],
              ["dashboard", "--latents"], ["new", "a", "b", "--images", str(images)]]
    for i, line in enumerate(lines):
        run = _outside if i % 40 == 1 else _inside  # some in processes of their own
        yield Case(f"patchsae {' '.join(line)[:90]!r}", lambda line=line, run=run: run(line), FINITE, lambda: [])


def _inside(line: list[str]) -> list:
    """A command here; a refusal is raised as its sentence."""
    out, err = io.StringIO(), io.StringIO()
    shutil.rmtree(HOME / "profiles", ignore_errors=True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
        sys.stdin = io.StringIO("")
        try:
            command_line.main(line)
        except SystemExit as end:
            _ended(end.code, err.getvalue())
    return []


def _outside(line: list[str]) -> list:
    """The same in a process."""
    done = subprocess.run([sys.executable, "-m", "patchsae", *line], capture_output=True, text=True, cwd=HOME)
    _ended(done.returncode and done.stderr, done.stderr)
    return []


def _ended(code, err: str) -> None:
    """Whether a command ended well, in its usage, or in a sentence."""
    text = str(code).strip()
    if code not in (0, None, 2) and not err.startswith("usage: ") and not one_sentence(ValueError(text)):
        raise AssertionError(f"the command ends in {text[-200:]!r}")
    if code not in (0, None):
        raise Refused(text)


class Refused(Exception):
    """A command's sentence."""


def cases(w: World, seed: int) -> list[Case]:
    """All of them. Messages to the app's widget join here: values of the traits of ``patchsae.app.widget``."""
    return [*call_cases(w, seed), *setting_cases(w), *command_cases(w)]


# Judging ------------------------------------------------------------------------------------------------

def leaves(x, depth: int = 0) -> list:
    """An answer as a list of numbers, arrays and words."""
    if isinstance(x, torch.Tensor):
        return [x.detach().float().numpy() if x.dtype == torch.bfloat16 else x.detach().numpy()]
    if isinstance(x, np.ndarray | np.generic | int | float | str | bytes | None):
        return [x]
    if isinstance(x, Path):
        return [str(x)]
    if isinstance(x, pd.DataFrame):
        return [x[c].to_numpy() for c in x if x[c].dtype != object] + [str(x.select_dtypes(object).values)]
    if isinstance(x, Images):
        if type(x) is Images:  # of which sources are made
            return [x.labels, str(x.class_names)]
        return [x.labels, str(x.class_names), *leaves([x[i] for i in range(len(x))], depth + 1)]
    if isinstance(x, dict):
        return [leaf for key in x for leaf in (str(key), *leaves(x[key], depth + 1))]
    if isinstance(x, Prompts):  # which are empty at first
        return [str({name: tuple(value.shape) for name, value in x.state_dict().items()})]
    if isinstance(x, torch.nn.Module):
        return leaves(x.state_dict(), depth + 1)
    if isinstance(x, Clip):
        return [x.fingerprint()]
    if dataclasses.is_dataclass(x):
        return leaves({f.name: getattr(x, f.name) for f in dataclasses.fields(x)}, depth + 1)
    if isinstance(x, list | tuple) or hasattr(x, "__next__"):
        return [leaf for part in x for leaf in leaves(part, depth + 1)]
    if callable(x) and depth < 3:  # an order of latents
        return leaves(x(1), depth + 1)
    return [type(x).__name__]


def finite(found: list) -> bool:
    """Whether every number is."""
    arrays = [np.asarray(leaf) for leaf in found]
    return all(np.isfinite(array).all() for array in arrays if array.dtype.kind in "fc")


def equal(a: list, b: list) -> bool:
    """Whether two answers are the same but for rounding."""
    if len(a) != len(b):
        return False
    for x, y in zip(map(np.asarray, a), map(np.asarray, b)):
        numbers = x.dtype.kind in "fiub" and y.dtype.kind in "fiub"
        if x.shape != y.shape or not (np.allclose(x, y, 1e-4, 1e-5, equal_nan=True) if numbers else (x == y).all()):
            return False
    return True


def verdict(case: Case, good: dict) -> tuple[str, str]:
    """"answer", "sentence" or "failure", and what there is to say."""
    try:
        answer = _timed(case.call)
    except Refused as error:
        return "sentence", str(error)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        ours = Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(SOURCE / "src")
        check = isinstance(error, AssertionError) and case.name.startswith("studies.study.Study.check")
        if check or ours and isinstance(error, ValueError | TypeError | OSError | IndexError) and one_sentence(error):
            return "sentence", str(error)
        return "failure", f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
    if case.may == NEVER:
        return "failure", f"accepted: {str(answer)[:80]}"
    if case.may == ANY:
        return "answer", ""
    if case.may == FINITE:
        undefined = case.name.startswith(UNDEFINED)
        return ("answer", "") if finite(answer) or undefined else ("failure", f"not finite: {str(answer)[:80]}")
    if case.good not in good:
        good[case.good] = _timed(case.good)
    if equal(answer, good[case.good]) or case.may == LOUD and not finite(answer):
        return "answer", ""
    return "failure", f"another answer than the valid call's: {str(answer)[:80]}"


def _timed(call: Callable):
    """What a call gives within ``SECONDS``."""
    def late(*_):
        raise TimeoutError("it hangs")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), \
                contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            return call()
    finally:
        signal.alarm(0)


def main() -> None:
    """Run all cases or some, print failures and the count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", type=int, help="so many cases, by chance")
    parser.add_argument("--only", type=int, help="one case alone")
    parser.add_argument("--match", default="", help="cases with this in their names")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    w = World(HOME / "world")
    every = cases(w, options.seed)
    if missing := sorted(set(public_names()) - set(CALLS)):
        sys.exit(f"No call of {', '.join(missing)} is known; add one to tools/fuzz_calls.py.")
    numbers = [n for n, case in enumerate(every) if options.match in case.name]
    if options.part:
        chosen = np.random.default_rng(options.seed).permutation(numbers)[:options.part]
        numbers = sorted(chosen.tolist())
    numbers = numbers if options.only is None else [options.only]
    good, count = {}, Counter()
    for n in numbers:
        end, said = verdict(every[n], good)
        count[end] += 1
        if end == "failure" or options.only is not None:
            ended = " ".join(f"{every[n].name}: {said}".split())
            print(f"{end}: tools/fuzz.py --seed {options.seed} --only {n}   # {ended}", flush=True)
    print(f"FUZZ {len(numbers)} cases, {count['answer']} answers, {count['sentence']} sentences, "
          f"{count['failure']} failures")
    sys.exit(count["failure"] > 0)


if __name__ == "__main__":
    try:
        main()
    finally:
        shutil.rmtree(HOME, ignore_errors=True)
