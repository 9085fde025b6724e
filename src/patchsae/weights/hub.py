"""Getting an autoencoder from the Hugging Face hub."""

from pathlib import Path

from patchsae.weights.formats import WEIGHT_ENDINGS


def autoencoder_folder(name: str, revision: str | None = None) -> Path:
    """The local copy of a repository's weights and settings, downloaded where it is not there yet."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = [f"*{ending}" for ending in (".json", *WEIGHT_ENDINGS)]
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"There is no autoencoder at {name}: no such file or folder, and the hub does not give "
                                "it; train one in notebook 01.") from error
