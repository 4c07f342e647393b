# shellcheck shell=bash
# What a batch script does, on the first node of its job: start launch/ on every node, pass warnings on, requeue.
# train.sh and sweep.sh source it and call begin, then job; `root` is the checkout.

fail() { printf 'error: %s\n' "$*" >&2; exit 2; }
say() { printf '%s job %s: %s\n' "$(date +%FT%T)" "$VIT_DIST_JOB_ID" "$*"; }
field() { sed -n "s/^  \"$2\": \"\{0,1\}\(.*[^\",]\)\"\{0,1\},\{0,1\}$/\1/p" "$1" 2>/dev/null | head -n 1; }  # of a file of ours

warned='' step=''
on_warning() {  # Slurm takes the machines back soon: --signal, preemption, or scancel --batch --signal=USR1
  [[ -z $warned ]] || return 0
  warned=1
  say 'warned by Slurm; the training saves what it has'
  if [[ -n $step ]]; then kill -USR1 "$step" 2>/dev/null || true; fi
}

in_job() {  # in_job COMMAND...: in the job's container, if it has one, on its nodes; this shell goes on
  local container=()
  if [[ -n ${CONTAINER_IMAGE:-} ]]; then
    container=("--container-image=$CONTAINER_IMAGE" "--container-workdir=$PWD"
      "--container-mounts=${CONTAINER_MOUNTS:-$PWD:$PWD,$root:$root}")
  fi
  srun --export=ALL --kill-on-bad-exit=1 --cpu-bind=none "${container[@]}" "$@" &
  step=$!
}

ask() {  # ask MODULE [--flag value ...]: what a module of vit_dist prints, in the file $answer; ends if it fails
  local code=0
  in_job --nodes=1 --ntasks=1 "$root/launch/module.sh" "$@" >"$answer"
  attend || code=$?
  if [[ -n $warned ]]; then requeue 'before the training began'; fi
  ((code == 0)) || exit "$code"
}

attend() {  # attend: the exit code of the step, whatever signals come meanwhile
  local code=0
  while :; do
    wait "$step" && code=0 || code=$?
    if ! kill -0 "$step" 2>/dev/null; then break; fi  # else it was a signal to this shell that ended the waiting
  done
  step=''
  return "$code"
}

begin() {  # call first
  command -v srun >/dev/null || fail 'there is no srun here; give a container as CONTAINER_IMAGE, not to sbatch'
  # One name for all starts of a job, and one for each member of an array.
  export VIT_DIST_JOB_ID=$SLURM_JOB_ID
  if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then VIT_DIST_JOB_ID=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
  answer=$(mktemp)
  trap 'rm -f "$answer"' EXIT
  trap on_warning USR1
  say "start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST, ${SLURM_GPUS_ON_NODE:-0} GPUs on the first node"
}

job() {  # job [--strategy NAME] [train|doctor] [--flag value ...]
  local strategy=ddp verb=train arguments=() size=() code=0 run logs output
  while (($#)); do
    case $1 in
      --strategy) (($# > 1)) || fail '--strategy needs a name'; strategy=$2; shift ;;
      --strategy=*) strategy=${1#*=} ;;
      *) arguments+=("$1") ;;
    esac
    shift
  done
  case ${arguments[0]:-} in train | doctor) verb=${arguments[0]}; arguments=("${arguments[@]:1}") ;; esac
  if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then size+=("--gres=gpu:$SLURM_GPUS_ON_NODE"); fi  # else a step sees none
  if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then size+=("--cpus-per-task=$SLURM_CPUS_PER_TASK"); fi

  if [[ $verb == train ]]; then  # what is wrong with the command is said once, and before all nodes load libraries
    ask preflight "${arguments[@]}"
    run=$(tail -n 1 "$answer")
    logs=$run/jobs/$VIT_DIST_JOB_ID
    mkdir -p "$logs"
    output=$(readlink -f "/proc/$$/fd/1")
    if [[ -f $output && ! -e $logs/job.log ]]; then
      ln "$output" "$logs/job.log" 2>/dev/null || ln -s "$output" "$logs/job.log"
    fi
    touch "$logs/began"
    say "logs of all ranks: $logs"
  fi
  in_job --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 "${size[@]}" \
    "$root/slurm/node.sh" "$strategy" "$verb" "${arguments[@]}"
  attend || code=$?
  if [[ $verb == train ]]; then conclude "$run" "$code"; fi
  exit "$code"
}

conclude() {  # conclude RUN CODE: what became of the training; returns if the job is over
  local run=$1 code=$2 state='' by='' began=$1/jobs/$VIT_DIST_JOB_ID/began
  if [[ $run/status.json -nt $began ]]; then state=$(field "$run/status.json" state) by=$(field "$run/status.json" by); fi
  if ((code == 0)); then
    say 'complete'
  elif [[ $state == preempted && (-n $warned || $by == --max_time*) ]]; then
    requeue "after step $(field "$run/status.json" step)"
  elif [[ -n $warned && $state != @(failed|preempted|complete) ]]; then
    requeue 'before anything was to be saved'
  elif [[ $run/failure.json -nt $began ]]; then
    say "failed: $(field "$run/failure.json" reason)"
    say "rank $(field "$run/failure.json" rank) on $(field "$run/failure.json" host) was first to say so; more in $run/failure.json"
  else
    say "ended with exit code $code${state:+, $state}"
  fi
}

requeue() {  # requeue WHEN: once; the same job, with the same run folder, when Slurm has machines again
  trap '' USR1
  if [[ $1 == before* ]] && ((${SLURM_RESTART_COUNT:-0} >= 3)); then
    say "stopped $1 for the fourth time; give the job more time"
    exit 75
  fi
  say "stopped $1; back into the queue"
  scontrol requeue "$SLURM_JOB_ID" || { say 'which this job may not; submit the same command again to go on'; exit 75; }
  sleep 600 &  # Slurm ends this shell; a shell that ended by itself might be taken for the end of the job
  wait $!
  exit 75
}
