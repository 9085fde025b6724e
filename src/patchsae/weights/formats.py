"""Sparse autoencoders in the formats of others: what is read is brought to float32 tensors and checked.

| written by | what it looks like |
|---|---|
| this package, or its ``push_to_hub`` | a folder: ``config.json`` (d_model, n_latents, hash) and ``sae.safetensors`` |
| the authors of the paper | a ``.pt`` file: a dict with ``cfg`` or ``config``, and ``state_dict`` |
| FastSAE | a folder ``final``, or one that holds it, with one file of weights |
| SAELens | a folder: ``cfg.json`` and ``sae_weights.safetensors`` |

Our ``config.json`` names the activation and its k where it is not relu. SAELens has standard (relu), topk and jumprelu;
batchtopk and matryoshka, which cut every token at one threshold once they are trained, are written as its jumprelu.
"""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import torch

from patchsae.weights.files import load_json, load_tensors, save_json, save_tensors, tensor_hash, write_atomically
from patchsae.weights.foreign import read_foreign

OWN_FORMAT = "folder of this package"
#: Activations that an autoencoder may have; those of a fixed number of active latents per token, k; and those that
#: choose latents over the whole batch in training, and by one threshold afterwards.
ACTIVATIONS = ("relu", "topk", "batchtopk", "jumprelu", "matryoshka")
FIXED, BATCHED = ("topk", "batchtopk", "matryoshka"), ("batchtopk", "matryoshka")
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
#: Names of thresholds, which relu does not have.
THRESHOLDS = ("threshold", "log_threshold")
WEIGHT_ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
#: Files of weights that lie beside an autoencoder and are none.
NOT_THE_MODEL = (".", "optim", "sched", "rng", "train")
#: Rows of W_dec count as of unit length up to this: training renormalises before a step and not after the last.
UNIT_TOLERANCE = 1e-2
#: What a SAELens configuration may say of an autoencoder with the equations of this package, where it says it.
SAELENS_PLAIN = {
    "architecture": ("standard", "topk", "jumprelu"), "activation_fn": ("relu", "topk"),
    "activation_fn_str": ("relu", "topk"), "normalize_activations": ("none", None),
    "reshape_activations": ("none", None), "finetuning_scaling_factor": (False,),
    "rescale_acts_by_decoder_norm": (False,)}


def read_sae(path: str | Path, device: str = "cpu") -> tuple[dict[str, torch.Tensor], dict]:
    """Weights and a report of an autoencoder in any of the formats above, from a local file or folder.

    The weights are float32 and finite: ``W_enc [D,S]``, ``b_enc [S]``, ``W_dec [S,D]``, ``b_dec [D]``, and of some
    activations ``threshold []`` or ``log_threshold [S]``. The report says ``format``, ``file``, its ``sha256``,
    ``verified`` (a hash was known beforehand and agrees), ``dtype`` as stored, ``d_model``, ``n_latents``,
    ``activation`` and ``k``, ``row_norms`` (least and greatest length of a row of W_dec) and ``unit_rows``.
    """
    form, file, settings = _find(Path(path))
    activation, k = settings.get("activation", "relu"), settings.get("k", 0)
    stored = load_tensors(file, device) if file.suffix == ".safetensors" else _from_torch(file)
    stored = _checked(stored, file, _threshold_of(activation, form))
    k = _checked_k(activation, k, stored, file)
    verified = _agrees(stored, settings | {"activation": activation, "k": k}, file)
    tensors = {name: tensor.to(device, torch.float32) for name, tensor in stored.items()}
    if settings.get("apply_b_dec_to_input") is False:  # its encoder is not centred: relu(z W_enc + b_enc)
        tensors["b_enc"] = tensors["b_enc"] + tensors["b_dec"] @ tensors["W_enc"]
    if activation == "jumprelu" and "threshold" in tensors:  # of SAELens; one of 0 or less is relu
        tiny = torch.finfo(torch.float32).tiny
        tensors["log_threshold"] = tensors.pop("threshold").clamp_min(tiny).log()
    norms = tensors["W_dec"].norm(dim=1)
    return tensors, {
        "format": form, "file": file.name, "sha256": file_sha256(file), "verified": verified,
        "dtype": str(stored["W_enc"].dtype), "d_model": len(tensors["b_dec"]), "n_latents": len(tensors["b_enc"]),
        "activation": activation, "k": k, "row_norms": (norms.min().item(), norms.max().item()),
        "unit_rows": bool((norms - 1).abs().max() <= UNIT_TOLERANCE)}


def sae_hash(tensors: dict[str, torch.Tensor], activation: str, k: int) -> str:
    """Hash of an autoencoder: of its weights, and of activation and k where the activation is not relu."""
    return tensor_hash(tensors if activation == "relu" else tensors | {activation: torch.tensor(k)})


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hubs and web sites state it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_folder(folder: str | Path, tensors: dict[str, torch.Tensor], activation: str = "relu", k: int = 0) -> None:
    """Write our own format: ``config.json`` with the hash of the autoencoder, then ``sae.safetensors``."""
    d_model, n_latents = tensors["W_enc"].shape
    config = {"d_model": d_model, "n_latents": n_latents, "hash": sae_hash(tensors, activation, k)}
    variant = {} if activation == "relu" else {"activation": activation, "k": k}
    save_json(Path(folder) / "config.json", config | variant)
    save_tensors(Path(folder) / "sae.safetensors", tensors)


def write_official(path: str | Path, sae) -> Path:
    """Write a ``.pt`` file as the authors' code does: a dict with ``cfg`` and ``state_dict``, of relu alone.

    ``sae``: the autoencoder, or the state dict of one with relu.
    """
    tensors, activation, _ = _parts(sae)
    if activation != "relu":
        raise ValueError(f"{path} cannot be written, since the authors' format has no {activation}; use "
                         "save_pretrained or write_saelens instead.")
    d_model, n_latents = tensors["W_enc"].shape
    config = SimpleNamespace(d_in=d_model, d_sae=n_latents, dtype=torch.float32)
    content = {"cfg": config, "state_dict": {name: tensors[name].detach().cpu() for name in NAMES}}
    return write_atomically(Path(path), lambda temporary: torch.save(content, temporary))


def write_saelens(folder: str | Path, sae, model_name: str, hook_name: str) -> None:
    """Write a folder that SAELens and what builds on it read; the two names say which tokens it is for.

    ``sae``: the autoencoder, or the state dict of one with relu.
    """
    tensors, activation, k = _parts(sae)
    d_model, n_latents = tensors["W_enc"].shape
    if activation in ("jumprelu", *BATCHED):
        threshold = tensors["log_threshold"].exp() if activation == "jumprelu" else tensors["threshold"]
        tensors = {name: tensors[name] for name in NAMES} | {"threshold": threshold.expand(n_latents)}
    variant = {"relu": {"architecture": "standard"}, "topk": {"architecture": "topk", "k": k}}
    save_json(Path(folder) / "cfg.json", {
        "d_in": d_model, "d_sae": n_latents, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"model_name": model_name, "hook_name": hook_name}}
        | variant.get(activation, {"architecture": "jumprelu"}))
    save_tensors(Path(folder) / "sae_weights.safetensors", tensors)


def _parts(sae) -> tuple[dict[str, torch.Tensor], str, int]:
    """Tensors, activation and k of an autoencoder; a dict of tensors is that of one with relu."""
    if not isinstance(sae, dict):
        return sae.state_dict(), sae.activation, sae.k
    if set(sae) & set(THRESHOLDS):
        raise ValueError("These tensors have thresholds, so that they are not of an autoencoder with relu; give the "
                         "autoencoder itself.")
    return sae, "relu", 0


# What is in a folder

def _find(path: Path) -> tuple[str, Path, dict]:
    """Name of the format, the file of weights, and the settings beside it."""
    beside = {"sae.safetensors": "config.json", "sae_weights.safetensors": "cfg.json"}.get(path.name)
    if beside and path.is_file() and {"activation", "architecture"} & set(_lenient(path.with_name(beside))):
        return _find(path.parent)  # the file of a folder that says what its activation is
    if path.is_file():
        return ("safetensors file" if path.suffix == ".safetensors" else "torch file"), path, {}
    if not path.is_dir():
        raise FileNotFoundError(f"There is no autoencoder at {path}; train one in notebook 01.")
    if (path / "cfg.json").is_file():
        return "SAELens folder", path / "sae_weights.safetensors", _saelens_settings(path / "cfg.json")
    if (path / "final").is_dir():
        return _find(path / "final")
    files = sorted(p for p in path.iterdir() if p.suffix in WEIGHT_ENDINGS and not p.name.startswith(NOT_THE_MODEL))
    own, plain = path / "sae.safetensors", path / "model.safetensors"
    if (path / "config.json").is_file() and (own.is_file() or not files or "d_model" in _lenient(path / "config.json")):
        settings = load_json(path / "config.json", "d_model", "n_latents")
        return OWN_FORMAT, plain if plain.is_file() else own, settings
    if len(files) != 1:
        raise FileNotFoundError(f"{path} holds {len(files)} files of weights where one is needed; give the path of the "
                                "autoencoder's own file or folder.")
    _plain_relu(path)
    return "FastSAE folder", files[0], {}


def _saelens_settings(path: Path) -> dict:
    settings = load_json(path, "d_in", "d_sae")
    for key, allowed in SAELENS_PLAIN.items():
        if key in settings and settings[key] not in allowed:
            raise ValueError(f"{path} says {key} = {settings[key]!r}, which this package does not compute; choose an "
                             f"autoencoder with {key} = {allowed[0]!r}.")
    said = {settings.get(key) for key in ("architecture", "activation_fn", "activation_fn_str")}
    if {"topk", "jumprelu"} <= said:
        raise ValueError(f"{path} says both topk and jumprelu, which this package does not compute; choose an "
                         "autoencoder with one of them.")
    activation = next((name for name in ("topk", "jumprelu") if name in said), "relu")
    more = settings.get("activation_fn_kwargs")  # where versions before 6 keep k
    return (more if isinstance(more, dict) else {}) | settings | {"activation": activation}


def _plain_relu(folder: Path) -> None:
    """FastSAE can train with other activations; a file of settings beside the weights says so."""
    for path in sorted(folder.glob("*.json")):
        if (name := _lenient(path).get("activation_name", "relu")) != "relu":
            raise ValueError(f"{path} says activation_name = {name!r}, which this package does not compute; choose an "
                             "autoencoder with relu.")


def _lenient(path: Path) -> dict:
    """A JSON file of somebody else's: its settings, or none where it holds something else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _from_torch(file: Path) -> dict:
    """The state dict in a torch file: the file itself, or its entry ``state_dict``."""
    content = read_foreign(file)
    inner = content.get("state_dict", content)
    if not isinstance(inner, dict):
        raise ValueError(f"{file} has no dictionary as its state_dict; give the file of an autoencoder.")
    return inner


def _threshold_of(activation: str, form: str) -> dict[str, bool]:
    """Name of the threshold that an activation has in a format, if any, and whether there is one for each latent."""
    if activation == "jumprelu":
        return {"log_threshold" if form == OWN_FORMAT else "threshold": True}
    return {"threshold": False} if activation in BATCHED else {}


def _checked(stored: dict, file: Path, threshold: dict[str, bool]) -> dict[str, torch.Tensor]:
    """The four tensors and the threshold, whatever stands before their names; types, shapes and values are checked."""
    found = {name: _only(stored, name, file) for name in (*NAMES, *threshold)}
    if not threshold and {str(key).split(".")[-1] for key in stored} & set(THRESHOLDS):
        raise ValueError(f"{file} has thresholds, so that it is not of an autoencoder with relu; give the folder that "
                         "says what it is.")
    shapes = {name: list(tensor.shape) for name, tensor in found.items()}
    d_model, n_latents = found["b_dec"].numel(), found["b_enc"].numel()
    wanted = dict(zip(NAMES, ([d_model, n_latents], [n_latents], [n_latents, d_model], [d_model])))
    wanted |= {name: [n_latents] if each else [] for name, each in threshold.items()}
    if shapes != wanted or 0 in (d_model, n_latents):
        raise ValueError(f"{file} has tensors of the shapes {shapes}, which do not go together; fetch it again.")
    if bad := [name for name, tensor in found.items() if not tensor.is_floating_point()]:
        raise ValueError(f"{file} has {bad[0]} as {found[bad[0]].dtype}, not as floating point; fetch it again.")
    if bad := [name for name, tensor in found.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{file} has values that are not finite in {bad[0]}; fetch or train it again.")
    return found


def _only(stored: dict, name: str, file: Path) -> torch.Tensor:
    """The one tensor of a name."""
    keys = [k for k in stored if isinstance(k, str) and k.split(".")[-1] == name and torch.is_tensor(stored[k])]
    if len(keys) != 1:
        raise ValueError(f"{file} has {len(keys)} tensors called {name} where one is needed; give the file of an "
                         "autoencoder.")
    return stored[keys[0]]


def checked_k(activation: str, k: int, n_latents: int) -> int:
    """k of the activations that fix it, which must be from 1 to the number of latents; 0 of the others."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"There is no activation {activation!r}; choose one of {', '.join(ACTIVATIONS)}.")
    if activation in FIXED and (not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= n_latents):
        raise ValueError(f"{activation} keeps k = {k!r} latents of {n_latents} per token; give a whole number from 1 "
                         f"to {n_latents} as k.")
    return k if activation in FIXED else 0


def _checked_k(activation: str, k, tensors: dict[str, torch.Tensor], file: Path) -> int:
    try:
        return checked_k(activation, k, len(tensors["b_enc"]))
    except ValueError as error:
        raise ValueError(f"The settings of {file} are wrong: {error}") from None


def _agrees(tensors: dict[str, torch.Tensor], settings: dict, file: Path) -> bool:
    """Whether the settings state a hash of the weights; sizes and hash that they state must be the weights' own."""
    d_model, n_latents = tensors["W_enc"].shape
    stated = (settings.get("d_model", settings.get("d_in", d_model)),
              settings.get("n_latents", settings.get("d_sae", n_latents)))
    if stated != (d_model, n_latents):
        raise ValueError(f"{file} is of width {d_model} with {n_latents} latents, but the settings beside it say "
                         f"{stated[0]} and {stated[1]}; fetch or train it again.")
    if settings.get("hash", own := sae_hash(tensors, settings["activation"], settings["k"])) != own:
        raise ValueError(f"{file} does not have the hash that stands beside it: it is damaged or another file; "
                         "fetch or train it again.")
    return "hash" in settings
