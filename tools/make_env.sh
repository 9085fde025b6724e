#!/usr/bin/env bash
# make_env.sh <folder>: a virtual environment in <folder> with the packages of requirements.lock and this package.
# With conda on the path the folder becomes a conda environment. Nothing happens, and no network is needed, when
# the folder already holds what requirements.lock, pyproject.toml and environment.yml ask for.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$1
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

if is_current; then exit 0; fi
rm -f "$stamp"
if [ "$(basename "$folder")" = .conda ]; then make_conda; else make_venv; fi
install_packages || fail "The packages of requirements.lock could not be installed in $folder (see above); run make env again, it goes on where it stopped."
wanted_stamp > "$stamp.part"
mv "$stamp.part" "$stamp"
echo "The environment is ready in $folder"
