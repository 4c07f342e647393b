# shellcheck shell=bash
# Which interpreter has vit_dist; sourced by the other scripts. PYTHON, or that of the active environment, or of .venv.

fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

ROOT=$(dirname -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")")
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  if [[ -z ${VIRTUAL_ENV:-} && -x $ROOT/.venv/bin/python ]]; then PYTHON=$ROOT/.venv/bin/python; fi
fi
command -v "$PYTHON" >/dev/null || fail "there is no $PYTHON on ${HOSTNAME:-this host}; set PYTHON to the interpreter that has vit_dist"
"$PYTHON" -c 'import vit_dist' 2>/dev/null || fail "vit_dist is not installed for $PYTHON; activate its environment, or set PYTHON"
