#!/usr/bin/env bash
# What can be told of a run before processes are started for it; prints the run folder.
#
#   launch/preflight.sh [RECIPE] [--flag value ...]
set -euo pipefail
# shellcheck source=launch/python.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/python.sh"
exec "$PYTHON" -m vit_dist.preflight "$@"
