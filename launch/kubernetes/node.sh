#!/usr/bin/env bash
# The command of each container of a Kubeflow PyTorchJob: says to launch/accelerate.sh which node this one is.
#
#   launch/kubernetes/node.sh STRATEGY [train|doctor] [RECIPE] [--flag value ...]
#
# The Training Operator (1.7 to 1.9) sets PET_NNODES, PET_NODE_RANK and MASTER_ADDR, MASTER_PORT in every container. Its
# RANK and WORLD_SIZE count containers or processes, depending on its version and on nprocPerNode: they are not used.
set -euo pipefail

for name in PET_NNODES PET_NODE_RANK MASTER_ADDR MASTER_PORT; do
  [[ -n ${!name:-} ]] || { printf 'error: %s is not set on %s; is this a container of a PyTorchJob with a Master?\n' \
    "$name" "$HOSTNAME" >&2; exit 2; }
done
[[ $PET_NNODES =~ ^[0-9]+$ ]] || { printf 'error: PET_NNODES is %s; a job with an elasticPolicy is not supported: %s\n' \
  "$PET_NNODES" "the number of nodes is fixed, so remove it from the PyTorchJob" >&2; exit 2; }
export NNODES=$PET_NNODES NODE_RANK=$PET_NODE_RANK
if [[ ${PET_NPROC_PER_NODE:-} =~ ^[0-9]+$ ]]; then export NPROC_PER_NODE=$PET_NPROC_PER_NODE; fi  # else: its GPUs
unset PET_NNODES PET_NODE_RANK PET_NPROC_PER_NODE PET_MASTER_ADDR PET_MASTER_PORT  # torchrun would read them too
exec "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/../accelerate.sh" "$@"
