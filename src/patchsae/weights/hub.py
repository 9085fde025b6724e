"""Getting weights from the Hugging Face hub: the files that are read, and no others."""

import errno
from collections.abc import Sequence
from pathlib import Path

from patchsae.weights.files import first_line, model_files
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


def why_not(error: BaseException, name: str, kind: str = "") -> str:
    """Why the hub did not give a repository, and what to do about it: the end of a sentence.

    ``error``: what its libraries raised; ``kind``: what stands before the name in its address, as "datasets/".
    """
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    kinds = " ".join(type(e).__name__ for e in chain)
    answers = [getattr(getattr(e, "response", None), "status_code", None) for e in chain]
    status = next((code for code in answers if isinstance(code, int)), 0)
    page = f"https://huggingface.co/{kind}{name.partition('@')[0]}"
    if "GatedRepo" in kinds or "gated dataset" in str(error):
        return f"its licence must be accepted first; do so at {page}, then log in here with `hf auth login`"
    if "OfflineMode" in kinds:
        return "HF_HUB_OFFLINE forbids to ask; unset it"
    if any(getattr(e, "errno", None) == errno.ENOSPC for e in chain):
        return "the disk is full; free some of it, or let HF_HOME name a folder on another one"
    if status >= 500:
        return f"its server is out of order ({status}); try again in a few minutes"
    if "Consistency check" in " ".join(map(str, chain)) or "Protocol" in kinds:
        return "the transfer broke off; run it again, files that came whole are kept"
    if status:
        return {401: f"it does not say to strangers whether there is one (401); check the name at {page}, and log in "
                     "here with `hf auth login` if it is private",
                403: f"it refuses (403); see at {page} who may have it, and log in here with `hf auth login`",
                404: f"it has none of that name, revision or file (404); compare with {page}"}.get(
                    status, f"it answers {status}; see {page}, and try again later")
    if isinstance(error, ConnectionError) or "Connect" in kinds or "Timeout" in kinds or "LocalEntry" in kinds:
        return "it cannot be reached; check the network, then try again"
    return f"it failed ({type(error).__name__}, {first_line(error)}); see {page}"


def _folder(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"There are no weights at {name}: no such file or folder, and the hub does not give "
                                f"them: {why_not(error, name)}.") from error
