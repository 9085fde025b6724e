"""Profiles, paths and seeds. A profile is data: one TOML file, one frozen dataclass, no code of its own."""

import dataclasses
import os
import tomllib
import typing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

#: The folder that holds ``notebooks/``, ``data/`` and ``figures/``.
ROOT = Path(__file__).resolve().parents[2]
PROFILES = Path(__file__).with_name("profiles")
#: Settings of the autoencoder that are left out of its key, so that a new choice does not rename old ones.
USUAL = {"weights": "", "activation": "relu", "shuffle": "images", "precision": "float32"}


@dataclass(frozen=True)
class ModelSettings:
    """Which CLIP, where it is cut (``layer``, sec. 3.1), which layers it is compared with (A.2), and which prompt
    ensemble classifies (sec. 4.1). ``get``: the command that gets the weights."""

    name: str
    get: str
    layer: int
    other_layers: tuple[int, ...]
    templates: str


@dataclass(frozen=True)
class DataSettings:
    """Where images come from and how many are used; ``batch_images`` is for passes that do not train.

    ``image_size``: pixels a side that images in files are cropped to, as the model takes them. ``get``: the command
    that gets them. ``cache``: "float16" or "bfloat16" to train on the tokens that ``make cache`` has written, or "".
    """

    source: str
    get: str
    task: str
    transfer: tuple[str, ...]
    image_size: int
    train_images: int
    test_images: int
    batch_images: int
    cache: str


@dataclass(frozen=True)
class SaeSettings:
    """Everything that decides a trained autoencoder (sec. 3.1, A.1).

    ``expansion``: latents per model dimension. ``l1``: lambda. ``warmup``, ``dead_after``, ``steps`` and
    ``save_every``: training steps. ``weights``: a file, folder or hub name to use as it is (see ``formats``) instead of
    training, or "". ``b_dec``: its start, "geometric_median", "geometric_median_by_position"
    (the published variant), "mean" or "zeros". ``tokens``: "all" or "cls". ``activation``: "relu" (the paper's),
    "topk", "batchtopk", "jumprelu" or "matryoshka"; ``k``: active latents per token of those that fix it.
    ``shuffle``: batches of whole "images" (the paper's) or of "tokens" of many images. ``precision``: "float32", or
    "bf16" for autocast with float32 weights.
    """

    expansion: float
    l1: float
    learning_rate: float
    warmup: int
    dead_after: int
    ghost: bool
    b_dec: str
    tokens: str
    activation: str
    k: int
    shuffle: str
    precision: str
    batch_images: int
    steps: int
    save_every: int
    weights: str


@dataclass(frozen=True)
class LatentSettings:
    """``tau``: a latent is active on a token above it (eq. 4). ``n_reference``: reference images per latent."""

    tau: float
    n_reference: int


@dataclass(frozen=True)
class AdaptationSettings:
    """What adapting CLIP to tasks has in common (sec. 4.2).

    ``tasks``: adapted to, one by one. ``shots``: training images per base class. ``n_prompts`` tokens enter each of
    the first ``depth`` blocks of both towers (MaPLe). ``augment``: random crops and mirror images in training.
    ``images``: training images per task that statistics and readouts are taken of.
    """

    tasks: tuple[str, ...]
    shots: int
    seeds: tuple[int, ...]
    n_prompts: int
    depth: int
    augment: bool
    images: int


@dataclass(frozen=True)
class MethodSettings:
    """How one method of adaptation is trained: ``epochs``, or as many as ``least_steps`` steps take if that is more."""

    learning_rate: float
    epochs: int
    least_steps: int
    batch_images: int

    def epochs_of(self, images: int) -> int:
        """Epochs over so many images; the last, smaller batch of each is dropped."""
        return max(self.epochs, -(-self.least_steps // max(1, images // self.batch_images)))


@dataclass(frozen=True)
class Profile:
    """One way to run the notebooks. ``threads`` is the number of CPU threads, part of what fixes the bytes."""

    name: str
    seed: int
    threads: int
    model: ModelSettings
    data: DataSettings
    sae: SaeSettings
    latents: LatentSettings
    adaptation: AdaptationSettings
    maple: MethodSettings
    coop: MethodSettings
    lora: MethodSettings
    fine_tuning: MethodSettings
    expectations: tuple[tuple[str, float], ...]

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
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)

    def expected(self, name: str, otherwise: float) -> float:
        """The bound that [expected] in the profile names for a check, or one that always holds."""
        return dict(self.expectations).get(name, otherwise)

    def with_sae(self, **changes) -> "Profile":
        """The same profile with other settings of the autoencoder, e.g. ``with_sae(l1=1e-3)``; given weights do not
        have them, so that they are left out."""
        return dataclasses.replace(self, sae=dataclasses.replace(self.sae, **({"weights": ""} | changes)))

    def at_layer(self, layer: int) -> "Profile":
        """The same profile with the cut at another block, where given weights do not belong."""
        return dataclasses.replace(self.with_sae(weights=""), model=dataclasses.replace(self.model, layer=layer))

    def sae_settings(self) -> dict:
        """Everything that decides which autoencoder training gives: what a trained one is keyed by."""
        sae = {k: v for k, v in dataclasses.asdict(self.sae).items() if k != "save_every" and USUAL.get(k) != v}
        if self.sae.activation in ("relu", "jumprelu"):
            del sae["k"]
        data = {k: getattr(self.data, k) for k in ("source", "task", "train_images")}
        data |= {"cache": self.data.cache} if self.data.cache else {}
        return {"seed": self.seed, "layer": self.model.layer, "sae": sae, "data": data}


def _fill(cls, table: dict, where: str):
    """Build a settings dataclass from a table; unknown and missing keys are named."""
    if not isinstance(table, dict):
        raise ValueError(f"{where} must be a table of settings, not {table!r}.")
    names = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(table) - names):
        raise ValueError(f"{where} has the unknown key {unknown[0]!r}; known keys are {', '.join(sorted(names))}.")
    if missing := sorted(names - set(table)):
        raise ValueError(f"{where} lacks the key {missing[0]!r}; add it as in src/patchsae/profiles/mini.toml.")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
    for f in dataclasses.fields(cls):
        kind = typing.get_origin(f.type) or f.type
        allowed = (int, float) if kind is float else kind
        if not isinstance(values[f.name], allowed) or isinstance(values[f.name], bool) and kind is not bool:
            raise ValueError(f"{where}: {f.name} is {values[f.name]!r}; it must be of type {kind.__name__}.")
    return cls(**values)


def _choose(where: str, name: str, value: str, *choices: str) -> None:
    if value not in choices:
        raise ValueError(f"{where}: {name} is {value!r}; choose one of {', '.join(choices)}.")


def load_profile(name: str | None = None) -> Profile:
    """Read ``profiles/<name>.toml``; by default the one named by the environment variable ``PROFILE``, or mini."""
    name = name or os.environ.get("PROFILE", "mini")
    path = PROFILES / f"{name}.toml"
    known = sorted(p.stem for p in PROFILES.glob("*.toml"))
    if name not in known:
        raise ValueError(f"There is no profile {name!r} in {PROFILES.name}/; choose one of {', '.join(known)}.")
    try:
        table = tomllib.loads(path.read_text()) | {"name": name}
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path.name} is not valid TOML ({error}); mend that line.") from error
    sections = {f.name: f.type for f in dataclasses.fields(Profile) if dataclasses.is_dataclass(f.type)}
    table["expectations"] = _bounds(table.pop("expected", {}), path.name)
    filled = {key: _fill(cls, table[key], f"[{key}] in {path.name}") for key, cls in sections.items() if key in table}
    profile = _fill(Profile, table | filled, path.name)
    _choose(path.name, "tokens", profile.sae.tokens, "all", "cls")
    _choose(path.name, "activation", profile.sae.activation, "relu", "topk", "batchtopk", "jumprelu", "matryoshka")
    _choose(path.name, "shuffle", profile.sae.shuffle, "images", "tokens")
    _choose(path.name, "precision", profile.sae.precision, "float32", "bf16")
    _choose(path.name, "templates", profile.model.templates, "own", "imagenet_ensemble_7", "imagenet_ensemble_80")
    _choose(path.name, "cache", profile.data.cache, "", "float16", "bfloat16")
    _choose(path.name, "source", profile.data.source, "scenes", "folders", "benchmarks")
    return profile


def _bounds(table, where: str) -> tuple[tuple[str, float], ...]:
    """Name and number of each line of [expected], which a profile may leave out."""
    if not isinstance(table, dict) or not all(isinstance(v, (int, float)) for v in table.values()):
        raise ValueError(f"[expected] in {where} must hold numbers alone, one a line.")
    return tuple(sorted(table.items()))


def start(name: str | None = None) -> Profile:
    """Load a profile and fix threads and seeds: the first call of every notebook."""
    profile = load_profile(name)
    torch.set_num_threads(profile.threads)
    torch.manual_seed(profile.seed)
    np.random.seed(profile.seed)
    return profile


def device() -> str:
    """``"cuda"`` where there is a GPU, else ``"cpu"``."""
    return "cuda" if torch.cuda.is_available() else "cpu"
