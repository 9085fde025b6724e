"""Getting weights from the Hugging Face hub: the files that are read, and no others."""

from collections.abc import Sequence
from pathlib import Path

from patchsae.weights.files import model_files
from patchsae.weights.formats import WEIGHT_ENDINGS

#: What lies beside a model's weights and is read.
BESIDE_A_MODEL = ("config.json", "preprocessor_config.json", "tokenizer*", "vocab.json", "merges.txt",
                  "special_tokens_map.json")


def autoencoder_folder(name: str, revision: str | None = None) -> Path:
    """The local copy of an autoencoder's weights and settings, downloaded where it is not there yet."""
    return _folder(name, revision, [f"*{ending}" for ending in (".json", *WEIGHT_ENDINGS)])


def model_folder(name: str, revision: str | None = None) -> Path:
    """The same of a model in the layout of transformers; pickled weights only where there are no safetensors."""
    folder = _folder(name, revision, [*BESIDE_A_MODEL, "model*.safetensors", "model.safetensors.index.json"])
    return folder if model_files(folder) else _folder(name, revision, ["pytorch_model*.bin", "pytorch_model*.json"])


def _folder(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"There are no weights at {name}: no such file or folder, and the hub does not give "
                                f"them ({type(error).__name__}); check the name and the network.") from error
