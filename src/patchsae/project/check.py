"""What a profile needs and what of it is missing; what it takes, from recorded runs: ``make check``."""

import shutil
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from huggingface_hub import try_to_load_from_cache

from patchsae.config import ROOT, Profile, device, load_profile, resolve
from patchsae.data.benchmarks import TABLE, missing, where_from
from patchsae.data.datasets import images_folder, images_lacking, images_there
from patchsae.data.masked import READERS, SOURCE, masks_folder
from patchsae.fast.memory import device_bytes
from patchsae.project import plan
from patchsae.project.stamps import STAMPS, estimate, rate
from patchsae.weights.files import file_sha256, load_json, model_files

#: Where the autoencoders of the paper are.
RELEASED = "https://github.com/dynamical-inference/patchsae, or hyesulim/fastsae-models on the hub"


class Need(NamedTuple):
    """One thing that notebooks read, and the command or link that gets it; without it all or a part ``stops``."""

    name: str
    there: bool
    get: str
    stops: bool = True


def needs(profile: Profile) -> list[Need]:
    """Weights and images that the notebooks of a profile read."""
    model, sae, masks = profile.model, profile.sae.weights, masks_folder(profile)
    found = [Need(f"weights {model.name}", model_file(model.name) is not None, model.get)]
    found += [_images(profile, task) for task in read_tasks(profile)]
    if profile.data.source != "scenes":
        where = masks or profile.data.masks or profile.data_dir / "segmentation"
        get = SOURCE if profile.data.source == "benchmarks" else f"one of {', '.join(READERS)}, or masks of your own"
        found.append(Need(f"masks in {profile.short(Path(where))}/", masks is not None, get, stops=False))
    if sae:  # a name of the hub is asked for when it is read
        found.append(Need(f"autoencoder {sae}", resolve(sae).exists() or sae.count("/") == 1 and not Path(sae).suffix,
                          RELEASED))
    return found


def read_tasks(profile: Profile) -> list[str]:
    """Every task whose images some notebook reads, once."""
    return list(dict.fromkeys((profile.data.task, *profile.data.transfer, *profile.adaptation.tasks)))


def model_file(name: str) -> Path | None:
    """A file of weights of a local folder or file, or of a model of the hub in its cache on this machine, if any."""
    path = resolve(name)
    if path.is_file():
        return path
    if not path.is_dir():
        repository, _, revision = name.partition("@")
        cached = repository.count("/") == 1 and try_to_load_from_cache(repository, "config.json",
                                                                       revision=revision or None)
        path = Path(cached).parent if isinstance(cached, str) else path
        if not (path / "preprocessor_config.json").is_file():
            return None
    return next(iter(model_files(path)), None) if (path / "config.json").is_file() else None


def weights_line(profile: Profile) -> str:
    """The hash of the weights and whether it is the one that was verified when they were fetched."""
    file, noted = model_file(profile.model.name), profile.data_dir / "fetched.json"
    if file is None:
        return "Weights: none"
    known, digest = load_json(noted).get(file.name) if noted.is_file() else None, file_sha256(file)
    if known not in (None, digest):
        raise ValueError(f"{file.resolve()} is not what was fetched, its hash has changed; remove it, and run "
                         f"{profile.model.get}.")
    return f"Weights: {file.name}, sha256 {digest}, {'verified' if known else 'unverified, no hash of it is known'}"


def _images(profile: Profile, task: str) -> Need:
    """The images of a task; without those of the profile's own nothing runs."""
    there, stops, get = images_there(profile, task), task == profile.data.task, profile.data.get
    if profile.data.source == "scenes":
        return Need(f"images of {task}", there, get, stops)
    if profile.data.source == "folders":
        return Need(f"images of {task} in {profile.short(images_folder(profile, task))}/", there, get, stops)
    row = TABLE[task]
    title, source = f"{row['title']} ({task}), {row['gigabytes']} GB", where_from(task)
    if "hub" in row and missing(profile.data_dir / "images", task):
        return Need(title, there, " or ".join(dict.fromkeys((get, source))), stops)
    absent, folder = missing(profile.data_dir / "images", task), profile.data_dir / "images" / row["folder"]
    where = profile.short(absent[0] if absent else folder)
    differs = "" if absent else images_lacking(profile, task)
    return Need(f"{title}: {where}{f' ({differs})' if differs else ''}", there, source, stops)


# Reports

def missing_lines(profile: Profile, stops: bool = True) -> list[str]:
    """What is missing, a line each with what gets it: what nothing runs without, or the rest."""
    return [f"  {n.name}\n      get it: {n.get}" for n in needs(profile) if not n.there and n.stops == stops]


def report(profile: Profile) -> str:
    """Everything: what is there, what is missing, this machine, and what each notebook takes."""
    lines = [f"Profile {profile.name}"]
    lines += [f"  {'there  ' if n.there else 'MISSING' if n.stops else 'absent '}  {n.name}" for n in needs(profile)]
    published = read_tasks(profile) if profile.data.source == "benchmarks" and not profile.data.subset else []
    classes = {task: TABLE[task]["classes"] for task in published}
    if few := [f"{task} ({n} classes)" for task, n in classes.items() if n > profile.data.test_images]:
        lines.append(f"Too few: {profile.data.test_images} test images leave classes of {', '.join(few)} without any; "
                     "raise test_images under [data].")
    gflops, have = rate(), device_bytes(device()) / 1e9
    lines += [weights_line(profile), f"This machine: {gflops:,.0f} GFLOP/s in float32 and {have:.0f} GB on the "
              f"{device()}, {shutil.disk_usage(ROOT).free / 1e9:.0f} GB of disk are free", "",
              *plan.lines(profile, gflops)]
    if not STAMPS.is_file():
        return "\n".join([*lines, "", "No run was recorded that hours could be read from; make rehearsal records one."])
    table = estimate(profile, pd.read_csv(STAMPS), gflops)
    lines += ["", f"  {'Notebook':<30}{'hours, at most':>16}{'GB memory':>11}"]
    return "\n".join([*lines, *(f"  {row.Index:<30}{row.hours:>16.2f}{row.memory:>11.1f}"
                                f"{'  <- NOT ENOUGH' * (row.memory > have)}" for row in table.itertuples())])


def run(name: str | None, quiet: bool) -> str:
    """The report, or where ``quiet`` nothing; what nothing runs without is an error where it is missing."""
    profile = load_profile(name)
    lines, said = missing_lines(profile), "" if quiet else report(profile)
    if lines:
        print(said, end="\n" * bool(said))
        raise FileNotFoundError("\n".join([f"The profile {profile.name} cannot run: this is missing.", *lines,
                                           "Nothing was computed or written."]))
    return said
