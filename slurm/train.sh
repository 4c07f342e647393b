#!/usr/bin/env bash
# Trains on the machines of a Slurm job.
#
#   sbatch slurm/train.sh configs/recipes/cifar10.yaml                             one node, all its GPUs
#   sbatch -N 4 --gpus-per-node 8 slurm/train.sh --data /data/photos --strategy fsdp2
#   sbatch --oversubscribe --gpus-per-node 1 -c 8 --mem 64G slurm/train.sh ...     a part of a node
#   NPROC_PER_NODE=2 sbatch -N 2 slurm/train.sh --data /data/photos                on CPUs
#   sbatch slurm/train.sh doctor --strategy zero2                                  are these nodes ready?
#
# Partition, account, time and whatever else a site wants: flags of sbatch, or its SBATCH_* variables. --strategy is a
# file of configs/accelerate without its ending (ddp by default); the rest goes to the training as it stands.
# What happens to it, and the variables it reads: docs/slurm.md.
#
#SBATCH --job-name=vit_dist
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=vit_dist-%j.log
set -euo pipefail

[[ -n ${SLURM_JOB_ID:-} ]] || { sed -n '2,/^#SBATCH/{/^#SBATCH/d;s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
trap 'warned=1' USR1  # job.sh sees to it; without this the shell would die of it
warned=''
# Slurm runs a copy of this file in its own folder. Where it was: what it was called by, or the folder one submits from.
called=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n '/^ *Command=/{s///p;q}') || true
for root in "${VIT_DIST_ROOT:-}" "${called%%/slurm/train.sh*}" "$SLURM_SUBMIT_DIR"; do
  if [[ -f $root/slurm/job.sh ]]; then break; fi
done
[[ -f $root/slurm/job.sh ]] || { echo "error: no slurm/job.sh in $root; set VIT_DIST_ROOT to the checkout" >&2; exit 2; }
# shellcheck source=slurm/job.sh
source "$root/slurm/job.sh"
begin
job "$@"
