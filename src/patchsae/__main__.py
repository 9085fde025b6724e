"""The command line, ``patchsae <command>`` or ``python -m patchsae <command>``.

Under ``accelerate launch -m patchsae train`` and ``torchrun -m patchsae train`` processes share the work.
"""

import argparse
import importlib
import sys


def _call(place: str, *arguments) -> str:
    """Call ``room.function``, whose room is imported now: a command loads nothing that another one needs."""
    room, _, function = place.rpartition(".")
    return getattr(importlib.import_module(f"patchsae.{room}"), function)(*arguments)


def _train(options) -> str:
    from patchsae.project.new import judgement
    from patchsae.studies.study import open_study, run_folder

    study = open_study(options.profile)
    log = study.training()[1]
    if log is None:
        return f"There is nothing to train: the profile names the autoencoder {study.profile.sae.weights}."
    folder = run_folder(study.profile, study.clip)
    return f"The autoencoder is in {study.profile.short(folder)}; {judgement(log, study.clip.width)}"


def _latents(options) -> str:
    from patchsae.studies.study import open_study

    study = open_study(options.profile)
    return (f"Statistics of {len(study.stats.frequency)} latents on {study.stats.n_images} images are in "
            f"{study.profile.short(study.profile.run_dir)}/; {study.stats.n_unreadable} images could not be read.")


def _app(options) -> str:
    from patchsae.app.serve import Door, run

    return run(options.profile, Door(options.host, options.port, tuple(options.allow_host), options.visitors))


#: Command -> what it does, and the function that does it.
COMMANDS = {
    "new": ("look at your images and a model, and write a profile that fits them",
            lambda o: _call("project.new.run", o.name, o.images, o.model, o.masks, o.yes)),
    "train": ("train the profile's autoencoder and keep it where the notebooks look for it", _train),
    "latents": ("compute the statistics of the profile's autoencoder on its training images", _latents),
    "cache": ("write the activations of the training images to the disk, after a question",
              lambda o: _call("project.caching.run", o.profile, o.yes, o.dtype, o.verify)),
    "check": ("say what the profile needs, what is missing, and what it will cost",
              lambda o: _call("project.check.run", o.profile, o.quiet)),
    "fetch": ("download the profile's weights and images as far as the hub has them",
              lambda o: _call("project.fetch.run", o.profile, o.yes)),
    "dashboard": ("write a page per latent and an index, which open without a server",
                  lambda o: _call("app.dashboard.run", o.profile, o.latents)),
    "app": ("serve the explorer in a browser, to this machine alone unless told otherwise", _app),
    "reset": ("put data and figures of a profile back as they were committed, and remove what its runs left, after a "
              "question", lambda o: _call("project.reset.run", o.profile, o.yes)),
    "rehearsal": ("make random weights and images in the paper's dimensions, or report what the notebooks took with "
                  "them", lambda o: _call(f"project.rehearsal.{'made' if o.what == 'make' else 'reported'}")),
    "mini-clip": ("train the small CLIP of data/mini again", lambda o: _call("project.artifacts.mini_clip")),
    "artifacts": ("train again what the notebooks only show: sweeps, seeds, many adaptations",
                  lambda o: _call("project.artifacts.run", o.profile, o.yes))}
#: Commands whose work processes share, and those that are of no profile or always of the same.
SHARED, WITHOUT_PROFILE = ("train", "latents", "cache"), ("new", "rehearsal", "mini-clip")
#: Packages that only some commands import, and the extra of pyproject.toml that each comes with.
EXTRAS = {"peft": "adapt", "datasets": "scale", "anywidget": "app", "jinja2": "app", "jupyter_server": "app",
          "tornado": "app", "traitlets": "app", "voila": "app", "fonticon_mdi7": "notebooks",
          "jupyter_client": "notebooks", "matplotlib": "notebooks", "seaborn": "notebooks"}


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    whole = argparse.ArgumentParser(prog="patchsae", description="Sparse autoencoders on the tokens of CLIP.")
    commands = whole.add_subparsers(dest="command", required=True, metavar="command")
    parsers = {}
    for name, (does, _) in COMMANDS.items():
        parsers[name] = commands.add_parser(name, help=does, description=does)
        if name not in WITHOUT_PROFILE:
            parsers[name].add_argument("--profile", help="a name, or a file; by default what PROFILE says, or mini")
    new = parsers["new"].add_argument
    new("name", metavar="NAME", help="what the profile, its data and its figures will be called")
    new("--images", required=True, metavar="DIR", help="DIR/<class>/, or DIR/train/<class>/ and DIR/test/<class>/")
    new("--model", default="data/mini/clip", metavar="CLIP",
        help="a folder, a file or a name on the hub; by default the small one, which knows drawn scenes alone")
    new("--masks", default="", metavar="DIR", help="masks where the images would be, as the written profile explains")
    for name, what in (("new", "write"), ("reset", "do it"), ("cache", "write"), ("fetch", "download"),
                       ("artifacts", "train")):
        parsers[name].add_argument("--yes", action="store_true", help=f"{what} without asking")
    parsers["cache"].add_argument("--dtype", choices=("float16", "bfloat16"), help="default: the profile's data.cache")
    parsers["cache"].add_argument("--verify", action="store_true", help="check every byte and image instead")
    parsers["check"].add_argument("--quiet", action="store_true", help="print nothing unless something is missing")
    parsers["dashboard"].add_argument("--latents", default="", help="such as 0-99,512; by default all or 4,096 of them")
    app = parsers["app"].add_argument
    app("--host", default="127.0.0.1", help="the address to listen at, 127.0.0.1 by default")
    app("--port", type=int, default=8866, help="8866 by default")
    app("--allow-host", action="append", default=[], metavar="NAME", help="another name it may be opened under")
    app("--visitors", type=int, default=8, help="how many are served at a time, 8 by default")
    parsers["rehearsal"].add_argument("what", choices=("make", "report"))
    return whole


def main(arguments: list[str] | None = None) -> None:
    """Run one command and print what was done; an error that a user can mend is one sentence."""
    options = parser().parse_args(arguments)
    # Imported here, so that help comes at once.
    from patchsae.config import load_profile
    from patchsae.data.images import LostWorker
    from patchsae.fast import processes

    try:
        if "profile" in options:
            load_profile(options.profile)
        if options.command in SHARED:
            processes.join()
        said = COMMANDS[options.command][1](options)
    except (ValueError, OSError, LostWorker) as error:
        sys.exit(str(error))
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        sys.exit(f"{error.name}, which {options.command} needs, is not installed; run pip install "
                 f"'patchsae[{EXTRAS[error.name]}]'.")
    if said and processes.rank() == 0:
        print(said)


if __name__ == "__main__":
    main()
