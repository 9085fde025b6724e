"""Downloads what the Hugging Face hub has of a profile's weights and images, resumes, verifies: ``make fetch``."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, constants

from patchsae.cache import free_bytes, gigabytes
from patchsae.config import Profile, load_profile, resolve
from patchsae.data.benchmarks import TABLE, missing, on_this_machine, open_hub, where_from
from patchsae.project.ask import agreed
from patchsae.project.check import model_file, read_tasks
from patchsae.weights.files import file_sha256, save_json
from patchsae.weights.hub import autoencoder_folder, model_folder, why_not

#: Gigabytes from which on a download is asked for.
LARGE = 5


def fetch_model(profile: Profile) -> dict[str, str]:
    """Download the profile's model at its revision; every large file must have the hash that the hub states for it.

    Returns file -> sha256, which is also written to ``data/<profile>/fetched.json``.
    """
    repository, _, revision = profile.model.name.partition("@")
    try:
        stated = HfApi().model_info(repository, revision=revision or None, files_metadata=True).siblings
        folder = model_folder(repository, revision or None)
    except Exception as error:  # the library has errors of its own for every way a server can fail
        raise OSError(f"The hub does not give {repository}: {why_not(error, repository)}.") from error
    large = {file.rfilename: file.lfs.sha256 for file in stated if file.lfs}
    hashes = {path.relative_to(folder).as_posix(): file_sha256(path) for path in sorted(folder.rglob("*"))
              if path.is_file()}
    if bad := [name for name, digest in large.items() if hashes.get(name, digest) != digest]:
        for name in bad:  # what a snapshot names lies in another folder, where it would be found again
            (folder / name).resolve().unlink()
            (folder / name).unlink(missing_ok=True)
        raise ValueError(f"{bad[0]} of {profile.model.name} did not have the hash that the hub states and was removed; "
                         f"run {profile.model.get} again, which fetches it anew.")
    save_json(profile.data_dir / "fetched.json", hashes)
    return hashes


def fetch_images(profile: Profile, task: str, yes: bool) -> str:
    """Download a task that the hub has and no folder holds; returns what was done.

    ``yes``: start even a large download without a question.
    """
    if profile.data.source != "benchmarks" or not missing(profile.data_dir / "images", task):
        return "there"
    if "hub" not in TABLE[task]:
        return f"not on the hub in CoOp's splits; get it from {where_from(task)}"
    size, place = TABLE[task]["gigabytes"], Path(os.environ.get("HF_DATASETS_CACHE") or constants.HF_HOME)
    if size > LARGE and not yes and not on_this_machine(task) and not agreed(
            f"{task} is {size} GB, and twice that while it is unpacked; {gigabytes(free_bytes(place))} are free in "
            f"{place}. Fetch it?"):
        return "not fetched; make fetch with YES=1 does not ask"
    return f"{sum(len(open_hub(task, split)) for split in TABLE[task]['hub']['splits']):,} images from the hub"


def run(name: str | None, yes: bool = False) -> str:
    """Fetch what a profile needs; returns a line for each thing. What cannot be had stops nothing else, and is an
    error when the rest is done."""
    profile, lines, failed = load_profile(name), [], []
    model, sae = profile.model.name, profile.sae.weights

    def weights() -> str:
        if model.count("/") != 1 or resolve(model).exists():
            return "there" if model_file(model) else f"not on the hub; {profile.model.get} makes it"
        return ", ".join(f"{file} sha256 {digest}" for file, digest in fetch_model(profile).items())

    things: dict[str, Callable[[], str]] = {model: weights}
    if sae.count("/") == 1 and not Path(sae).suffix and not resolve(sae).exists():
        things[sae] = lambda: f"{len(list(autoencoder_folder(sae).iterdir()))} files of the autoencoder from the hub"
    things |= {task: partial(fetch_images, profile, task, yes) for task in read_tasks(profile)}
    for thing, fetch in things.items():
        try:
            lines.append(f"{thing}: {fetch()}")
        except (OSError, ValueError) as error:
            lines.append(f"{thing}: FAILED. {error}")
            failed.append(thing)
    if failed:
        raise OSError("\n".join([*lines, f"{len(failed)} of {len(lines)} could not be fetched."]))
    return "\n".join(lines)
