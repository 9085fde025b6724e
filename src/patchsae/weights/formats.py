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

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch

from patchsae.data.checks import Device, Whole, guard
from patchsae.weights.files import (
    checked_weights,
    file_sha256,
    load_json,
    load_tensors,
    parse_json,
    save_json,
    save_tensors,
    tensor_hash,
    write_atomically,
)
from patchsae.weights.foreign import read_foreign, state_dict_of

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
#: Weights that say little without the settings beside them.
SETTINGS_OF = {"sae.safetensors": "config.json", "sae_weights.safetensors": "cfg.json"}
#: What the settings of others may say of an autoencoder with the equations of this package, where they say it.
SAELENS_PLAIN = {
    "architecture": ("standard", "topk", "jumprelu"), "activation_fn": ("relu", "topk"),
    "activation_fn_str": ("relu", "topk"), "normalize_activations": ("none", None, False),
    "reshape_activations": ("none", None), "finetuning_scaling_factor": (False,),
    "apply_b_dec_to_input": (True, False), "rescale_acts_by_decoder_norm": (False, True)}
FASTSAE_PLAIN = {"activation_name": ("relu",), "architecture": ("vanilla",)}
OFFICIAL_PLAIN = {"gated_sae": (False,)}


def read_sae(path: str | Path, device: Device = "cpu") -> tuple[dict[str, torch.Tensor], dict]:
    """Weights and a report of an autoencoder in any of the formats above, from a local file or folder.

    The weights are float32 and finite: ``W_enc [D,S]``, ``b_enc [S]``, ``W_dec [S,D]``, ``b_dec [D]``, and of some
    activations ``threshold []`` or ``log_threshold [S]``. A file means what the settings beside it say, as its folder
    does. The report says ``format``, ``file``, its ``sha256``, ``verified`` (a hash was known beforehand and agrees),
    ``dtype`` as stored, ``d_model``, ``n_latents``, ``activation`` and ``k``, ``row_norms`` (least and greatest length
    of a row of W_dec) and ``unit_rows``.
    """
    file = _weights_file(Path(path))
    content = load_tensors(file, device) if file.suffix == ".safetensors" else read_foreign(file)
    form, settings = _settings(file, content)
    activation = settings.get("activation", "relu")
    stored = _named(state_dict_of(content, file), activation, form, file)
    shapes = _shapes(stored, activation, file)
    tensors = checked_weights(stored, shapes, file, device)
    k = checked_k(activation, settings.get("k", 0), len(tensors["b_enc"]))
    verified = _agrees(settings, stored, sae_hash(stored, activation, k), file)
    if not tensors["W_dec"].any():
        raise ValueError(f"{file} has a W_dec of zeros alone, which reconstructs nothing; fetch or train it again.")
    tensors = checked_weights(_converted(tensors, settings), shapes, file, device)
    norms = tensors["W_dec"].norm(dim=1)
    return tensors, {
        "format": form, "file": file.name, "sha256": file_sha256(file), "verified": verified,
        "dtype": str(stored["W_enc"].dtype), "d_model": len(tensors["b_dec"]), "n_latents": len(tensors["b_enc"]),
        "activation": activation, "k": k, "row_norms": (norms.min().item(), norms.max().item()),
        "unit_rows": bool((norms - 1).abs().max() <= UNIT_TOLERANCE)}


def sae_hash(tensors: dict[str, torch.Tensor], activation: Literal[*ACTIVATIONS], k: Whole) -> str:
    """Hash of an autoencoder: of its weights, and of activation and k where the activation is not relu."""
    return tensor_hash(tensors if activation == "relu" else tensors | {activation: torch.tensor(k)})


def write_folder(folder: str | Path, tensors: dict[str, torch.Tensor], activation: Literal[*ACTIVATIONS] = "relu",
                 k: Whole = 0) -> None:
    """Write our own format: ``config.json`` with the hash of the autoencoder, then ``sae.safetensors``."""
    if "W_enc" not in tensors:
        raise ValueError("There is no W_enc among the tensors; give those of an autoencoder.")
    d_model, n_latents = tensors["W_enc"].shape
    config = {"d_model": d_model, "n_latents": n_latents, "hash": sae_hash(tensors, activation, k)}
    variant = {} if activation == "relu" else {"activation": activation, "k": k}
    save_json(Path(folder) / "config.json", config | variant)
    save_tensors(Path(folder) / "sae.safetensors", tensors)


def write_official(path: str | Path, sae) -> Path:
    """Write a ``.pt`` file as the authors' code does: a dict with ``cfg`` and ``state_dict``, of relu alone.

    ``sae``: the autoencoder, or the state dict of one with relu. The authors' loader wants settings of training as
    well; those are the paper's, whatever this autoencoder was trained with.
    """
    tensors, activation, _ = _parts(sae)
    if activation != "relu":
        raise ValueError(f"{path} cannot be written, since the authors' format has no {activation}; use "
                         "save_pretrained or write_saelens instead.")
    d_model, n_latents = tensors["W_enc"].shape
    config = SimpleNamespace(
        d_in=d_model, d_sae=n_latents, dtype=torch.float32, device="cpu", gated_sae=False, l1_coefficient=8e-5,
        use_ghost_grads=True, mse_cls_coefficient=1.0, b_dec_init_method="geometric_median")
    content = io.BytesIO()  # torch has errors of its own on a full disk
    torch.save({"cfg": config, "state_dict": {name: tensors[name].detach().cpu() for name in NAMES}}, content)
    return write_atomically(Path(path), lambda temporary: temporary.write_bytes(content.getbuffer()))


def write_saelens(folder: str | Path, sae, model_name: str, hook_name: str) -> None:
    """Write a folder that SAELens from version 6 on reads; the two names say which tokens it is for.

    ``sae``: the autoencoder, or the state dict of one with relu.
    """
    tensors, activation, k = _parts(sae)
    d_model, n_latents = tensors["W_enc"].shape
    variant = {"relu": {"architecture": "standard"}, "topk": {"architecture": "topk", "k": k}}
    variant |= dict.fromkeys(("jumprelu", *BATCHED), {"architecture": "jumprelu"})
    if activation not in variant:
        raise ValueError(f"{folder} cannot be written, since SAELens has no {activation}; use save_pretrained instead.")
    if variant[activation]["architecture"] == "jumprelu":
        threshold = tensors["log_threshold"].exp() if activation == "jumprelu" else tensors["threshold"]
        tensors = {name: tensors[name] for name in NAMES} | {"threshold": threshold.expand(n_latents)}
    save_json(Path(folder) / "cfg.json", {
        "d_in": d_model, "d_sae": n_latents, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.0.0", "model_name": model_name, "hook_name": hook_name}}
        | variant[activation])
    save_tensors(Path(folder) / "sae_weights.safetensors", tensors)


def _parts(sae) -> tuple[dict[str, torch.Tensor], str, int]:
    """Tensors, activation and k of an autoencoder; a dict of tensors is that of one with relu."""
    if not (set(NAMES) <= set(sae) if isinstance(sae, dict) else hasattr(sae, "activation")):
        raise ValueError(f"A {type(sae).__name__} without {', '.join(NAMES)} is no autoencoder; give one, or its state "
                         "dict.")
    if not isinstance(sae, dict):
        return sae.state_dict(), sae.activation, sae.k
    if set(sae) & set(THRESHOLDS):
        raise ValueError("These tensors have thresholds, so that they are not of an autoencoder with relu; give the "
                         "autoencoder itself.")
    return sae, "relu", 0


# What is in a folder

def _weights_file(path: Path) -> Path:
    """The file of weights of an autoencoder's folder; a file is one itself."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"There is no autoencoder at {path}; train one in notebook 01.")
    own, plain = path / "sae.safetensors", path / "model.safetensors"
    if (path / "cfg.json").is_file():
        return path / "sae_weights.safetensors"
    if own.is_file() or "d_model" in _json(path / "config.json"):
        return plain if plain.is_file() else own
    if (path / "final").is_dir():
        return _weights_file(path / "final")
    files = sorted(p for p in path.iterdir() if p.suffix in WEIGHT_ENDINGS and not p.name.startswith(NOT_THE_MODEL))
    if len(files) != 1:
        raise FileNotFoundError(f"{path} holds {len(files)} files of weights where one is needed; give the path of the "
                                "autoencoder's own file or folder.")
    return files[0]


def _settings(file: Path, content: dict) -> tuple[str, dict]:
    """Name of the format, and what is said in the file or beside it: sizes, activation and k, a hash."""
    beside = file.with_name(SETTINGS_OF.get(file.name, "config.json"))
    if file.name in SETTINGS_OF and not beside.is_file():
        raise FileNotFoundError(f"{file} lies without its {beside.name}, which says what it computes; put the two into "
                                "one folder.")
    if file.suffix == ".safetensors" and (cfg := file.with_name("cfg.json")).is_file():
        return "SAELens folder", _saelens_settings(cfg)
    if file.name in SETTINGS_OF or file.name == "model.safetensors" and "d_model" in _json(beside):
        return OWN_FORMAT, load_json(beside, "d_model", "n_latents")
    if file.suffix != ".safetensors" and {"cfg", "config"} & set(content):
        said = content.get("cfg", content.get("config"))
        said = _plain(said, OFFICIAL_PLAIN, file) if isinstance(said, dict) else {}
        return "torch file", {key: said[key] for key in ("d_in", "d_sae") if key in said}
    return _fastsae_settings(file)


def _saelens_settings(path: Path) -> dict:
    settings = _plain(load_json(path, "d_in", "d_sae"), SAELENS_PLAIN, path)
    said = {settings.get(key) for key in ("architecture", "activation_fn", "activation_fn_str")}
    if {"topk", "jumprelu"} <= said:
        raise ValueError(f"{path} says both topk and jumprelu, which this package does not compute; choose an "
                         "autoencoder with one of them.")
    activation = next((name for name in ("topk", "jumprelu") if name in said), "relu")
    if settings.get("rescale_acts_by_decoder_norm") and activation != "topk":
        raise ValueError(f"{path} rescales latents by the decoder's norm without being topk, which this package does "
                         "not compute; choose an autoencoder that does not.")
    more = settings.get("activation_fn_kwargs")  # where versions before 6 keep k
    return (more if isinstance(more, dict) else {}) | settings | {"activation": activation}


def _fastsae_settings(file: Path) -> tuple[str, dict]:
    """What FastSAE's settings beside the weights say; other files beside them are not its settings."""
    folders = [file.parent.parent, file.parent] if file.parent.name == "final" else [file.parent]
    for path in sorted(path for folder in folders for path in folder.glob("*.json")):
        said = _json(path)
        if {"activation_name", "d_sae_factor"} & set(said):
            sizes = [said.get(key) for key in ("d_in", "d_sae_factor")]
            if all(isinstance(size, int) for size in sizes):
                said |= {"d_sae": sizes[0] * sizes[1]}
            return "FastSAE folder", _plain(said, FASTSAE_PLAIN, path)
    return f"{'safetensors' if file.suffix == '.safetensors' else 'torch'} file", {}


def _plain(settings: dict, allowed: dict[str, tuple], path: Path) -> dict:
    """Settings that say nothing but what this package computes."""
    for key, values in allowed.items():
        if key in settings and _shown(settings[key]) not in map(_shown, values):
            raise ValueError(f"{path} says {key} = {_shown(settings[key])}, which this package does not compute; "
                             f"choose an autoencoder with {key} = {values[0]!r}.")
    return settings


def _shown(value) -> str:
    """A setting as it is compared and shown; anything but a word or number, which can be without end, by its type."""
    return f"{value!r:.80}" if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"


def _json(path: Path) -> dict:
    """The settings in a file of somebody else's: none where it is not there or holds something else."""
    content = parse_json(path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


# What is in a file

def _named(stored: dict, activation: str, form: str, file: Path) -> dict[str, torch.Tensor]:
    """The four tensors and, where the activation has one, the threshold, whatever stands before all of their names;
    beside them there may be counters alone, since other weights (a gate, thresholds, a scale) make another function."""
    names = NAMES
    if activation in ("jumprelu", *BATCHED):
        names = *NAMES, "log_threshold" if activation == "jumprelu" and form == OWN_FORMAT else "threshold"
    before = [key.removesuffix("W_enc") for key in stored if key.split(".")[-1] == "W_enc"]
    if len(before) != 1:
        raise ValueError(f"{file} has {len(before)} tensors called W_enc where one is needed; give the file of an "
                         "autoencoder.")
    tensors = {key.removeprefix(before[0]): value for key, value in stored.items() if key.startswith(before[0])}
    weights = {name for name, tensor in tensors.items() if "." not in name and tensor.is_floating_point()}
    if "scaling_factor" in weights and (tensors["scaling_factor"] == 1).all():
        weights.remove("scaling_factor")
    if missing := [name for name in names if name not in tensors]:
        raise ValueError(f"{file} has no tensor called {missing[0]}; give the file of an autoencoder.")
    if others := sorted(weights.difference(names)):
        raise ValueError(f"{file} has {others[0]:.80}, which is not of an autoencoder with {activation}; give the "
                         "folder that says what it is, or choose another autoencoder.")
    return {name: tensors[name] for name in names}


def _shapes(tensors: dict[str, torch.Tensor], activation: str, file: Path) -> dict[str, list[int]]:
    """The shapes that go with the sizes of the two biases, by name; batchtopk has one threshold for all latents."""
    d_model, n_latents = tensors["b_dec"].numel(), tensors["b_enc"].numel()
    if 0 in (d_model, n_latents):
        raise ValueError(f"{file} has no latents or no width; fetch it again.")
    return {"W_enc": [d_model, n_latents], "b_enc": [n_latents], "W_dec": [n_latents, d_model], "b_dec": [d_model],
            "log_threshold": [n_latents], "threshold": [] if activation in BATCHED else [n_latents]}


def checked_k(activation: str, k: int, n_latents: int) -> int:
    """k of the activations that fix it, which must be from 1 to the number of latents; 0 of the others."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"There is no activation {activation!r}; choose one of {', '.join(ACTIVATIONS)}.")
    if activation in FIXED and (not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= n_latents):
        raise ValueError(f"{activation} keeps k = {k!r} latents of {n_latents} per token; give a whole number from 1 "
                         f"to {n_latents} as k.")
    return k if activation in FIXED else 0


def _agrees(settings: dict, tensors: dict[str, torch.Tensor], own: str, file: Path) -> bool:
    """Whether the settings state a hash of the weights; sizes and hash that they state must be the weights' own."""
    d_model, n_latents = tensors["W_enc"].shape
    stated = [_shown(settings.get("d_model", settings.get("d_in", d_model))),
              _shown(settings.get("n_latents", settings.get("d_sae", n_latents)))]
    if stated != [str(d_model), str(n_latents)]:
        raise ValueError(f"{file} is of width {d_model} with {n_latents} latents, but its settings say {stated[0]} and "
                         f"{stated[1]}; fetch or train it again.")
    if settings.get("hash", own) != own:
        raise ValueError(f"{file} does not have the hash that stands beside it: it is damaged or another file; "
                         "fetch or train it again.")
    return "hash" in settings


def _converted(tensors: dict[str, torch.Tensor], settings: dict) -> dict[str, torch.Tensor]:
    """The same function in the parameters of this package, where SAELens has others."""
    if settings.get("apply_b_dec_to_input") is False:  # its encoder is not centred: relu(z W_enc + b_enc)
        tensors["b_enc"] = tensors["b_enc"] + tensors["b_dec"] @ tensors["W_enc"]
    if settings.get("rescale_acts_by_decoder_norm"):  # latents count by what they add, h_s ||W_dec[s]||
        norms = tensors["W_dec"].norm(dim=1).clamp_min(1e-8)  # as SAELens has it
        tensors |= {"W_enc": tensors["W_enc"] * norms, "b_enc": tensors["b_enc"] * norms,
                    "W_dec": tensors["W_dec"] / norms[:, None]}
    if settings.get("activation") == "jumprelu" and "threshold" in tensors:  # one of 0 or less is relu
        tiny = torch.finfo(torch.float32).tiny
        tensors["log_threshold"] = tensors.pop("threshold").clamp_min(tiny).log()
    return tensors


guard(globals())
