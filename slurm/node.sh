#!/usr/bin/env bash
# Run by srun, once on each node of the job: what Slurm says of this node, in the words of launch/.
#
#   node.sh STRATEGY train|doctor [--flag value ...]
set -euo pipefail

# The first host of a list such as n1,n2 or rack[1-2]gpu[001-004,007]: `scontrol show hostnames` is not in containers.
first_host() {
  local list=$1 host=''
  while [[ $list == *'['* && ${list%%[*} != *,* ]]; do
    host+=${list%%[*}
    list=${list#*[}
    host+=${list%%[]\-,]*}
    list=${list#*]}
  done
  printf '%s%s\n' "$host" "${list%%,*}"
}

export NNODES=$SLURM_JOB_NUM_NODES NODE_RANK=$SLURM_NODEID VIT_DIST_HOSTS=$SLURM_JOB_NUM_NODES
MASTER_ADDR=$(first_host "$SLURM_JOB_NODELIST")
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))  # below the ports that a kernel gives away by itself
export GPUS_PER_NODE=${SLURM_GPUS_ON_NODE:-0} VIT_DIST_CPUS=$SLURM_CPUS_ON_NODE
exec "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/../launch/accelerate.sh" "$@"
