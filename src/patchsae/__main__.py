"""The command line, ``patchsae <command>`` or ``python -m patchsae <command>``.

Under ``accelerate launch -m patchsae train`` and ``torchrun -m patchsae train`` processes share the work.
"""

import argparse
import sys


def _new(options) -> str:
    """look at your images and a model, and write a profile that fits them"""
    from patchsae.project.new import run

    return run(options.name, options.images, options.model, options.masks, options.yes)


def _train(options) -> str:
    """train the profile's autoencoder and keep it where the notebooks look for it"""
    from patchsae.project.new import judgement
    from patchsae.studies.study import open_study, run_folder

    study = open_study(options.profile)
    log = study.training()[1]
    if log is None:
        return f"There is nothing to train: the profile names the autoencoder {study.profile.sae.weights}."
    folder = run_folder(study.profile, study.clip)
    return f"The autoencoder is in {study.profile.short(folder)}; {judgement(log, study.clip.width)}"


def _latents(options) -> str:
    """compute the statistics of the profile's autoencoder on its training images"""
    from patchsae.studies.study import open_study

    study = open_study(options.profile)
    found = study.stats
    return (f"Statistics of {len(found.frequency)} latents on {found.n_images} images are in "
            f"{study.profile.short(study.profile.run_dir)}/; {found.n_unreadable} images could not be read.")


def _cache(options) -> str:
    """write the activations of the training images to the disk, after a question"""
    from patchsae.project.caching import run

    return run(options.profile, options.yes, options.dtype, options.verify)


def _check(options) -> str:
    """say what the profile needs, what is missing, and what it will cost"""
    from patchsae.project.check import run

    return run(options.profile, options.quiet)


def _fetch(options) -> str:
    """download the profile's weights and images as far as the hub has them"""
    from patchsae.project.fetch import run

    return run(options.profile)


def _dashboard(options) -> str:
    """write a page per latent and an index, which open without a server"""
    from patchsae.app.dashboard import run

    return run(options.profile, options.latents)


def _reset(options) -> str:
    """put data and figures of a profile back as they were committed, and remove what its runs left, after a question"""
    from patchsae.project.reset import run

    return run(options.profile, options.yes)


def _app(options) -> str:
    """serve the explorer in a browser, to this machine alone unless told otherwise"""
    try:
        from patchsae.app import serve
    except ModuleNotFoundError as error:
        raise ValueError(f"The app needs {error.name}, which is not installed; run pip install "
                         "'patchsae[notebooks,app]'.") from error
    return serve.run(options.profile, serve.Door(options.host, options.port, tuple(options.allow_host),
                                                 options.visitors))


def _rehearsal(options) -> str:
    """make random weights and images in the paper's dimensions, or report what the notebooks took with them"""
    from patchsae.project import rehearsal

    return rehearsal.made() if options.what == "make" else rehearsal.reported()


def _mini_clip(options) -> str:
    """train the small CLIP of data/mini again"""
    from patchsae.project.artifacts import mini_clip

    return mini_clip()


def _artifacts(options) -> str:
    """train again what the notebooks only show: sweeps, seeds, many adaptations"""
    from patchsae.project.artifacts import run

    return run(options.profile)


COMMANDS = {"new": _new, "train": _train, "latents": _latents, "cache": _cache, "check": _check, "fetch": _fetch,
            "dashboard": _dashboard, "app": _app, "reset": _reset, "rehearsal": _rehearsal,
            "mini-clip": _mini_clip, "artifacts": _artifacts}
#: Commands whose work processes share, and those that are of no profile or always of the same.
SHARED, WITHOUT_PROFILE = ("train", "latents", "cache"), ("new", "rehearsal", "mini-clip")


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    whole = argparse.ArgumentParser(prog="patchsae", description="Sparse autoencoders on the tokens of CLIP.")
    commands = whole.add_subparsers(dest="command", required=True, metavar="command")
    parts = {}
    for name, run in COMMANDS.items():
        parts[name] = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        if name not in WITHOUT_PROFILE:
            parts[name].add_argument("--profile", help="a name, or a file; by default what PROFILE says, or else mini")
    new = parts["new"].add_argument
    new("name", metavar="NAME", help="what the profile, its data and its figures will be called")
    new("--images", required=True, metavar="DIR", help="DIR/<class>/, or DIR/train/<class>/ and DIR/test/<class>/")
    new("--model", default="data/mini/clip", metavar="CLIP",
        help="a folder, a file or a name on the hub; by default the small one, which knows drawn scenes alone")
    new("--masks", default="", metavar="DIR", help="masks where the images would be, as the written profile explains")
    for name, what in (("new", "write"), ("reset", "do it")):
        parts[name].add_argument("--yes", action="store_true", help=f"{what} without asking")
    parts["cache"].add_argument("--yes", action="store_true", help="write without asking")
    parts["cache"].add_argument("--dtype", choices=("float16", "bfloat16"), help="default: the profile's data.cache")
    parts["cache"].add_argument("--verify", action="store_true", help="check every byte and image instead")
    parts["check"].add_argument("--quiet", action="store_true", help="print nothing unless something is missing")
    parts["dashboard"].add_argument("--latents", default="", help="such as 0-99,512; by default all, or 4,096 of them")
    app = parts["app"].add_argument
    app("--host", default="127.0.0.1", help="the address to listen at, 127.0.0.1 by default")
    app("--port", type=int, default=8866, help="8866 by default")
    app("--allow-host", action="append", default=[], metavar="NAME", help="another name it may be opened under")
    app("--visitors", type=int, default=8, help="how many are served at a time, 8 by default")
    parts["rehearsal"].add_argument("what", choices=("make", "report"))
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
        said = COMMANDS[options.command](options)
    except (ValueError, OSError, LostWorker) as error:
        sys.exit(str(error))
    if said and processes.rank() == 0:
        print(said)


if __name__ == "__main__":
    main()
