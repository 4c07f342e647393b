#!/usr/bin/env bash
# Starts data parallel training (DDP) with torchrun; one process is started without it.
#
#   launch/torchrun.sh [train|doctor] [RECIPE] [--flag value ...]
#
# The same as `vit-dist train --strategy torchrun`, with the interpreter of python.sh. --help shows examples.
set -euo pipefail
# shellcheck source=launch/python.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/python.sh"
case ${1:-} in -h | --help | help) exec "$PYTHON" -m vit_dist.launch --help ;; esac
exec "$PYTHON" -m vit_dist.launch torchrun "$@"
