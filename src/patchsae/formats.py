"""Sparse autoencoders in the formats of others: what is read is brought to four float32 tensors and checked.

| written by | what it looks like |
|---|---|
| this package, or its ``push_to_hub`` | a folder: ``config.json`` (d_model, n_latents, hash) and ``sae.safetensors`` |
| the authors of the paper | a ``.pt`` file: a dict with ``cfg`` or ``config``, and ``state_dict`` |
| FastSAE | a folder ``final``, or one that holds it, with one file of weights |
| SAELens | a folder: ``cfg.json`` and ``sae_weights.safetensors`` |
"""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import torch

from patchsae.checkpoints import load_json, load_tensors, save_json, save_tensors, tensor_hash, write_atomically
from patchsae.foreign import read_foreign

OWN_FORMAT = "folder of this package"
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
WEIGHT_ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
#: Rows of W_dec count as of unit length up to this: training renormalises before a step and not after the last.
UNIT_TOLERANCE = 1e-2
#: What a SAELens configuration may say of an autoencoder with the equations of this package, where it says it.
SAELENS_PLAIN = {
    "architecture": ("standard",), "activation_fn": ("relu",), "activation_fn_str": ("relu",),
    "normalize_activations": ("none", None), "reshape_activations": ("none", None),
    "finetuning_scaling_factor": (False,)}


def read_sae(path: str | Path, device: str = "cpu") -> tuple[dict[str, torch.Tensor], dict]:
    """Weights and a report of an autoencoder in any of the formats above, from a local file or folder.

    The weights are float32 and finite: ``W_enc [D,S]``, ``b_enc [S]``, ``W_dec [S,D]``, ``b_dec [D]``. The report says
    ``format``, ``file``, its ``sha256``, ``verified`` (a hash was known beforehand and agrees), ``dtype`` as stored,
    ``d_model``, ``n_latents``, ``row_norms`` (least and greatest length of a row of W_dec) and ``unit_rows``.
    """
    form, file, settings = _find(Path(path))
    stored = load_tensors(file, device) if file.suffix == ".safetensors" else _from_torch(file)
    stored = _four(stored, file)
    verified = _agrees(stored, settings, file)
    tensors = {name: tensor.to(device, torch.float32) for name, tensor in stored.items()}
    if settings.get("apply_b_dec_to_input") is False:  # its encoder is not centred: relu(z W_enc + b_enc)
        tensors["b_enc"] = tensors["b_enc"] + tensors["b_dec"] @ tensors["W_enc"]
    norms = tensors["W_dec"].norm(dim=1)
    return tensors, {
        "format": form, "file": file.name, "sha256": file_sha256(file), "verified": verified,
        "dtype": str(stored["W_enc"].dtype), "d_model": len(tensors["b_dec"]), "n_latents": len(tensors["b_enc"]),
        "row_norms": (norms.min().item(), norms.max().item()),
        "unit_rows": bool((norms - 1).abs().max() <= UNIT_TOLERANCE)}


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hubs and web sites state it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_folder(folder: str | Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write our own format: ``config.json`` with the hash of the weights, then ``sae.safetensors``."""
    d_model, n_latents = tensors["W_enc"].shape
    config = {"d_model": d_model, "n_latents": n_latents, "hash": tensor_hash(tensors)}
    save_json(Path(folder) / "config.json", config)
    save_tensors(Path(folder) / "sae.safetensors", tensors)


def write_official(path: str | Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Write a ``.pt`` file as the authors' code does: a dict with ``cfg`` and ``state_dict``."""
    d_model, n_latents = tensors["W_enc"].shape
    config = SimpleNamespace(d_in=d_model, d_sae=n_latents, dtype=torch.float32)
    content = {"cfg": config, "state_dict": {name: tensors[name].detach().cpu() for name in NAMES}}
    return write_atomically(Path(path), lambda temporary: torch.save(content, temporary))


def write_saelens(folder: str | Path, tensors: dict[str, torch.Tensor], model_name: str, hook_name: str) -> None:
    """Write a folder that SAELens and what builds on it read; the two names say which tokens it is for."""
    d_model, n_latents = tensors["W_enc"].shape
    save_json(Path(folder) / "cfg.json", {
        "architecture": "standard", "d_in": d_model, "d_sae": n_latents, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"model_name": model_name, "hook_name": hook_name}})
    save_tensors(Path(folder) / "sae_weights.safetensors", tensors)


# What is in a folder

def _find(path: Path) -> tuple[str, Path, dict]:
    """Name of the format, the file of weights, and the settings beside it."""
    if path.is_file():
        return ("safetensors file" if path.suffix == ".safetensors" else "torch file"), path, {}
    if not path.is_dir():
        raise FileNotFoundError(f"There is no autoencoder at {path}; train one in notebook 01.")
    if (path / "cfg.json").is_file():
        return "SAELens folder", path / "sae_weights.safetensors", _saelens_settings(path / "cfg.json")
    if (path / "final").is_dir():
        return _find(path / "final")
    files = sorted(p for p in path.iterdir() if p.suffix in WEIGHT_ENDINGS and p.name[0] != ".")
    if (path / "config.json").is_file() and (path.name != "final" or not files):
        settings = load_json(path / "config.json", "d_model", "n_latents")
        plain = path / "model.safetensors"
        return OWN_FORMAT, plain if plain.is_file() else path / "sae.safetensors", settings
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
    return settings


def _plain_relu(folder: Path) -> None:
    """FastSAE can train with other activations; a file of settings beside the weights says so."""
    for path in sorted(folder.glob("*.json")):
        if (name := load_json(path).get("activation_name", "relu")) != "relu":
            raise ValueError(f"{path} says activation_name = {name!r}, which this package does not compute; choose an "
                             "autoencoder with relu.")


def _from_torch(file: Path) -> dict:
    """The state dict in a torch file: the file itself, or its entry ``state_dict``."""
    content = read_foreign(file)
    inner = content.get("state_dict", content)
    if not isinstance(inner, dict):
        raise ValueError(f"{file} has no dictionary as its state_dict; give the file of an autoencoder.")
    return inner


def _four(stored: dict, file: Path) -> dict[str, torch.Tensor]:
    """The four tensors, whatever stands before their names; their types, shapes and values are checked."""
    found = {}
    for name in NAMES:
        keys = [k for k in stored if isinstance(k, str) and k.split(".")[-1] == name and torch.is_tensor(stored[k])]
        if len(keys) != 1:
            raise ValueError(f"{file} has {len(keys)} tensors called {name} where one is needed; give the file of an "
                             "autoencoder.")
        found[name] = stored[keys[0]]
    shapes = {name: list(tensor.shape) for name, tensor in found.items()}
    d_model, n_latents = found["b_dec"].numel(), found["b_enc"].numel()
    wanted = dict(zip(NAMES, ([d_model, n_latents], [n_latents], [n_latents, d_model], [d_model])))
    if shapes != wanted or 0 in (d_model, n_latents):
        raise ValueError(f"{file} has tensors of the shapes {shapes}, which do not go together; fetch it again.")
    if bad := [name for name, tensor in found.items() if not tensor.is_floating_point()]:
        raise ValueError(f"{file} has {bad[0]} as {found[bad[0]].dtype}, not as floating point; fetch it again.")
    if bad := [name for name, tensor in found.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{file} has values that are not finite in {bad[0]}; fetch or train it again.")
    return found


def _agrees(tensors: dict[str, torch.Tensor], settings: dict, file: Path) -> bool:
    """Whether the settings state a hash of the weights; sizes and hash that they state must be the weights' own."""
    d_model, n_latents = tensors["W_enc"].shape
    stated = (settings.get("d_model", settings.get("d_in", d_model)),
              settings.get("n_latents", settings.get("d_sae", n_latents)))
    if stated != (d_model, n_latents):
        raise ValueError(f"{file} is of width {d_model} with {n_latents} latents, but the settings beside it say "
                         f"{stated[0]} and {stated[1]}; fetch or train it again.")
    if settings.get("hash", tensor_hash(tensors)) != tensor_hash(tensors):
        raise ValueError(f"{file} does not have the hash that stands beside it: it is damaged or another file; "
                         "fetch or train it again.")
    return "hash" in settings
