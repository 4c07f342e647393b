#!/usr/bin/env bash
# Starts training on hosts that ssh reaches: launch/accelerate.sh on each of them, from the directory that you are in.
#
#   launch/ssh.sh HOSTS STRATEGY [train|doctor] [RECIPE] [--flag value ...]
#
#   launch/ssh.sh node1,node2 ddp --data /shared/photos             all GPUs of two hosts; the first has rank 0
#   launch/ssh.sh hosts.txt fsdp2 configs/recipes/cifar10.yaml      a host a line; user@host, # comments
#   launch/ssh.sh node1,node2 ddp doctor                            are they ready?
#   SSH_CONFIG=cluster.conf launch/ssh.sh a,b ddp                   hosts of another ssh configuration (ssh -F)
#   DRY_RUN=1 launch/ssh.sh node1,node2 ddp                         shows the command of each host and starts nothing
#
# Every host must have this directory, the code and the interpreter at the same path, and let you in without a question.
# All hosts are checked before training starts on any. Ctrl-C, SIGTERM and SIGUSR1 reach all of them; when one fails, the
# others are ended, after they have saved. Exit code: 0, 75 if it was asked to stop, or that of the host that failed first.
# What of the environment is passed on: docs/launchers.md.
set -euo pipefail

launch=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }
note() { printf 'note: %s\n' "$*" >&2; }
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }
case ${1:-} in
  -h | --help | help) usage; exit 0 ;;
  '') usage >&2; exit 2 ;;
esac
hosts_from=$1
shift
for argument; do  # neither the strategies nor the options of the training need a host
  case $argument in -h | --help) exec "$launch/accelerate.sh" "$@" ;; esac
done
(($#)) || fail "no strategy; launch/ssh.sh HOSTS STRATEGY [train|doctor] [RECIPE]; see launch/accelerate.sh --help"

if [[ -f $hosts_from ]]; then
  read -rd '' -a hosts < <(sed 's/#.*//' -- "$hosts_from") || true  # ends at the end of the file, with status 1
elif [[ $hosts_from == */* ]]; then
  fail "there is no file $hosts_from; give hosts as node1,node2, or a file with one a line"
else
  IFS=$', \t\n' read -rd '' -a hosts <<<"$hosts_from" || true  # so "$(cat hosts.txt)" does as well
fi
((${#hosts[@]})) || fail "$hosts_from names no host"
declare -A seen=()
for host in "${hosts[@]}"; do
  [[ $host =~ ^[[:alnum:]_][[:alnum:]_.@:%-]*$ ]] || fail "'$host' in $hosts_from is no host; give [user@]host, nothing else"
  [[ -z ${seen[${host#*@}]:-} ]] || fail "${host#*@} is listed twice in $hosts_from; a host is one node, with all its processes"
  seen[${host#*@}]=1
done

ssh=(ssh)
if [[ -n ${SSH_CONFIG:-} ]]; then
  [[ -f $SSH_CONFIG ]] || fail "there is no file SSH_CONFIG=$SSH_CONFIG"
  ssh+=(-F "$SSH_CONFIG")
fi
# Nothing is asked for, and a host that has fallen silent is given up after a minute.
ssh+=(-T -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4)

if ((${#hosts[@]} > 1)) && [[ -z ${MASTER_ADDR:-} ]]; then  # an alias of the ssh configuration means nothing to the others
  MASTER_ADDR=$("${ssh[@]}" -G "${hosts[0]}" | sed -n 's/^hostname //p')
fi
if [[ -z ${PYTHON:-} && -n ${VIRTUAL_ENV:-} ]]; then PYTHON=$VIRTUAL_ENV/bin/python; fi
topology=(MASTER_ADDR MASTER_PORT NPROC_PER_NODE PYTHON CUDA_VISIBLE_DEVICES HSDP_REPLICAS OMP_NUM_THREADS VIT_DIST_BUNDLE
  PET_SHUTDOWN_TIMEOUT "${!NCCL_@}" "${!GLOO_@}")
services=("${!WANDB_@}" "${!HF_@}")  # with keys and tokens among them: never shown

settings() {  # settings RANK NAME...: those variables that are set, as bash reads them
  local name
  printf 'NNODES=%s\nNODE_RANK=%s\n' "${#hosts[@]}" "$1"
  for name in "${@:2}"; do
    if [[ -v $name ]]; then printf '%s=%q\n' "$name" "${!name}"; fi
  done
}

words() { local line; line=$(printf '%q ' "$@"); printf '%s' "${line% }"; }

program() {  # program RANK COMMAND...: for `bash -s` on the host, by its standard input, so that no `ps` shows a secret
  local missing="error: there is no %s on this host; it needs the same directory and checkout as $HOSTNAME\\n"
  printf 'cd -- %q 2>/dev/null || { printf %q %q >&2; exit 2; }\n' "$PWD" "$missing" "directory $PWD"
  printf '[[ -x %q ]] || { printf %q %q >&2; exit 2; }\n' "$launch/ssh_host.sh" "$missing" "$launch/ssh_host.sh"
  settings "$1" "${topology[@]}" "${services[@]}" | sed 's/^/export /'
  printf 'exec %s\n' "$(words "${@:2}")"
}

case ${DRY_RUN:-0} in
  0 | no | false) ;;
  *)
    for rank in "${!hosts[@]}"; do
      mapfile -t env < <(settings "$rank" "${topology[@]}")
      printf '%s: cd %s && env %s %s\n' "${hosts[rank]}" "$(words "$PWD")" "${env[*]}" \
        "$(words "$launch/accelerate.sh" "$@")"
    done
    if ((${#services[@]})); then note "passed on besides, by ssh's standard input: ${services[*]}"; fi
    exit 0 ;;
esac

work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT

# First of all, on every host at once: does it answer, and would the launcher there start? Nothing is started yet.
check() {  # check RANK
  local code=0
  program "$1" env DRY_RUN=1 "$launch/accelerate.sh" "${arguments[@]}" |
    timeout 60 "${ssh[@]}" "${hosts[$1]}" 'bash -s' >/dev/null 2>"$work/$1.said" || code=$?
  printf '%s\n' "$code" >"$work/$1.checked"
}
arguments=("$@")
for rank in "${!hosts[@]}"; do check "$rank" & done
wait
ready=1
for rank in "${!hosts[@]}"; do
  host=${hosts[rank]}
  case $(<"$work/$rank.checked") in
    0) continue ;;
    124) printf 'error: %s did not answer within 60 seconds\n' "$host" >&2 ;;
    255) printf 'error: %s cannot be reached: %s\n' "$host" "$(tail -n 1 "$work/$rank.said")" >&2 ;;
    *) sed "s/^/$host: /" "$work/$rank.said" >&2 ;;
  esac
  ready=0
done
((ready)) || fail "nothing was started on any host"

run() {  # run RANK: one host to its end; its exit code into a file, its output with its name before each line
  trap '' HUP INT QUIT TERM USR1 USR2  # they are this script's to pass on, and the connection must outlive them
  local code=0
  {
    "${ssh[@]}" "${hosts[$1]}" 'bash -s' <"$work/$1.in" 2>&1 || code=$?
    printf '%s\n' "$code" >"$work/$1.code"
  } | if ((${#hosts[@]} > 1)); then sed -u "s/^/${hosts[$1]}: /"; else cat; fi
}

connections=()
tell() {  # tell SIGNAL: in processes of their own, since writing to a host that is gone is fatal
  local fd
  for fd in "${connections[@]}"; do (printf '%s\n' "$1" >&"$fd") 2>/dev/null || true; done
}
asked=''
# shellcheck disable=SC2317  # called by the traps
ask() { asked=${asked:-$1}; tell "$1"; }
for signal in HUP INT TERM USR1 USR2; do
  # shellcheck disable=SC2064  # this signal
  trap "ask $signal" "$signal"
done

# All are started before the first connection is opened: one that others hold too would not close with this script.
for rank in "${!hosts[@]}"; do
  mkfifo "$work/$rank.in"
  run "$rank" &
done
for rank in "${!hosts[@]}"; do
  exec {fd}>"$work/$rank.in"
  connections+=("$fd")
  (program "$rank" "$launch/ssh_host.sh" "$launch/accelerate.sh" "$@" >&"$fd") || true
done
if [[ -n $asked ]]; then tell "$asked"; fi  # meanwhile

first='' result=0
running=("${!hosts[@]}")
while ((${#running[@]})); do
  none=0
  wait -n || none=$(($? == 127))  # ends with a host, or with a signal
  for rank in "${running[@]}"; do
    if [[ -s $work/$rank.code ]]; then
      code=$(<"$work/$rank.code")
    elif ((none)); then
      code=255
    else
      continue
    fi
    unset "running[rank]"
    if ((code != 0)) && [[ -z $first ]]; then
      first=${hosts[rank]} result=$code
      tell TERM  # a host that was asked to stop before does not hear it
    fi
  done
done
wait  # for the last of the output

if [[ -z $first ]]; then exit 0; fi
if ((result == 255)); then
  printf 'error: the connection to %s was lost; its processes stop by themselves, after they have saved\n' "$first" >&2
elif [[ -n $asked ]]; then
  note "stopped by SIG$asked; status.json in the run folder says what was saved, and the same command goes on"
  exit 75
elif ((result != 2)); then  # whose last line is an error that says all
  printf 'error: %s failed first, with exit code %s; the others were ended\n' "$first" "$result" >&2
fi
exit "$result"
