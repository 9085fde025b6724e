#!/usr/bin/env bash
# make_env.sh <folder>: a virtual environment in <folder> with the packages of requirements.lock and this package.
# With conda on the path the folder becomes a conda environment. Nothing happens, and no network is needed, when
# the folder already holds what requirements.lock, pyproject.toml and environment.yml ask for.
# make_env.sh --check <interpreter>: whether an interpreter of one's own has what pyproject.toml asks for.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "$1" = --check ]; then checked=$2; folder=; else folder=$1; fi
python="$PWD/$folder/bin/python"
# The stamp lies inside the environment: it goes when the environment goes, and survives `make clean`.
stamp="$folder/patchsae.stamp"

fail() { echo "$1" >&2; exit 1; }

# The place counts too, because the scripts of an environment hold its path.
wanted_stamp() {
    "$python" - "$PWD" requirements.lock pyproject.toml environment.yml <<'PYTHON'
import hashlib, pathlib, sys
digest = hashlib.sha256(sys.argv[1].encode())
for name in sys.argv[2:]:
    digest.update(hashlib.sha256(pathlib.Path(name).read_bytes()).digest())
print(digest.hexdigest())
PYTHON
}

is_current() { [ -x "$python" ] && [ -f "$stamp" ] && [ "$(wanted_stamp)" = "$(cat "$stamp")" ]; }

recent_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# 3.11 first, because the lock was made with it.
find_python() {
    local name
    for name in python3.11 python3 python3.12 python3.13 python; do
        if command -v "$name" >/dev/null && recent_enough "$name"; then echo "$name"; return; fi
    done
    fail "No Python 3.11 or newer was found on the path; install it, or conda, and run make env again."
}

make_venv() {
    local base
    if "$python" -m pip --version >/dev/null 2>&1 && recent_enough "$python"; then return; fi
    base=$(find_python)
    "$base" -m venv --clear "$folder" ||
        fail "$base could not create $folder; install its venv module (Debian and Ubuntu: python3-venv) and run make env again."
}

make_conda() {
    [ -d "$folder/conda-meta" ] || conda create --yes --prefix "$folder" --channel conda-forge --override-channels python=3.11 pip
}

install_packages() {
    "$python" -m pip install --disable-pip-version-check --requirement requirements.lock &&
        "$python" -m pip install --disable-pip-version-check --no-deps --no-build-isolation --editable .
}

# What an interpreter lacks of what pyproject.toml asks for in order to run, too old versions too.
missing_packages() {
    "$1" - <<'PYTHON'
import importlib.metadata as metadata, re, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = [lines for extra, lines in project["optional-dependencies"].items() if extra != "dev"]
numbers = lambda version: [int(n) for n in re.findall(r"\d+", version)[:3]]
missing = []
for line in sum(extras, project["dependencies"]):
    name, least, below = re.fullmatch(r"([\w-]+)>=([\d.]+)(?:,<([\d.]+))?", line).groups()
    try:
        there = numbers(metadata.version(name))
    except metadata.PackageNotFoundError:
        there = []
    if there < numbers(least) or below and there >= numbers(below):
        missing.append(line)
print(*missing[:3], *([f"and {len(missing) - 3} more packages"] if missing[3:] else []))
PYTHON
}

check_interpreter() {
    local missing
    command -v "$1" >/dev/null || fail "PYTHON=$1 is no interpreter; give the path of one, or leave PYTHON= out."
    recent_enough "$1" || fail "PYTHON=$1 is not Python 3.11 or newer; give another one, or leave PYTHON= out."
    missing=$(missing_packages "$1")
    [ -z "$missing" ] || fail "PYTHON=$1 lacks $missing; run $1 -m pip install --requirement requirements.lock, or leave PYTHON= out."
}

if [ -z "$folder" ]; then check_interpreter "$checked"; exit; fi
if is_current; then exit 0; fi
rm -f "$stamp"
if [ "$(basename "$folder")" = .conda ]; then make_conda; else make_venv; fi
install_packages || fail "The packages of requirements.lock could not be installed in $folder (see above); run make env again, it goes on where it stopped."
wanted_stamp > "$stamp.part"
mv "$stamp.part" "$stamp"
echo "The environment is ready in $folder"
