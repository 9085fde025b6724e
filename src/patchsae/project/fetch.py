"""Downloads what the Hugging Face hub has of a profile's weights and images, resumes, verifies: ``make fetch``."""

from huggingface_hub import HfApi

from patchsae.config import Profile, load_profile, resolve
from patchsae.data.benchmarks import TABLE, missing, open_hub, where_from
from patchsae.project.check import model_file, read_tasks
from patchsae.weights.files import file_sha256, save_json
from patchsae.weights.hub import model_folder


def fetch_model(profile: Profile) -> dict[str, str]:
    """Download the profile's model at its revision; every large file must have the hash that the hub states for it.

    Returns file -> sha256, which is also written to ``data/<profile>/fetched.json``.
    """
    repository, _, revision = profile.model.name.partition("@")
    try:
        stated = HfApi().model_info(repository, revision=revision or None, files_metadata=True).siblings
        folder = model_folder(repository, revision or None)
    except Exception as error:  # the library has errors of its own for every way a server can fail
        raise OSError(f"The hub does not give {repository} ({type(error).__name__}); check the network and run "
                      f"{profile.model.get} again, it goes on where it stopped.") from error
    large = {file.rfilename: file.lfs.sha256 for file in stated if file.lfs}
    hashes = {path.relative_to(folder).as_posix(): file_sha256(path) for path in sorted(folder.rglob("*"))
              if path.is_file()}
    if bad := [name for name, digest in large.items() if hashes.get(name, digest) != digest]:
        raise ValueError(f"{bad[0]} of {profile.model.name} does not have the hash that the hub states; remove "
                         f"{folder} and run {profile.model.get} again.")
    save_json(profile.data_dir / "fetched.json", hashes)
    return hashes


def fetch_images(profile: Profile) -> list[str]:
    """Download the tasks that the hub has and no folder holds; returns a line for each task."""
    lines = []
    for task in read_tasks(profile):
        if profile.data.source != "benchmarks" or not missing(profile.data_dir / "images", task):
            lines.append(f"{task}: there")
        elif "hub" in TABLE[task]:
            sizes = [len(open_hub(task, split)) for split in TABLE[task]["hub"]["splits"]]
            lines.append(f"{task}: {sum(sizes):,} images from the hub")
        else:
            lines.append(f"{task}: not on the hub in CoOp's splits; get it from {where_from(task)}")
    return lines


def run(name: str | None) -> str:
    """Fetch what a profile needs; returns a line for each thing."""
    profile = load_profile(name)
    model = profile.model.name
    if model.count("/") == 1 and not resolve(model).exists():
        lines = [f"{model}: {file} sha256 {digest}" for file, digest in fetch_model(profile).items()]
    else:
        lines = [f"{model}: {'there' if model_file(model) else f'not on the hub; {profile.model.get} makes it'}"]
    return "\n".join([*lines, *fetch_images(profile)])
