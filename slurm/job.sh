# shellcheck shell=bash
# What a batch script does, on the first node of its job: start launch/ on every node, pass warnings on, requeue.
# train.sh and sweep.sh source it and call begin, then job; `root` is the checkout.

fail() { printf 'error: %s\n' "$*" >&2; exit 2; }
say() { printf '%s job %s: %s\n' "$(date +%FT%T)" "$VIT_DIST_JOB_ID" "$*"; }

step='' told=''  # the step that runs, and the one that was told of a warning
on_warning() {  # Slurm takes the machines back soon: --signal, preemption, or scancel --batch --signal=USR1
  if [[ -z $warned ]]; then say 'warned by Slurm; the training saves what it has'; fi
  warned=1
  if [[ -n $step && $told != "$step" ]]; then  # once: a launcher that is told twice leaves its processes
    told=$step
    tell "$step"
  fi
}

# tell STEP: of a warning, once the step runs its own program. Until then it is a copy of this shell, and would lose it.
tell() {
  local own=() its=() _
  mapfile -d '' own <"/proc/$$/cmdline"
  for _ in {1..100}; do
    mapfile -d '' its 2>/dev/null <"/proc/$1/cmdline" || break
    [[ ${its[*]} == "${own[*]}" ]] || break
    sleep 0.05
  done
  kill -USR1 "$1" 2>/dev/null || true
}

in_job() {  # in_job COMMAND...: in the job's container, if it has one, on its nodes; this shell goes on
  local container=()
  if [[ -n ${CONTAINER_IMAGE:-} ]]; then
    container=("--container-image=$CONTAINER_IMAGE" "--container-workdir=$PWD"
      "--container-mounts=${CONTAINER_MOUNTS:-$PWD:$PWD,$root:$root}")
  fi
  if command -v srun >/dev/null; then
    srun --export=ALL --kill-on-bad-exit=1 --cpu-bind=none "${container[@]}" "$@" &
  else
    while [[ $1 == --* ]]; do shift; done  # srun's
    "$@" &
  fi
  step=$!
  if [[ -n $warned ]]; then on_warning; fi  # it came before there was a step to tell
}

ask() {  # ask COMMAND...: what it prints on the first node, in the file $answer; ends if it fails
  local code=0
  in_job --nodes=1 --ntasks=1 "$@" >"$answer"
  attend || code=$?
  if [[ -n $warned ]]; then requeue 'before the training began'; fi
  ((code == 0)) || exit "$code"
  [[ -s $answer ]] || fail "no answer from the first node; is ${TMPDIR:-/tmp} full on $HOSTNAME?"
}

attend() {  # attend: the exit code of the step, whatever signals come meanwhile; 138 if one came together with its end
  local code=0
  wait "$step" || code=$?
  while kill -0 "$step" 2>/dev/null; do  # it was a signal to this shell that ended the waiting
    code=0
    wait "$step" || code=$?
  done
  step=''
  return "$code"
}

begin() {  # call first
  unset VIT_DIST_RUN_FOLDER  # of a job that this one was submitted from
  command -v srun >/dev/null || ((SLURM_JOB_NUM_NODES == 1)) ||
    fail 'there is no srun here, and several nodes need it; give a container as CONTAINER_IMAGE, not to sbatch'
  # One name for all starts of a job, and one for each member of an array.
  export VIT_DIST_JOB_ID=$SLURM_JOB_ID
  if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then VIT_DIST_JOB_ID=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
  answer=$(mktemp) || fail "no file can be made in ${TMPDIR:-/tmp} on $HOSTNAME"
  trap 'rm -f "$answer"' EXIT
  trap on_warning USR1
  trap : TERM  # the processes hear it from Slurm; this shell lives on to say what became of them
  say "start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST, ${SLURM_GPUS_ON_NODE:-0} GPUs on the first node"
}

job() {  # job [--strategy NAME] [train|doctor] [--flag value ...]
  local strategy=ddp verb=train arguments=() size=() code=0 run logs output
  while (($#)); do
    case $1 in
      --strategy) (($# > 1)) || fail '--strategy needs a name'; strategy=$2; shift ;;
      --strategy=*) strategy=${1#*=} ;;
      -h | --help) in_job --nodes=1 --ntasks=1 "$root/launch/module.sh" train --help; attend; exit ;;
      *) arguments+=("$1") ;;
    esac
    shift
  done
  case ${arguments[0]:-} in train | doctor) verb=${arguments[0]}; arguments=("${arguments[@]:1}") ;; esac
  if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then size+=("--gres=gpu:$SLURM_GPUS_ON_NODE"); fi  # else a step sees none
  if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then size+=("--cpus-per-task=$SLURM_CPUS_PER_TASK"); fi

  # What is wrong is said once, by the first node, and before all of them load libraries.
  ((${SLURM_GPUS_ON_NODE:-0} > 0)) || [[ -n ${NPROC_PER_NODE:-} ]] ||
    fail 'this job has no GPUs; ask for them (sbatch --gpus-per-node N), or train on CPUs: NPROC_PER_NODE=N sbatch ...'
  DRY_RUN=1 ask "${size[@]}" "$root/slurm/node.sh" "$strategy" "$verb" "${arguments[@]}"
  if [[ $verb == train ]]; then
    ask "$root/launch/module.sh" preflight "${arguments[@]}"
    run=$(tail -n 1 "$answer")
    [[ $run == /* ]] || fail "the check of the command names no run folder but '$run'"
    export VIT_DIST_RUN_FOLDER=$run  # another job must not change this answer before the training starts
    logs=$run/jobs/$VIT_DIST_JOB_ID
    mkdir -p "$logs"
    output=$(readlink -f "/proc/$$/fd/1")
    if [[ -f $output && ! -e $logs/job.log ]]; then
      ln "$output" "$logs/job.log" 2>/dev/null || ln -s "$output" "$logs/job.log"
    fi
    touch "$logs/began"
    say "logs of all ranks: $logs"
    if [[ -n $warned ]]; then requeue 'before the training began'; fi
  fi
  in_job --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 "${size[@]}" \
    "$root/slurm/node.sh" "$strategy" "$verb" "${arguments[@]}"
  attend || code=$?
  if [[ $verb == train ]]; then conclude "$run" "$code"; fi
  exit "$code"
}

conclude() {  # conclude RUN CODE: what became of the training; returns if the job is over
  local run=$1 code=$2 logs=$1/jobs/$VIT_DIST_JOB_ID key value
  local -A status=([state]='' [by]='' [step]='' [reason]='' [rank]='' [host]='')
  if [[ $logs/status -nt $logs/began ]]; then  # of this start of this job
    while IFS='=' read -r key value; do status[$key]=$value; done <"$logs/status"
  fi
  local state=${status[state]}
  if ((code == 0)) || [[ $state == complete ]]; then
    say 'complete'
    exit 0
  elif [[ $state == preempted && (-n $warned || ${status[by]} == --max_time*) ]]; then
    requeue "after step ${status[step]}"
  elif [[ -n $warned && $state != @(failed|preempted|complete) ]]; then
    requeue 'before anything was to be saved'
  elif [[ $state == failed ]]; then
    say "failed: ${status[reason]}"
    say "${status[rank]:+rank ${status[rank]} on }${status[host]} was first to say so; more in $run/failure.json"
  elif [[ $state == preempted ]]; then
    say "stopped by ${status[by]} after step ${status[step]}; the same command goes on"
  else
    say "failed with exit code $code before there was anything to record; the line that begins with error: says why"
  fi
}

requeue() {  # requeue WHEN: once; the same job, with the same run folder, when Slurm has machines again
  local log stops=''
  trap '' USR1
  trap - TERM
  log=$(readlink -f "/proc/$$/fd/1")
  if [[ $1 == before* && -f $log ]]; then  # what the log says of the last three stops
    stops=$(grep -o "job $VIT_DIST_JOB_ID: stopped [a-z]*" "$log" | tail -n 3 | grep -c before) || true
  fi
  if ((${stops:-0} == 3)); then
    say "stopped $1 for the fourth time in a row; give the job more time"
    exit 75
  fi
  say "stopped $1; back into the queue"
  scontrol requeue "$SLURM_JOB_ID" 2>/dev/null || { say 'which this job may not; submit the same command again to go on'; exit 75; }
  sleep 600 &  # Slurm ends this shell; a shell that ended by itself might be taken for the end of the job
  wait $!
  exit 75
}
