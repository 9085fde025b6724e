"""Reading and writing weights: safetensors beside a JSON file, written to a temporary name and renamed."""

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

#: The weights of a model in the layout of transformers: one file, or several that ``<name>.index.json`` lists.
MODEL_FILES = ("model.safetensors", "pytorch_model.bin")


def write_atomically(path: Path, write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, then rename it: readers see all of it or nothing."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # of the user's new files; safetensors has one of its own
        write(temporary)
        temporary.chmod(mode)
        os.replace(temporary, path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free space there or choose another folder" if full else "choose a folder that can be written to"
        raise OSError(f"Cannot write {path}: {error.strerror or error}; {advice}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Write tensors to a safetensors file."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(plain, temporary)
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            raise (OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))) from error

    return write_atomically(path, write)


def load_tensors(path: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Read a safetensors file; a missing or damaged one is one sentence."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There are no weights at {path}; run notebook 01_train_sae, which makes them.")
    try:
        return load_file(path, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); fetch or train it again.") from error


def save_json(path: Path, content: dict) -> Path:
    """Write a JSON file with sorted keys."""
    return write_atomically(path, lambda p: p.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n"))


def checked_weights(tensors: dict[str, torch.Tensor], shapes: dict[str, list[int]], where: str | Path,
                    device: str = "cpu") -> dict[str, torch.Tensor]:
    """Tensors in float32 that are floating point, of the shapes that belong to their names, and finite."""
    checked = {}
    for name, tensor in tensors.items():
        if list(tensor.shape) != shapes[name] or not tensor.is_floating_point():
            raise ValueError(f"{where} has {name} as {tensor.dtype} of the shape {list(tensor.shape)} where floating "
                             f"point of the shape {shapes[name]} belongs; fetch it again.")
        checked[name] = tensor.to(device, torch.float32)
        if not checked[name].isfinite().all():
            raise ValueError(f"{where} has values that are not finite in {name}; fetch it again.")
    return checked


def load_json(path: Path, *keys: str) -> dict:
    """Read a JSON file that has these keys; a missing or damaged one is one sentence."""
    content = parse_json(path)
    if not isinstance(content, dict) or not set(keys) <= set(content):
        raise ValueError(f"{path} lacks some of {', '.join(keys) or 'its settings'}; fetch or make it again.")
    return content


def parse_json(path: Path):
    """What a JSON file holds, whatever it is."""
    try:
        return json.loads(Path(path).read_text())
    except OSError:
        raise FileNotFoundError(f"There is no file {path}; run the notebook that makes it.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch or make it again.") from error


def model_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights in the layout of transformers, safetensors first; none, if there are none.

    An index may name files of its own folder alone.
    """
    for name in MODEL_FILES:
        index = Path(folder) / f"{name}.index.json"
        if (Path(folder) / name).is_file():
            return [Path(folder) / name]
        if index.is_file():
            parts = load_json(index, "weight_map")["weight_map"]
            parts = sorted(set(map(str, parts.values()))) if isinstance(parts, dict) else []
            files = [Path(folder) / part for part in parts]
            if not files or any(file.name != part or not file.is_file() for file, part in zip(files, parts)):
                raise ValueError(f"{index} does not name files of weights beside it; fetch the model again.")
            return files
    return []


def first_line(error: BaseException) -> str:
    """What an error of another library says, as the middle of a sentence."""
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hubs and web sites state it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_hash(tensors: dict[str, torch.Tensor]) -> str:
    """Hash of names, shapes, types and bytes of tensors, in the order of their names: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def result_key(version: int, **decided_by) -> str:
    """What a kept result is called: a hash of everything that decides it, by name, 16 hexadecimal digits.

    ``version`` is that of the computation, raised by hand when its numbers change; the rest is what JSON can write.
    """
    content = json.dumps([version, decided_by], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
