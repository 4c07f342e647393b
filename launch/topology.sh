# shellcheck shell=bash disable=SC2034  # the variables are read by the scripts that source this
# Which processes to start, and where. accelerate.sh and torchrun.sh source it. Nothing is known here of batch systems:
# one sets the same variables on every node and runs the same scripts.
#
#   NNODES          nodes of the job                              (1)
#   NODE_RANK       which of them this one is, counted from 0     (0; to be set if NNODES > 1)
#   NPROC_PER_NODE  processes on this node                        (visible GPUs)
#   MASTER_ADDR     name or address of the node of rank 0         (this one; to be set if NNODES > 1)
#   MASTER_PORT     a port that is free there                     (any; 29500 if NNODES > 1)
#   GPUS_PER_NODE   GPUs that were promised on this node          (not checked)
#   VIT_DIST_CPUS   CPU cores of this node that the job may use   (all that this process may use)

# shellcheck source=launch/python.sh
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/python.sh"

# The verb. Sourced without arguments, this file sees the script's own, and the shift is the script's.
MODULE=vit_dist.train
case ${1:-} in
  train) shift ;;
  doctor) MODULE=vit_dist.verbs.doctor; shift ;;
  plan) fail "plan starts nothing, so it needs no launcher: vit-dist plan ${*:2}" ;;
esac
for argument; do  # help needs no processes and no GPU
  case $argument in -h | --help)
    if [[ ${*: -1} == all ]]; then exec "$PYTHON" -m "$MODULE" --help all; fi
    exec "$PYTHON" -m "$MODULE" --help ;;
  esac
done

whole() {  # whole NAME FROM TO
  if ! [[ ${!1} =~ ^(0|[1-9][0-9]{0,5})$ ]] || ((${!1} < $2 || ${!1} > $3)); then
    fail "$1 is '${!1}' on $HOSTNAME; set it to a whole number from $2 to $3"
  fi
}

visible_gpus() {  # sets GPUS, and NO_GPU to the reason if there is none
  local listed='' present id ids
  GPUS=0 NO_GPU='nvidia-smi lists none'
  if ! command -v nvidia-smi >/dev/null; then
    NO_GPU='there is no nvidia-smi'
  elif ! listed=$(nvidia-smi -L 2>&1); then
    NO_GPU="nvidia-smi says: ${listed%%$'\n'*}" listed=''
  fi
  present=$(grep -c '^GPU ' <<<"$listed" || true)  # a count of 0 is exit status 1
  case ${CUDA_VISIBLE_DEVICES-all} in
    all) GPUS=$present; return ;;
    '' | -1 | NoDevFiles) NO_GPU="CUDA_VISIBLE_DEVICES='$CUDA_VISIBLE_DEVICES' hides all"; return ;;
  esac
  if ((present == 0)); then return; fi
  IFS=, read -ra ids <<<"${CUDA_VISIBLE_DEVICES// /}"
  for id in "${ids[@]}"; do  # CUDA itself would stop at an unknown one without a word
    if [[ $id =~ ^[0-9]{1,4}$ ]] && ((10#$id < present)); then continue; fi
    if [[ $id =~ ^(GPU|MIG)- ]] && grep -qF -- "$id" <<<"$listed"; then continue; fi
    fail "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES asks for GPU '$id', which nvidia-smi -L does not list" \
      "among the $present of $HOSTNAME; name GPUs that are there"
  done
  GPUS=${#ids[@]}
}

topology() {
  NNODES=${NNODES:-1}
  whole NNODES 1 99999
  if ((NNODES == 1)); then
    MASTER_ADDR=127.0.0.1  # whatever an earlier job has left there
  else
    [[ -n ${NODE_RANK:-} ]] || fail "NNODES is $NNODES, but NODE_RANK is not set on $HOSTNAME;" \
      "set it to 0 on the first node, 1 on the next, and so on"
    [[ -n ${MASTER_ADDR:-} ]] || fail "NNODES is $NNODES, but MASTER_ADDR is not set on $HOSTNAME;" \
      "set it on all nodes to the name or address of the node with NODE_RANK=0"
    MASTER_PORT=${MASTER_PORT:-29500}
    export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}  # names that cannot be looked up are warnings, and no matter
  fi
  NODE_RANK=${NODE_RANK:-0}
  whole NODE_RANK 0 99999
  ((NODE_RANK < NNODES)) || fail "NODE_RANK is $NODE_RANK, but NNODES is $NNODES on $HOSTNAME;" \
    "ranks are counted from 0, and NNODES must be the same on all nodes"
  if [[ -n ${MASTER_PORT:-} ]]; then whole MASTER_PORT 1 65535; fi

  visible_gpus
  GPUS_PER_NODE=${GPUS_PER_NODE:-0}
  whole GPUS_PER_NODE 0 9999
  if ((GPUS_PER_NODE > GPUS)); then
    fail "this job was given $GPUS_PER_NODE GPUs on $HOSTNAME, but $GPUS can be used (${NO_GPU:-nvidia-smi lists no more});" \
      "leave this node out, and tell those who run it"
  fi
  if [[ -z ${NPROC_PER_NODE:-} ]]; then
    ((GPUS > 0)) || fail "no GPU on $HOSTNAME ($NO_GPU); set NPROC_PER_NODE=N to start N processes on CPUs"
    NPROC_PER_NODE=$GPUS
  fi
  whole NPROC_PER_NODE 1 9999
  ((GPUS == 0 || NPROC_PER_NODE <= GPUS)) || fail "NPROC_PER_NODE is $NPROC_PER_NODE, but $HOSTNAME has $GPUS visible" \
    "GPUs; ask for no more, or set CUDA_VISIBLE_DEVICES='' to start the processes on CPUs"
  PROCESSES=$((NNODES * NPROC_PER_NODE))
  export VIT_DIST_PROCESSES=$PROCESSES  # what the processes find is compared with it
  export VIT_DIST_NODE_RANK=$NODE_RANK  # for vit_dist.launcher: node 0 leaves last
  if ((NODE_RANK > 0)) && [[ $MASTER_ADDR =~ ^(localhost|127\.) ]]; then
    note "MASTER_ADDR=$MASTER_ADDR is $HOSTNAME itself; if node 0 is another machine, this one will wait in vain"
  fi
}

require() {  # require PACKAGE...: told now, not after the launcher's start by every process, or by a long wait
  local port='' interface
  if ((PROCESSES > 1 && NODE_RANK == 0)); then port=${MASTER_PORT:-}; fi  # the node that will listen there
  interface=$("$PYTHON" - "$NNODES" "$MASTER_ADDR" "$port" "$@" <<'END'
import fcntl, importlib.util, ipaddress, socket, struct, sys

nodes, address, port, *packages = sys.argv[1:]
here = socket.gethostname()
for package in packages:
    if importlib.util.find_spec(package) is None:
        cure = "pip install deepspeed" if package == "deepspeed" else "activate its environment, or set PYTHON"
        sys.exit(f"error: {package} is not installed for {sys.executable}; {cure}")
try:
    socket.getaddrinfo(address, None)
except OSError as error:
    sys.exit(f"error: MASTER_ADDR={address} is not known on {here} ({error.strerror}); set it to the node's address")
if port:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a run that has just ended is no obstacle
        try:
            listener.bind(("", int(port)))
        except OSError as error:
            sys.exit(f"error: MASTER_PORT={port} cannot be used on {here} ({error.strerror}); set another one")


def own_address(other):  # the address that packets to `other` would leave from; none is sent
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))
        return probe.getsockname()[0]


def interface_address(name):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        asked = struct.pack("256s", name.encode()[:15])
        return socket.inet_ntoa(fcntl.ioctl(probe, 0x8915, asked)[20:24])  # SIOCGIFADDR


def is_loopback(host):
    try:
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    except OSError:
        return True


# Gloo tells the others the address that this host's name has here, which some installers make 127.0.1.1.
if int(nodes) > 1 and is_loopback(here) and not address.startswith("127.") and address != "localhost":
    interfaces = {}
    for _, name in socket.if_nameindex():
        try:
            interfaces[interface_address(name)] = name
        except OSError:
            pass  # it has none
    outside = {own: name for own, name in interfaces.items() if not ipaddress.ip_address(own).is_loopback}
    own = next(iter(outside), None)
    for other in (address, "192.0.2.1"):  # the master; where the default route leads to
        try:
            if len(outside) > 1 and own_address(other) in outside:
                own = own_address(other)
                break
        except OSError:
            pass
    if own:
        print(outside[own])
END
  ) || exit 2
  if [[ -n $interface && -z ${GLOO_SOCKET_IFNAME:-} ]]; then export GLOO_SOCKET_IFNAME=$interface; fi
}

# Both launchers read torchrun's options from these: signals to pass on to the processes, and the seconds that those have
# to commit a checkpoint before they are killed. vit_dist/cli.py has the same.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2}
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-110}
whole PET_SHUTDOWN_TIMEOUT 0 86400

start() {  # start COMMAND...: in place of this shell, so that signals reach it; or show it
  local line cores command=(env)
  if ((PROCESSES == 1)); then  # what an outer launcher has left would make this process wait for others
    command+=(-u RANK -u WORLD_SIZE -u LOCAL_RANK -u MASTER_ADDR -u MASTER_PORT)
  fi
  # Both launchers set 1 thread a process unless told otherwise, which leaves most cores of a CPU machine idle.
  cores=$(nproc)
  if [[ -n ${VIT_DIST_CPUS:-} ]]; then whole VIT_DIST_CPUS 1 99999; fi
  if ((${VIT_DIST_CPUS:-$cores} < cores)); then cores=$VIT_DIST_CPUS; fi
  cores=$((cores / NPROC_PER_NODE))
  command+=("OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 0 ? cores : 1))}" "$@")
  case ${DRY_RUN:-0} in
    0 | no | false) exec "${command[@]}" ;;
    *) line=$(printf '%q ' "${command[@]}"); printf '%s\n' "${line% }"; exit 0 ;;
  esac
}
