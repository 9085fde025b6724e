"""Execute notebooks whose code or inputs changed since their last run.

What is executed is a copy in ``build/<profile>/``; beside it lies a stamp with the notebook's key (see
``notebook_key.py``) and the hash of every file the notebook wrote. A notebook is up to date when the key and
all those files are still the same; file times are never looked at. ``--in-place`` always executes, and stores
the cleaned outputs in the notebook itself.
"""

import argparse
import contextlib
import fcntl
import json
import os
import re
import resource
import sys
import tempfile
import time
from pathlib import Path

from notebook_key import file_hash, notebook_key, project_folder, read_notebook, runs_after

ROOT = Path(__file__).resolve().parents[1]
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
#: Folders that a path of somebody's machine begins with, and addresses in memory: never the same twice.
MACHINE = re.compile(r"(?<![\w.~-])/(?:home|root|tmp|work|Users|mnt)\b[\w./-]*|\bat 0x[0-9a-f]{6,}")
EMBEDDED_IMAGE = re.compile(r"base64,[A-Za-z0-9+/=\s]+")


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


# Stamps

def is_up_to_date(stamp: Path, key: str, root: Path) -> bool:
    """Whether the last run had this key and every file it wrote is still as it was."""
    try:
        content = json.loads(stamp.read_text(encoding="utf-8"))
        return content["key"] == key and all(
            file_hash(root / name) == digest for name, digest in content["files"].items())
    except (OSError, ValueError, KeyError):
        return False


def written_files(manifest: Path, root: Path) -> dict[str, str]:
    """Hashes of the files that a run noted in its manifest."""
    lines = manifest.read_text(encoding="utf-8").splitlines() if manifest.is_file() else []
    names = sorted({line.strip() for line in lines if line.strip()})
    if missing := [name for name in names if not (root / name).is_file()]:
        raise SystemExit(f"{manifest.stem} noted {missing[0]} as written, but it is missing; mend its cells.")
    return {name: file_hash(root / name) for name in names}


def images_read(path: Path) -> float:
    """Passes over the training images that the reader counted: a line each time, how many were read of how many."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return sum(int(n) / int(of) for n, of in map(str.split, lines))


@contextlib.contextmanager
def one_at_a_time(path: Path):
    """Hold a lock file: under ``make -j`` a notebook that two others wait for runs once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# Outputs

def clean(notebook):
    """Leave nothing in an executed notebook that differs between two equal runs.

    Progress bars, warnings and live widgets mean nothing when it is stored; the cells are numbered from 1.
    """
    kept = {key: value for key, value in notebook.metadata.items() if key == "patchsae"}
    spec = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": spec, "language_info": {"name": "python"}} | kept
    count = 0
    for cell in notebook.cells:
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        if cell.cell_type != "code":
            continue
        count += bool(cell.source.strip())
        cell.execution_count = count if cell.source.strip() else None
        cell.outputs = [output for output in cell.outputs
                        if output.get("name") != "stderr" and WIDGET_VIEW not in output.get("data", {})]
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = cell.execution_count
    return notebook


def output_texts(cell: dict) -> list[str]:
    """All text in the outputs of a cell, without images."""
    parts = []
    for output in cell.get("outputs", []):
        parts += [output.get("text", ""), output.get("traceback", "")]
        parts += [value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")]
    texts = ["".join(map(str, part)) if isinstance(part, list) else str(part) for part in parts]
    return [EMBEDDED_IMAGE.sub("", text) for text in texts]


def check_outputs(notebook, name: str) -> None:
    """Refuse outputs that only this machine can have: its paths, and addresses in its memory."""
    here = [path for path in (str(ROOT), str(Path.home()), sys.prefix, tempfile.gettempdir()) if len(path) > 1]
    for cell in notebook.cells:
        for text in output_texts(cell):
            if traces := MACHINE.findall(text) + [path for path in here if path in text]:
                raise SystemExit(f"Nothing was stored, because the output of cell {cell.execution_count} in notebooks/"
                                 f"{name}.ipynb holds {traces[0]!r}; print relative paths and no bare objects.")


# Running

def kernel_environment(root: Path, manifest: Path, profile: str) -> dict[str, str]:
    """Variables of the kernel: the code of this folder, and no start-up files of the user."""
    search = [str(root / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {key: value for key, value in os.environ.items() if key != "MPLBACKEND"} | {
        "PYTHONPATH": os.pathsep.join(search), "IPYTHONDIR": str(root / "build" / "ipython"),
        "PATCHSAE_HOME": str(project_folder(root)), "PATCHSAE_MANIFEST": str(manifest), "PROFILE": profile}


def execute(path: Path, environment: dict[str, str]):
    """Run all cells in a new kernel of this interpreter, in the notebook's folder; returns the clean result, parsed and
    as text."""
    # Imported here: looking whether anything is to be done should not wait for it.
    import nbformat
    from jupyter_client.kernelspec import KernelSpecManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=None, kernel_name="python3", coalesce_streams=True,
                            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
                            resources={"metadata": {"path": str(path.parent)}})
    # Without folders to search, "python3" can only be this interpreter.
    client.create_kernel_manager().kernel_spec_manager = KernelSpecManager(kernel_dirs=[])
    try:
        client.execute(env=environment)
    except CellExecutionError as error:
        if error.ename != "LeftOut":
            raise SystemExit(f"{error}\n{path.stem} failed; mend the cell above and run it again.") from None
        print(f"{path.stem}: {error.evalue}")  # the rest of it has nothing to show for this profile
    except (DeadKernelError, RuntimeError, AssertionError):  # the last when nbclient itself is interrupted
        raise SystemExit(f"{path.stem} was interrupted or ran out of memory; run it again.") from None
    # The text is what JupyterLab would store, byte by byte.
    return clean(notebook), nbformat.writes(notebook).rstrip("\n") + "\n"


def used_so_far() -> tuple[float, int]:
    """What the kernels of this process took: seconds on all cores together, and most bytes held at once."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run(name: str, root: Path, profile: str, in_place: bool = False, quiet: bool = False) -> None:
    """Bring one notebook, and those it runs after, up to date."""
    key = notebook_key(name, profile, root)
    path = root / "notebooks" / f"{name}.ipynb"
    for other in runs_after(read_notebook(path), name):
        run(other, root, profile, quiet=True)
    home = project_folder(root)
    build = home / "build" / Path(profile).stem
    stamp, manifest = build / f"{name}.json", build / f"{name}.manifest"
    with one_at_a_time(build / f"{name}.lock"):
        if not in_place and is_up_to_date(stamp, key, home):
            return None if quiet else print(f"{name}: up to date", flush=True)
        start, (computed, _) = time.monotonic(), used_so_far()
        stamp.unlink(missing_ok=True)
        read = build / f"{name}.read"
        for file in (manifest, read):
            file.unlink(missing_ok=True)
        notebook, text = execute(path, kernel_environment(root, manifest, profile) | {"PATCHSAE_READ": str(read)})
        files = written_files(manifest, home)
        write_text(build / f"{name}.ipynb", text)
        if in_place:
            check_outputs(notebook, name)
            write_text(path, text)
        seconds, (processor, peak) = time.monotonic() - start, used_so_far()
        took = {"seconds": round(seconds, 1), "processor_seconds": round(processor - computed, 1), "peak_bytes": peak,
                "passes": round(passes := images_read(read), 3)}
        write_text(stamp, json.dumps({"key": key, "files": files} | took, indent=1) + "\n")
    said = f", training images read {passes:.2f} times" if passes else ""
    print(f"{name}: {seconds:.0f} s, {sum(file.endswith('.png') for file in files)} figures{said}", flush=True)


def main() -> None:
    """Read the command line and run the notebooks in the order given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="notebooks/<name>.ipynb")
    parser.add_argument("--in-place", action="store_true", help="always execute, and store the outputs")
    arguments = parser.parse_args()
    for notebook in arguments.notebooks:
        run(Path(notebook).stem, ROOT, os.environ.get("PROFILE", "mini"), arguments.in_place)


if __name__ == "__main__":
    main()
