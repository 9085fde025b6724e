"""Profiles, paths and seeds. A profile is data: one TOML file, one frozen dataclass, no code of its own.

What a profile leaves out has the paper's value where the paper has one (sec. 3.1, 4.2, A.1).
"""

import dataclasses
import functools
import json
import os
import reprlib
import tomllib
import typing
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, WrapValidator
from pydantic.dataclasses import dataclass


def _project_folder() -> Path:
    """``PATCHSAE_HOME``, else the checkout that this file lies in, else the current folder; no environment's own."""
    checkout = Path(__file__).resolve().parents[2]
    here = checkout if all((checkout / name).is_dir() for name in ("notebooks", "src")) else Path.cwd()
    return Path(os.environ.get("PATCHSAE_HOME") or here).expanduser().resolve()


#: The project folder: it holds ``data/``, ``figures/`` and a user's own ``profiles/``.
ROOT = _project_folder()
PROFILES = Path(__file__).with_name("profiles")
#: Settings of the autoencoder that are left out of its key, so that a new choice does not rename old ones.
USUAL = {"weights": "", "activation": "relu", "shuffle": "images", "one_order": False,
         "precision": "float32"}


def as_path(path: str | Path) -> Path:
    """A path that a file may have."""
    if not isinstance(path, str | os.PathLike) or not str(path) or "\0" in str(path) or any(
            len(os.fsencode(part)) > 255 for part in Path(path).parts):
        raise ValueError(f"{reprlib.repr(path)} is no path that a file may have; name a file or a folder.")
    return Path(path)


def resolve(path: str | Path) -> Path:
    """Where a path that a user names leads: as given, else under the project folder; in neither place, as given."""
    path = as_path(path)
    return next((place for place in (path, ROOT / path) if place.exists()), path)


def _distinct(values: tuple) -> tuple:
    if len(set(values)) < len(values):
        raise ValueError("it should hold nothing twice")
    return values


def _as_written(value, check):
    """A number, 64 or 64.0, as it was spelt: keys of trained autoencoders are hashes of the spelling."""
    check(value)
    return value


Whole = Annotated[int, Field(ge=0, le=10**12)]
Natural = Annotated[int, Field(ge=1, le=10**12)]
NotNegative = Annotated[float, Field(ge=0), WrapValidator(_as_written)]
Rate = Annotated[float, Field(gt=0, le=1), WrapValidator(_as_written)]
Layer = Annotated[int, Field(ge=-64, lt=64)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Word = Annotated[str, Field(min_length=1)]
Words = Annotated[tuple[Word, ...], AfterValidator(_distinct)]


def _sentence(error: ValidationError, cls: type, where: str | Path) -> str:
    """The first thing that is wrong with settings ``cls``: where it stands, what it is and what it may be."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"{where} lacks the key {key}; add it as in the package's profiles/mini.toml."
    if first["type"] == "unexpected_keyword_argument":
        section = functools.reduce(lambda outer, name: outer.__annotations__[name], first["loc"][:-1], cls)
        return f"{where} has the unknown key {key}; known keys there are {', '.join(sorted(section.__annotations__))}."
    wanted = first["msg"].partition("should")[2].replace("an object", "a table")
    return f"{where}: {key} is {reprlib.repr(first['input'])}; it should{wanted}."


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
def _settings(cls):
    """A frozen dataclass whose values are checked whenever one is made, by ``dataclasses.replace`` too."""
    strict = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    cls = dataclass(frozen=True, kw_only=True, config=strict)(cls)
    check = cls.__init__

    @functools.wraps(check)
    def __init__(self, **values):
        try:
            check(self, **values)
        except ValidationError as error:
            raise ValueError(_sentence(error, cls, cls.__name__)) from None

    cls.__init__ = __init__
    return cls


@_settings
class ModelSettings:
    """Which CLIP (a folder, a file or a name on the hub), where it is cut (``layer``, sec. 3.1), which layers it is
    compared with (A.2), and which prompt ensemble classifies (sec. 4.1). ``get``: the command that gets the weights."""

    name: Word
    get: str = "patchsae fetch"
    layer: Layer = -2
    other_layers: Annotated[tuple[Layer, ...], AfterValidator(_distinct)] = ()
    templates: Literal["own", "imagenet_ensemble_7", "imagenet_ensemble_80"] = "imagenet_ensemble_80"


@_settings
class DataSettings:
    """Where images come from (see ``open_dataset``) and how many are used.

    ``images``: the folder of the task's images where they lie elsewhere; ``masks``: a folder of masks of them;
    ``test_share``: share of the images that are kept for tests where a folder has no splits. ``batch_images`` is for
    passes that do not train. ``get``: how one gets them. ``cache``: train on the tokens that ``make cache`` has
    written in this format, or on none. ``subset``: the images and classes of benchmarks that are there are all that
    is wanted.
    """

    task: Word
    source: Literal["scenes", "folders", "benchmarks"] = "folders"
    get: str = "put or link them there"
    transfer: Words = ()
    train_images: Natural = 1_281_167
    test_images: Natural = 50_000
    batch_images: Natural = 16
    cache: Literal["", "float16", "bfloat16"] = ""
    images: str = ""
    masks: str = ""
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    subset: bool = False


@_settings
class SaeSettings:
    """Everything that decides a trained autoencoder (sec. 3.1, A.1).

    ``expansion``: latents per model dimension. ``l1``: lambda. ``warmup``, ``dead_after``, ``steps``, ``save_every``:
    training steps. ``b_dec``: its start; by position is the published variant. ``k``: active latents per token of
    activations that fix it. ``shuffle``: batches of whole "images" (the paper's) or of "tokens" of many; ``one_order``:
    they come in one order whatever the seed, so that several seeds train in one pass over the images. ``precision``:
    "bf16" is autocast with float32 weights. ``weights``: a file, folder or hub name to use as it is (see ``formats``).
    """

    expansion: Annotated[float, Field(gt=0, le=4096), WrapValidator(_as_written)] = 64
    l1: NotNegative = 8e-5
    learning_rate: Rate = 4e-4
    warmup: Whole = 500
    dead_after: Whole = 64
    ghost: bool = True
    b_dec: Literal["geometric_median", "geometric_median_by_position", "mean", "zeros"] = "geometric_median"
    tokens: Literal["all", "cls"] = "all"
    activation: Literal["relu", "topk", "batchtopk", "jumprelu", "matryoshka"] = "relu"
    k: Whole = 150
    shuffle: Literal["images", "tokens"] = "images"
    one_order: bool = True
    precision: Literal["float32", "bf16"] = "float32"
    batch_images: Natural = 128
    steps: Natural = 20_480
    save_every: Natural = 1024
    weights: str = ""


@_settings
class LatentSettings:
    """``tau``: a latent is active on a token above it (eq. 4). ``n_reference``: reference images per latent."""

    tau: NotNegative = 0.2
    n_reference: Natural = 10


@_settings
class AdaptationSettings:
    """What adapting CLIP to tasks has in common (sec. 4.2).

    ``tasks``: adapted to, one by one. ``shots``: training images per base class. ``n_prompts`` tokens enter each of
    the first ``depth`` blocks of both towers (MaPLe); ``transfer_depth``: of models that learn all classes of a task to
    be tested on others, 0 for ``depth``. ``augment``: random crops and mirror images in training.
    ``images``: training images per task that statistics and readouts are taken of.
    """

    tasks: Words = ()
    shots: Natural = 16
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(_distinct)] = (1, 2, 3)
    n_prompts: Natural = 2
    depth: Natural = 9
    transfer_depth: Whole = 0
    augment: bool = True
    images: Natural = 50_000


@_settings
class MethodSettings:
    """How one method of adaptation is trained: ``epochs``, or as many as ``least_steps`` steps take if that is more.

    0 stands for no other value: ``own_task_epochs`` on the profile's own task, and ``transfer_epochs`` and
    ``transfer_learning_rate`` where all classes of a task are learned, to be tested on other tasks.
    """

    learning_rate: Rate
    epochs: Natural
    least_steps: Whole = 0
    batch_images: Natural
    own_task_epochs: Whole = 0
    transfer_epochs: Whole = 0
    transfer_learning_rate: Annotated[float, Field(ge=0, le=1), WrapValidator(_as_written)] = 0

    def epochs_of(self, images: int) -> int:
        """Epochs over so many images; the last, smaller batch of each is dropped."""
        if type(images) is not int or images < 0:
            raise ValueError(f"There are {reprlib.repr(images)} images; give a whole number of them, 0 or more.")
        return max(self.epochs, -(-self.least_steps // max(1, images // self.batch_images)))


@_settings
class Profile:
    """One way to run the notebooks. ``threads`` is the number of CPU threads, part of what fixes the bytes; ``bounds``
    are what the notebooks' checks hold results to, by name, as far as the profile has any."""

    name: Annotated[str, Field(pattern=r"^\w[\w .+-]*$")]
    seed: Seed = 42
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    model: ModelSettings
    data: DataSettings
    sae: SaeSettings = SaeSettings()
    latents: LatentSettings = LatentSettings()
    adaptation: AdaptationSettings = AdaptationSettings()
    maple: MethodSettings = MethodSettings(learning_rate=0.0035, epochs=5, batch_images=4, transfer_epochs=2,
                                           transfer_learning_rate=0.0026)
    coop: MethodSettings = MethodSettings(learning_rate=0.002, epochs=200, own_task_epochs=50, batch_images=32)
    lora: MethodSettings = MethodSettings(learning_rate=2e-4, epochs=50, batch_images=32)
    fine_tuning: MethodSettings = MethodSettings(learning_rate=1e-5, epochs=10, batch_images=32)
    bounds: dict[str, float] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def data_dir(self) -> Path:
        """Committed inputs of the profile."""
        return ROOT / "data" / self.name

    @property
    def run_dir(self) -> Path:
        """What the notebooks of this profile compute; ignored by git."""
        return self.data_dir / "run"

    @property
    def figures_dir(self) -> Path:
        """Where figures go; ``PATCHSAE_FIGURES`` moves it, so that tests leave the committed ones alone."""
        return Path(os.environ.get("PATCHSAE_FIGURES", ROOT / "figures")) / self.name

    def short(self, path: Path) -> str:
        """A path as it is shown: relative to the project's folder where it is inside."""
        path = as_path(path)
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)

    def expected(self, name: str, otherwise: float) -> float:
        """The bound of a check, or one that always holds."""
        if not isinstance(name, str):
            raise ValueError(f"{reprlib.repr(name)} is no name of a bound; give that of a check.")
        return self.bounds.get(name, otherwise)

    def with_sae(self, **changes) -> "Profile":
        """The same profile with other settings of the autoencoder, e.g. ``with_sae(l1=1e-3)``; given weights do not
        have them, so that they are left out."""
        return dataclasses.replace(self, sae=dataclasses.replace(self.sae, **({"weights": ""} | changes)))

    def at_layer(self, layer: int) -> "Profile":
        """The same profile with the cut at another block, where given weights do not belong."""
        return dataclasses.replace(self.with_sae(), model=dataclasses.replace(self.model, layer=layer))

    @property
    def order(self) -> int:
        """Seed of the order in which training takes the images."""
        return 0 if self.sae.one_order else self.seed

    def sae_settings(self) -> dict:
        """Everything that decides which autoencoder training gives: what a trained one is keyed by."""
        sae = {k: v for k, v in dataclasses.asdict(self.sae).items() if k != "save_every" and USUAL.get(k) != v}
        if self.sae.activation in ("relu", "jumprelu"):
            del sae["k"]
        data = {k: getattr(self.data, k) for k in ("source", "task", "train_images")}
        data |= {"cache": self.data.cache} if self.data.cache else {}
        data |= {"subset": True} if self.data.subset else {}
        return {"seed": self.seed, "layer": self.model.layer, "sae": sae, "data": data}


def load_profile(name_or_path: str | Path | None = None) -> Profile:
    """Read a profile: the path of a ``.toml`` file, or a name in the project's ``profiles/`` or the package's own.

    By default the one that the environment variable ``PROFILE`` gives, or mini. A file gives its profile its name.
    """
    name, folders = str(as_path(name_or_path or os.environ.get("PROFILE") or "mini")), (ROOT / "profiles", PROFILES)
    places = [Path(name), ROOT / name] if name.endswith(".toml") else [f / f"{name}.toml" for f in folders]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        known = sorted({file.stem for folder in folders for file in folder.glob("*.toml")})
        raise ValueError(f"There is no profile {name!r}, looked for as {' and '.join(map(str, places))}; choose one of "
                         f"{', '.join(known)}, or give the path of a .toml file.")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")) | {"name": path.stem}
    except ValueError as error:
        raise ValueError(f"{path} is not valid TOML ({error}); mend that line.") from error
    try:
        # As JSON, where a list is the tuple of a strict type; TOML's dates become tables, which no setting is.
        return TypeAdapter(Profile).validate_json(json.dumps(table, default=lambda date: {"date": str(date)}))
    except ValidationError as error:
        raise ValueError(_sentence(error, Profile, path)) from None


def start(name_or_path: str | Path | None = None) -> Profile:
    """Load a profile and fix threads and seeds: the first call of every notebook."""
    import numpy as np
    import torch

    profile = load_profile(name_or_path)
    torch.set_num_threads(profile.threads)
    torch.manual_seed(profile.seed)
    np.random.seed(profile.seed)
    return profile


def device() -> str:
    """``"cuda"`` where there is a GPU, else ``"cpu"``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
