#!/usr/bin/env bash
# Starts training with `accelerate launch` and a strategy: how the training state is spread over processes.
#
#   launch/accelerate.sh STRATEGY [train|doctor] [RECIPE] [--flag value ...]
#
# The same as `vit-dist train --strategy STRATEGY`, with the interpreter of python.sh. --help shows examples.
set -euo pipefail
# shellcheck source=launch/python.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/python.sh"
exec "$PYTHON" -m vit_dist.launch "$@"
