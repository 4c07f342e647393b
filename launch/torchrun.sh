#!/usr/bin/env bash
# Starts data parallel training (DDP) with torchrun; one process is started without it.
#
#   launch/torchrun.sh [train|doctor] [RECIPE] [--flag value ...]
#
#   launch/torchrun.sh --data ~/photos                              one process on each GPU of this machine
#   NPROC_PER_NODE=2 launch/torchrun.sh --data ~/photos             two processes, on CPUs if there is no GPU
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node1 launch/torchrun.sh ...   first of two nodes; NODE_RANK=1 on the other
#   DRY_RUN=1 launch/torchrun.sh                                    shows the command and starts nothing
#
# `launch/torchrun.sh train --help` lists the options of the training. For ZeRO and FSDP: launch/accelerate.sh.
# Environment variables: launch/README.md.
set -euo pipefail

case ${1:-} in -h | --help | help)
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  exit 0 ;;
esac
# shellcheck source=launch/topology.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/topology.sh"

topology
require torch vit_dist
if ((PROCESSES == 1)); then start "$PYTHON" -m "$MODULE" "$@"; fi
launcher=("$PYTHON" -m vit_dist.launcher torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE")
if [[ -n ${MASTER_PORT:-} ]]; then
  launcher+=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
else
  launcher+=(--standalone)  # takes a free port itself, so that two runs on a machine do not meet
fi
start "${launcher[@]}" -m "$MODULE" "$@"
