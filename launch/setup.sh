#!/usr/bin/env bash
# Makes .venv in the repository and installs the requirements in it. Needs no root and no GPU.
#
#   bash launch/setup.sh        what training needs
#   bash launch/setup.sh dev    and the tools of the tests
#
# PYTHON=/path/to/python3 chooses the interpreter. A second run with unchanged requirement files does nothing: each
# file's hash is noted in .venv after its installation, so an interrupted one is not taken for a finished one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'setup: %s\n' "$*" >&2; }
fail() {
    say "error: $1"
    shift
    printf '       %s\n' "$@" >&2
    exit 1
}

requirements=(requirements.txt)
case "${1:-}" in
    "") ;;
    dev) requirements+=(requirements-dev.txt requirements-storage.txt) ;;
    -h | --help)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0"
        exit 0
        ;;
    *) fail "unknown argument '$1'" "Use: bash launch/setup.sh [dev]" ;;
esac

fingerprint() { sha256sum <"$1" | cut -d ' ' -f 1; }
stamp() { printf '.venv/.installed-%s\n' "${1%.txt}"; }
is_installed() { [ -x .venv/bin/python ] && [ "$(cat "$(stamp "$1")" 2>/dev/null)" = "$(fingerprint "$1")" ]; }

all_installed() {
    local file
    for file in "${requirements[@]}"; do is_installed "$file" || return 1; done
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local name
    for name in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if is_new_enough "$name"; then
            command -v "$name"
            return
        fi
    done
    fail "no Python 3.11 or newer among: ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}" \
        "Install one (Debian, Ubuntu: sudo apt-get install python3 python3-venv), or name it:" \
        "PYTHON=/path/to/python3.12 bash launch/setup.sh"
}

# Debian and Ubuntu split the part of Python that puts pip in a new environment off into a package, python3-venv.
# Without it there are two ways to get pip that need no root: the system's own pip, or Debian's wheel of it.
make_environment() {
    local python=$1 wheels
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv .venv && return
    fi
    "$python" -m venv --without-pip .venv || return
    say "this Python has no ensurepip; getting pip another way"
    "$python" -m pip --python .venv/bin/python install --quiet pip && return
    wheels=$(mktemp -d)
    (
        cd "$wheels" &&
            apt-get download -qq python3-pip-whl && dpkg-deb -x python3-pip-whl_*.deb .
    ) && .venv/bin/python "$(echo "$wheels"/usr/share/python-wheels/pip-*.whl)/pip" install --quiet pip
    local status=$?
    rm -rf "$wheels"
    return "$status"
}

install() {
    local file arguments=()
    say "installing ${requirements[*]} in .venv: about 3 GB to fetch and 6 GB on disk, most of it PyTorch"
    for file in "${requirements[@]}"; do
        rm -f "$(stamp "$file")"
        arguments+=(-r "$file")
    done
    .venv/bin/python -m pip install --disable-pip-version-check --progress-bar on "${arguments[@]}" >&2 ||
        fail "could not install the packages of ${requirements[*]} from the Python package index." \
            "The line above says which. Check the network (pip honours https_proxy and PIP_INDEX_URL) and the" \
            "space here ($(df -h --output=avail . | tail -n 1 | tr -d ' ') free), then run the same command again: it continues."
    for file in "${requirements[@]}"; do
        fingerprint "$file" >"$(stamp "$file").new"
        mv "$(stamp "$file").new" "$(stamp "$file")"
    done
}

all_installed && exit 0

mkdir -p .venv
exec 9>.venv/.setup-lock
flock 9 # two scripts started together: the second waits, then finds the work done
all_installed && exit 0

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    say "making .venv with $python ($("$python" --version))"
    make_environment "$python" ||
        fail "could not make a virtual environment with $python" \
            "On Debian and Ubuntu it needs a package: sudo apt-get install python3-venv" \
            "or another Python: PYTHON=/path/to/python3.12 bash launch/setup.sh"
fi
install
say "done"
