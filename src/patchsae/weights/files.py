"""Reading and writing weights: safetensors beside a JSON file, written to a temporary name and renamed."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


def write_atomically(path: Path, write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, then rename it: readers see all of it or nothing."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"Cannot write {path}: {reason}; free space there or choose another folder.") from error
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
            raise OSError(str(error)) from error

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


def load_json(path: Path, *keys: str) -> dict:
    """Read a JSON file that has these keys; a missing or damaged one is one sentence."""
    try:
        content = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {path}; run the notebook that makes it.") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); remove it and make it again.") from error
    if not isinstance(content, dict) or not set(keys) <= set(content):
        raise ValueError(f"{path} lacks some of {', '.join(keys)}; remove it and make it again.")
    return content


def tensor_hash(tensors: dict[str, torch.Tensor]) -> str:
    """Hash of names, shapes, types and bytes of tensors, in the order of their names: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
