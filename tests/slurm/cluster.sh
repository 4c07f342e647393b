#!/usr/bin/env bash
# A real Slurm cluster on one machine, for tests: munged, slurmctld, and compute nodes that are Linux namespaces.
#
#   apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2
#   cluster.sh start DIR              nodes n1 and n2, and n3 that has GPUs; export SLURM_CONF=DIR/etc/slurm.conf
#   cluster.sh stop DIR
#   cluster.sh kill-node DIR NODE     a power cut;  start-node DIR NODE: power on again
#   cluster.sh exec DIR NODE COMMAND [ARG...]
#
# A node has its own host name, address on a bridge, processes, /etc/hosts, /tmp and /dev/shm, and no route to anywhere
# else, so that what confuses nodes on a real cluster (MASTER_ADDR=localhost, files in /tmp) does it here. The login node
# and slurmctld are the machine itself. All but /tmp and /dev/shm is seen by all nodes, and so are DIR and $SHARE.
# Needs root. Seen with Slurm 22.05.8 (Debian 12).
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

command=${1:-} DIR=$(readlink -m -- "${2:-}")
[[ -n $command && -n ${2:-} ]] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
shift 2
export SLURM_CONF=$DIR/etc/slurm.conf

SELF=$(readlink -f -- "${BASH_SOURCE[0]}")
NET=${CLUSTER_NET:-10.213.78}          # the bridge's /24: .1 is the login node, .11 is n1
BRIDGE=${CLUSTER_BRIDGE:-vitslurm0}    # at most 9 characters
SHARE=${SHARE:-}                       # a:b:c, folders below /tmp that all nodes see
DEBIAN_HOSTS=${DEBIAN_HOSTS:-}         # nodes (n1,n2) whose own name is 127.0.1.1, as Debian's installer leaves it
CPUS=16 MEMORY=64000                   # what a node claims to have
KILL_WAIT=${KILL_WAIT:-5}              # seconds between SIGTERM and SIGKILL
GRACE=${GRACE:-20}                     # seconds between the signal of a preemption and its kill

die() { printf 'cluster.sh: %s\n' "$*" >&2; exit 1; }
nodes() { cat "$DIR/etc/nodes"; }
address() { printf '%s.%d' "$NET" $((10 + ${1#n})); }

# --- processes, known by their pid and the time of their start: a recycled pid is never mistaken for ours.
born() {  # fails for no such process, and for a zombie, which is dead for our purposes
  local stat fields
  { stat=$(<"/proc/$1/stat"); } 2>/dev/null || return 1
  read -ra fields <<<"${stat##*) }"
  [[ ${fields[0]} != [ZX] ]] || return 1
  printf '%s\n' "${fields[19]}"
}
remember() { printf '%s %s\n' "$2" "$(born "$2")" >"$DIR/run/$1.pid"; }
pid_of() {
  local pid start
  [[ -s $DIR/run/$1.pid ]] || return 1
  read -r pid start <"$DIR/run/$1.pid"
  [[ $(born "$pid") == "$start" ]] || return 1
  printf '%s\n' "$pid"
}
stop_process() {  # stop_process NAME SIGNAL: then SIGKILL after 5 s
  local signal pid n
  for signal in "$2" KILL; do
    pid=$(pid_of "$1") || break
    kill -s "$signal" "$pid" 2>/dev/null || true
    for ((n = 0; n < 100; n++)); do pid_of "$1" >/dev/null || break; sleep 0.05; done
  done
  rm -f "$DIR/run/$1.pid"
}
until_true() {  # until_true SECONDS COMMAND...
  local n tries=$(($1 * 20))
  for ((n = 0; n < tries; n++)); do "${@:2}" && return 0; sleep 0.05; done
  return 1
}

configure() {
  local n hardware host
  host=$(hostname -s)
  mkdir -p "$DIR"/{etc,run,log,state,spool,nodes,dev}
  chmod 755 "$DIR" "$DIR/run"  # munge insists
  printf '%s\n' n1 n2 n3 >"$DIR/etc/nodes"
  (umask 077; head -c 128 /dev/urandom >"$DIR/etc/munge.key")
  for n in 0 1; do ln -sfn /dev/null "$DIR/dev/gpu$n"; done  # n3's GPUs; Slurm insists on character devices
  echo "NodeName=n3 Name=gpu File=$DIR/dev/gpu[0-1]" >"$DIR/etc/gres.conf"
  hardware="CPUs=$CPUS Boards=1 SocketsPerBoard=1 CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=$MEMORY State=UNKNOWN"
  # cred_expire is also the time that a requeued job waits (120 s by default; less than 5 is refused). MinJobAge: there
  # is no sacct here, finished jobs stay in `scontrol show job`. A node may claim what this machine does not have. Jobs
  # of partition cpu are requeued when one of partition urgent needs their nodes; they get their --signal first.
  cat >"$SLURM_CONF" <<EOF
ClusterName=local
SlurmctldHost=$host($NET.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=16917
SlurmdPort=16918
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$DIR/run/munge.socket,cred_expire=5
SlurmctldPidFile=$DIR/run/slurmctld.slurmpid
SlurmdPidFile=$DIR/run/slurmd-%n.slurmpid
SlurmdSpoolDir=$DIR/spool/%n
StateSaveLocation=$DIR/state
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobcomp.txt
MinJobAge=86400
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_min_interval=0,sched_interval=1
KillWait=$KILL_WAIT
SlurmdTimeout=10
SlurmctldTimeout=30
MessageTimeout=10
TCPTimeout=2
BatchStartTimeout=10
CompleteWait=0
ReturnToService=2
JobRequeue=1
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=n1 NodeAddr=$(address n1) $hardware
NodeName=n2 NodeAddr=$(address n2) $hardware
NodeName=n3 NodeAddr=$(address n3) $hardware Gres=gpu:2
PartitionName=cpu Nodes=n[1-2] Default=YES DefaultTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=$GRACE
PartitionName=urgent Nodes=n[1-2] DefaultTime=60 State=UP PriorityTier=100 PreemptMode=OFF
PartitionName=gpu Nodes=n3 DefaultTime=60 State=UP
EOF
  for n in $(nodes); do
    {
      echo '127.0.0.1 localhost'
      [[ ,$DEBIAN_HOSTS, != *",$n,"* ]] || echo "127.0.1.1 $n"
      echo "$NET.1 $host"
      for other in $(nodes); do echo "$(address "$other") $other"; done
    } >"$DIR/etc/hosts.$n"
  done
}

node_main() {  # node_main NODE: as process 1 of its namespaces
  local tmp=$DIR/nodes/$1/tmp peer=${BRIDGE}p${1#n} path slurmd
  hostname "$1"
  ip link set lo up
  until ip link show dev "$peer" >/dev/null 2>&1; do sleep 0.02; done
  ip link set "$peer" name eth0
  ip addr add "$(address "$1")/24" dev eth0
  ip link set eth0 up
  mount --bind "$DIR/etc/hosts.$1" /etc/hosts
  mount -t tmpfs -o mode=1777 tmpfs /dev/shm
  mkdir -p "$tmp"
  chmod 1777 "$tmp"
  local shared=()
  IFS=: read -ra shared <<<"$DIR:$SHARE"
  for path in "${shared[@]}"; do
    [[ $path == /tmp/* ]] || continue
    mkdir -p "$tmp/${path#/tmp/}"
    mount --rbind "$path" "$tmp/${path#/tmp/}"
  done
  mount --rbind "$tmp" /tmp
  # Nothing of the shell that started the cluster may leak into jobs.
  env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 HOME=/root \
    SLURM_CONF="$SLURM_CONF" slurmd -D -f "$SLURM_CONF" -N "$1" &
  slurmd=$!
  trap 'kill "$slurmd" 2>/dev/null; wait "$slurmd"; exit 0' TERM
  while :; do sleep 3600 & wait $! || true; done  # reaps what slurmd leaves; with process 1 the whole node goes
}

node_up() {
  timeout 2 bash -c "exec 3<>/dev/tcp/$(address "$1")/16918" 2>/dev/null &&
    [[ $(sinfo -h -n "$1" -o %T 2>/dev/null | head -n 1) =~ ^(idle|mixed|allocated)$ ]]
}

start_node() {
  local number=${1#n} unshare pid=''
  pid_of "$1" >/dev/null && return 0
  mkdir -p "$DIR/spool/$1" "$DIR/nodes/$1"
  ip link del "${BRIDGE}v$number" 2>/dev/null || true
  rm -rf "${DIR:?}/nodes/$1/tmp"  # a node boots with an empty /tmp
  setsid unshare --net --uts --ipc --mount --pid --fork --kill-child --mount-proc \
    "$BASH" "$SELF" node "$DIR" "$1" </dev/null >>"$DIR/log/$1.out" 2>&1 9>&- &
  unshare=$!
  child() {  # no newline there, so read says 1
    read -r pid _ < <(cat "/proc/$unshare/task/$unshare/children" 2>/dev/null) || true
    [[ -n $pid ]]
  }
  until_true 5 child || die "no namespaces for $1: $(tail -n 3 "$DIR/log/$1.out")"
  remember "$1" "$pid"
  # A fixed MAC, as a machine has: with a new one the others talk to the old one until their ARP caches time out.
  ip link add "${BRIDGE}v$number" type veth peer name "${BRIDGE}p$number" address "02:76:69:74:00:0$number"
  ip link set "${BRIDGE}p$number" netns "$pid"
  ip link set "${BRIDGE}v$number" master "$BRIDGE" up
}

stop_node() {  # stop_node NODE SIGNAL
  # A power cut says no goodbye: with the link up the kernel would close the connections, and the peers would notice.
  if [[ $2 == KILL ]]; then ip link set "${BRIDGE}v${1#n}" down 2>/dev/null || true; fi
  stop_process "$1" "$2"
  ip link del "${BRIDGE}v${1#n}" 2>/dev/null || true
}

stop_all() {
  local n
  if [[ -s $DIR/etc/nodes ]]; then
    for n in $(nodes); do stop_node "$n" TERM & done
    wait
  fi
  stop_process slurmctld TERM
  stop_process munged TERM
  ip link del "$BRIDGE" 2>/dev/null || true
}

case $command in
  start)
    configure
    ! ip link show dev "$BRIDGE" >/dev/null 2>&1 || die "there is an interface $BRIDGE: does another cluster run?"
    trap 'stop_all' ERR
    ip link add "$BRIDGE" type bridge
    ip addr add "$NET.1/24" dev "$BRIDGE"
    ip link set "$BRIDGE" up
    setsid munged --foreground --num-threads=4 --key-file="$DIR/etc/munge.key" --socket="$DIR/run/munge.socket" \
      --pid-file="$DIR/run/munged.mungepid" --log-file="$DIR/log/munged.log" --seed-file="$DIR/run/munge.seed" \
      </dev/null >"$DIR/log/munged.out" 2>&1 &
    remember munged $!
    munge_answers() { munge -n --socket="$DIR/run/munge.socket" >/dev/null 2>&1; }
    until_true 10 munge_answers || die "munged does not answer: $(cat "$DIR/log/munged.out")"
    setsid env -i PATH="$PATH" LANG=C.UTF-8 SLURM_CONF="$SLURM_CONF" slurmctld -D -f "$SLURM_CONF" \
      </dev/null >"$DIR/log/slurmctld.out" 2>&1 &
    remember slurmctld $!
    controller_answers() { scontrol ping 2>/dev/null | grep -q 'is UP'; }
    until_true 10 controller_answers || die "slurmctld does not answer: $(tail -n 5 "$DIR/log/slurmctld.out")"
    for node in $(nodes); do start_node "$node"; done
    for node in $(nodes); do until_true 30 node_up "$node" || die "$node does not come up, see $DIR/log"; done
    ;;
  stop) stop_all ;;
  kill-node) stop_node "$1" KILL ;;
  start-node)
    start_node "$1"
    until_true 30 node_up "$1" || die "$1 does not come up, see $DIR/log" ;;
  exec)
    pid=$(pid_of "$1") || die "$1 is not running"
    exec nsenter --target "$pid" --net --uts --ipc --mount --pid -- "${@:2}" ;;
  node) node_main "$1" ;;
  *) die "unknown command $command" ;;
esac
