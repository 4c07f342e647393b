#!/usr/bin/env bash
# Trains the members of a sweep, each as a job of its own, in one array.
#
#   vit-dist sweep configs/sweeps/lr.yaml                                          the members, and what became of them
#   sbatch --array=0-11%4 slurm/sweep.sh configs/sweeps/lr.yaml                    all 12, 4 at a time
#   sbatch --array=7 -N 2 slurm/sweep.sh configs/sweeps/lr.yaml --strategy fsdp2 --max_steps 1000
#
# Flags behind the file are for all members. Everything else as with slurm/train.sh. They are one group at W&B.
#
#SBATCH --job-name=vit_dist-sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=vit_dist-%A_%a.log
set -euo pipefail

[[ -n ${SLURM_JOB_ID:-} ]] || { sed -n '2,/^#SBATCH/{/^#SBATCH/d;s/^# \{0,1\}//p}' "$0" >&2; exit 2; }
trap 'warned=1' USR1  # job.sh sees to it; without this the shell would die of it
warned=''
# Slurm runs a copy of this file in its own folder. Where it was: what it was called by, or the folder one submits from.
called=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n '/^ *Command=/{s///p;q}') || true
for root in "${VIT_DIST_ROOT:-}" "${called%%/slurm/sweep.sh*}" "$SLURM_SUBMIT_DIR"; do
  if [[ -f $root/slurm/job.sh ]]; then break; fi
done
[[ -f $root/slurm/job.sh ]] || { echo "error: no slurm/job.sh in $root; set VIT_DIST_ROOT to the checkout" >&2; exit 2; }
# shellcheck source=slurm/job.sh
source "$root/slurm/job.sh"
begin
file=${1:-}
[[ -n $file && $file != -* ]] || fail "the sweep's file comes first: sbatch --array=0-11 slurm/sweep.sh SWEEP.yaml"
[[ -n ${SLURM_ARRAY_TASK_ID:-} ]] || fail "sbatch --array=0-11 says which members; vit-dist sweep $file lists them"
if [[ -z ${WANDB_RUN_GROUP:-} ]]; then
  ask "$root/launch/module.sh" sweep "$file" --name
  WANDB_RUN_GROUP=$(<"$answer")
  export WANDB_RUN_GROUP
fi
ask "$root/launch/module.sh" sweep "$file" --member "$SLURM_ARRAY_TASK_ID" -- "${@:2}"
mapfile -d '' -t member <"$answer"
((${#member[@]})) || fail "no arguments for member $SLURM_ARRAY_TASK_ID of $file"
job "${member[@]}"
