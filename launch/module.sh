#!/usr/bin/env bash
# Runs one module of vit_dist in one process, for what a batch system asks before it starts training.
#
#   launch/module.sh preflight [RECIPE] [--flag value ...]
set -euo pipefail
# shellcheck source=launch/python.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/python.sh"
[[ $1 == train ]] && module=vit_dist.train || module=vit_dist.commands.$1
exec "$PYTHON" -m "$module" "${@:2}"
