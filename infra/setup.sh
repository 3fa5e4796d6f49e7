#!/usr/bin/env bash
# Makes the virtual environment of the checkout: finds a Python 3.11 or 3.12, installs the pinned versions, keeps a log.
#   infra/setup.sh .venv             the project with everything that its tests need
#   infra/setup.sh .venv-docs docs   the packages of one extra, without the project
set -euo pipefail

venv=${1:-.venv}
extra=${2:-}
log=$venv/setup.log

# A name on the PATH is not enough: version managers put shims there that only print an error.
python=
for candidate in "${TRIP_PYTHON:-}" python3.11 python3.12 python3 python; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "error: no Python 3.11 or 3.12 with venv and pip was found; install one (Debian: apt install python3.11-venv)" \
        "or name it: make setup TRIP_PYTHON=/path/to/python3.11" >&2
    exit 1
fi

if [ -z "$extra" ]; then
    packages=(-e '.[pipeline,dev]')
    expect="2 to 8 minutes the first time; about 3.6 GB to download, 8 GB installed"
else
    # The extra's own packages: `.[docs]` would bring the project along, and torch with it.
    packages=()
    while IFS= read -r package; do packages+=("$package"); done < <("$python" -c 'import sys, tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]], sep="\n")' "$extra")
    expect="a minute"
fi

echo "setup: $("$python" --version) -> $venv; the log is $log; expect $expect"
rm -rf "$venv"
"$python" -m venv "$venv"

# One line for every 40 packages found, for every large download and for the long silent step at the end.
tick() {
    local line found=0
    while IFS= read -r line; do
        case $line in
        "Collecting "*)
            found=$((found + 1))
            [ $((found % 40)) -ne 0 ] || echo "setup: $found packages found, $SECONDS s"
            ;;
        *Downloading*"("[0-9][0-9][0-9]*.?" MB)"*) echo "setup: fetching ${line##* Downloading }" ;;
        "Installing collected packages"*) echo "setup: installing $found packages, $SECONDS s" ;;
        esac
    done
}

# uv unpacks and links the same wheels on all cores, which halves the wait; pip does the work where uv cannot.
# Byte code is written here, once: every Ray worker imports torch and diffusers again, and where the environment forbids
# writing byte code later (PYTHONDONTWRITEBYTECODE, read-only images) each import would take three times as long.
uv_install() {
    "$venv/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check "$(grep '^uv==' constraints.txt)" \
        >>"$log" 2>&1 || return 1
    "$venv/bin/uv" pip install --python "$venv/bin/python" --no-progress --compile-bytecode \
        -c constraints.txt "${packages[@]}" >>"$log" 2>&1
}

if ! uv_install; then
    echo "setup: uv could not install them, trying pip"
    if ! PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip install --progress-bar off \
        -c constraints.txt "${packages[@]}" 2>&1 | tee "$log" | tick; then
        echo "error: pip could not install the pinned versions; the last lines of $log:" >&2
        grep -v '^WARNING' "$log" | tail -n 15 >&2
        exit 1
    fi
fi
echo "setup: done in $SECONDS s"
