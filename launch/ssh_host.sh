#!/usr/bin/env bash
# What ssh.sh runs on each host: a command, until it ends, is asked to stop, or has lost the connection.
#
#   launch/ssh_host.sh COMMAND ...
#
# Standard input is the connection. A line on it is a signal to pass on; its end says that ssh.sh is gone, which counts as
# SIGTERM. Nothing of the command is left afterwards, or longer than the grace time in which it may commit a checkpoint.
set -euo pipefail
set -m  # the command in a process group of its own: whatever is sent to this script's group is not meant for it

PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-110}
[[ $PET_SHUTDOWN_TIMEOUT =~ ^(0|[1-9][0-9]{0,4})$ ]] || {
  printf "error: PET_SHUTDOWN_TIMEOUT is '%s'; set it to a whole number of seconds\n" "$PET_SHUTDOWN_TIMEOUT" >&2
  exit 2
}
grace=$((PET_SHUTDOWN_TIMEOUT + 10))  # seconds; the launchers themselves kill after the first
mark=VIT_DIST_SSH=$HOSTNAME.$$.$RANDOM  # found in /proc: torchrun's workers have sessions of their own, and lose parents

marked() { grep -lszxF -- "$mark" /proc/[0-9]*/environ | cut -d/ -f3 || true; }

end() {  # end SIGNAL PID...: what is there of the command after the grace time is killed
  local second left
  kill -s "$1" -- "${@:2}" 2>/dev/null || true
  for ((second = 0; second < grace; second++)); do
    [[ -n $(marked) ]] || return 0
    sleep 1
  done
  mapfile -t left < <(marked)
  kill -s KILL -- "${left[@]}" 2>/dev/null || true
}

listen() {  # one line is enough: a second signal would have torchrun leave its workers
  local signal
  if ! read -r signal || ! [[ $signal =~ ^(HUP|INT|TERM|USR1|USR2)$ ]]; then signal=TERM; fi
  end "$signal" "$command"
}

# Output goes on to be read when nobody is there any more, or the command would fail before it has saved.
exec > >(trap '' HUP INT TERM USR1 USR2; cat || exec cat >/dev/null) 2>&1
env "$mark" "$@" </dev/null &
command=$!
for signal in HUP INT TERM USR1 USR2; do
  # shellcheck disable=SC2064  # this signal
  trap "kill -s $signal $command 2>/dev/null || true" "$signal"
done
listen <&0 >/dev/null 2>&1 &
listener=$!
disown "$listener"

while true; do  # a trapped signal ends `wait` before the command has ended
  code=0
  wait "$command" || code=$?
  kill -0 "$command" 2>/dev/null || break
done
kill -s KILL -- "-$listener" 2>/dev/null || true
mapfile -t left < <(marked)
if ((${#left[@]})); then end TERM "${left[@]}"; fi  # a launcher that was killed leaves its workers
exit "$code"
