#!/usr/bin/env bash
# Make .venv in the repository and install the requirements in it. Needs neither root nor a GPU.
#
#   bash launch/setup.sh        requirements.txt
#   bash launch/setup.sh dev    also the requirements of the tests
#
# PYTHON=/path/to/python3 selects the interpreter. If the requirement files are installed and unchanged, the script does
# nothing: the hash of each file is stored in .venv after its installation. An interrupted installation is repeated.
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
        "Install one (Debian, Ubuntu: sudo apt-get install python3 python3-venv), or give its path:" \
        "PYTHON=/path/to/python3.12 bash launch/setup.sh"
}

# On Debian and Ubuntu, ensurepip, which installs pip in a new environment, is in a separate package, python3-venv.
# Without it, pip can be installed without root from the pip of the system, or from Debian's wheel of pip.
make_environment() {
    local python=$1 wheels
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv .venv && return
    fi
    "$python" -m venv --without-pip .venv || return
    say "this Python has no ensurepip; installing pip from the system or from Debian's wheel"
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
    say "installing ${requirements[*]} in .venv: about 3 GB of downloads and 6 GB on disk, mostly PyTorch"
    for file in "${requirements[@]}"; do
        rm -f "$(stamp "$file")"
        arguments+=(-r "$file")
    done
    .venv/bin/python -m pip install --disable-pip-version-check --progress-bar on "${arguments[@]}" >&2 ||
        fail "could not install the packages of ${requirements[*]} from the Python package index." \
            "The line above names the package. Check the network (pip honours https_proxy and PIP_INDEX_URL) and the" \
            "disk space ($(df -h --output=avail . | tail -n 1 | tr -d ' ') free), then run the same command again: it continues."
    for file in "${requirements[@]}"; do
        fingerprint "$file" >"$(stamp "$file").new"
        mv "$(stamp "$file").new" "$(stamp "$file")"
    done
}

all_installed && exit 0

mkdir -p .venv
exec 9>.venv/.setup-lock
flock 9 # a concurrent script waits here until the installation is complete
all_installed && exit 0

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    say "making .venv with $python ($("$python" --version))"
    make_environment "$python" ||
        fail "could not make a virtual environment with $python" \
            "On Debian and Ubuntu install a package: sudo apt-get install python3-venv" \
            "or use another Python: PYTHON=/path/to/python3.12 bash launch/setup.sh"
fi
install
say "done"
