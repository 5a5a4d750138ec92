# shellcheck shell=bash
# Set-up shared by the launch scripts. Source it: it goes to the repository root and leaves a Python with
# mat_dist first on PATH. The first call installs, later ones only compare a stamp (no network).
#
#   an active virtual or conda environment with torch >= 2.9: mat_dist is installed into it
#   else: .venv in the repository, made with $PYTHON (default python3); torch from there is used if it has one
#
# EXTRAS: optional dependencies to install, comma-separated (default: test)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

EXTRAS="${EXTRAS:-test}"

has_torch() {
    "$1" -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9))' 2>/dev/null
}

setup_env() {
    local active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" prefix="$PWD/.venv" base="${PYTHON:-python3}" key quiet=""
    # The folder is part of the key: an environment that two checkouts share points to the one installed last.
    key="$(cat setup.cfg pyproject.toml | cksum) $EXTRAS $PWD"
    if [ -n "$active" ] && { [ -e "$active/.mat_dist_stamp" ] || has_torch "$active/bin/python"; }; then
        prefix="$active"
    fi
    [ -t 1 ] || quiet="--quiet"  # progress bars only where somebody looks at them
    if [ "$(cat "$prefix/.mat_dist_stamp" 2>/dev/null || true)" != "$key" ]; then
        [ "$prefix" = "$active" ] || make_venv "$prefix" "$base"
        echo "mat_dist: installing mat_dist[$EXTRAS] into $prefix (torch is several GB, once)"
        "$prefix/bin/python" -m pip --version >/dev/null 2>&1 || "$prefix/bin/python" -m ensurepip >/dev/null
        "$prefix/bin/python" -m pip install $quiet --editable ".[$EXTRAS]"
        echo "$key" > "$prefix/.mat_dist_stamp"
    fi
    export VIRTUAL_ENV="$prefix" PATH="$prefix/bin:$PATH"
}

make_venv() {
    local prefix="$1" base="$2" site=""
    if ! command -v "$base" >/dev/null; then
        echo "mat_dist: error: no $base on PATH (PYTHON): set PYTHON to a Python of 3.11 or later" >&2
        exit 6
    fi
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "mat_dist: error: $base is $("$base" --version 2>&1) (PYTHON): set PYTHON to a Python of 3.11 or later" >&2
        exit 6
    fi
    # Only what the system itself has can be inherited, not the packages of another virtual environment.
    if has_torch "$base" && "$base" -c 'import sys; sys.exit(sys.prefix != sys.base_prefix)'; then
        site="--system-site-packages"
    fi
    echo "mat_dist: creating $prefix with $base ${site:+(with the torch that it has)}"
    "$base" -m venv $site "$prefix"
}

# The torchrun of this environment, also where torch comes from the system's site-packages.
torchrun() { python -m torch.distributed.run "$@"; }

setup_env
