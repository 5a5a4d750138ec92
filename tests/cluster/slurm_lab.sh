#!/usr/bin/env bash
# A private SLURM cluster on this machine, from nothing: munged, slurmctld and one slurmd per virtual node.
#   bash tests/cluster/slurm_lab.sh up FOLDER [PID]   then export SLURM_CONF=FOLDER/etc/slurm.conf; down when PID ends
#   bash tests/cluster/slurm_lab.sh down FOLDER       cancel its jobs, end its daemons, restore /etc/hosts
#   bash tests/cluster/slurm_lab.sh node FOLDER NAME  start the slurmd of a node (again)
# Exit code 77: this machine cannot have it.
# Needs root and Debian (installs slurm-wlm and munge where they are missing); no systemd, no cgroups. All its files
# are in FOLDER but one marked line per node in /etc/hosts. A process is only ended if its pid was recorded here and
# its command line still is that daemon's with this FOLDER.
#   SLURM_LAB_NODES=2 virtual nodes n1, n2, ...   SLURM_LAB_CPUS=16 CPUs of each, more than there are
#   SLURM_LAB_CRED=6 seconds that a credential lives: a requeued job waits as long (SLURM's default: 120). Shorter than
#   KillWait, so whoever takes a node away must wait for the job's other processes before giving it back: their srun
#   would signal the new step, which has the same name.
set -euo pipefail
action="${1:?up, down or node}" lab="$(realpath -m "${2:?folder}")"
nodes="${SLURM_LAB_NODES:-2}" cpus="${SLURM_LAB_CPUS:-16}" cred="${SLURM_LAB_CRED:-6}"
export SLURM_CONF="$lab/etc/slurm.conf"
mark="# slurm_lab $lab"

die() { echo "slurm_lab: error: $*" >&2; exit 1; }
lacks() { echo "slurm_lab: $*" >&2; exit 77; }  # this machine cannot have the cluster
pid_of() { cat "$lab/run/$1.pid" 2>/dev/null || true; }
mine() {  # name: whether the recorded process still is that daemon of this lab
    local pid; pid="$(pid_of "$1")"
    [ -n "$pid" ] && tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -qF -- "$lab"
}
start() {  # name, command...: in a session of its own, pid recorded
    local name="$1"; shift
    if mine "$name"; then return; fi
    setsid "$@" >>"$lab/log/$name.out" 2>&1 </dev/null &
    echo $! >"$lab/run/$name.pid"
}
stop() {  # name
    if mine "$1"; then
        kill "$(pid_of "$1")"
        for _ in {1..100}; do mine "$1" || break; sleep 0.1; done
        if mine "$1"; then kill -9 "$(pid_of "$1")"; fi
    fi
    rm -f "$lab/run/$1.pid"
}

install() {
    command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && return
    export DEBIAN_FRONTEND=noninteractive
    local packages=(apt-get install -y --no-install-recommends slurm-wlm munge)
    timeout 120 "${packages[@]}" >"$lab/log/apt.log" 2>&1 && return
    { timeout 60 apt-get update && timeout 120 "${packages[@]}"; } >>"$lab/log/apt.log" 2>&1 ||
        lacks "slurm-wlm and munge cannot be installed: $(tail -n 1 "$lab/log/apt.log")"
}

free_ports() {  # the first of a row of free ports
    local first port
    for ((first = 18000 + RANDOM % 1000; first < 19900; first += nodes + 1)); do
        for ((port = first; port <= first + nodes; port++)); do
            if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then continue 2; fi
        done
        echo "$first"; return
    done
    die "no $((nodes + 1)) free ports from 18000 to 19900"
}

configure() {
    local host port; host="$(hostname -s)" port="$(free_ports)"
    cat >"$SLURM_CONF" <<CONF
ClusterName=lab
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$lab/run/munge.sock,cred_expire=$cred
StateSaveLocation=$lab/state
SlurmdSpoolDir=$lab/spool/%n
SlurmctldPidFile=$lab/run/slurmctld.own
SlurmdPidFile=$lab/run/slurmd-%n.own
SlurmctldLogFile=$lab/log/slurmctld.log
SlurmdLogFile=$lab/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0
SlurmdParameters=config_overrides
JobRequeue=1
KillWait=8
MinJobAge=3600
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout=10
NodeName=n[1-$nodes] NodeAddr=127.0.0.1 NodeHostname=$host Port=$((port + 1))-$((port + nodes)) CPUs=$cpus RealMemory=4000 State=UNKNOWN
PartitionName=lab Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    (umask 077; head -c 128 /dev/urandom >"$lab/munge/munge.key")
}

node() { mkdir -p "$lab/spool/$1"; start "slurmd-$1" slurmd -D -N "$1" -f "$SLURM_CONF"; }

up() {
    local i
    mkdir -p "$lab"/{etc,log,run,munge,spool,state}
    chmod 755 "$lab" "$lab"/{etc,run}; chmod 700 "$lab"/{munge,state}
    install
    configure
    for ((i = 1; i <= nodes; i++)); do echo "127.0.0.1 n$i $mark" >>/etc/hosts; done
    start munged munged --foreground --key-file="$lab/munge/munge.key" --socket="$lab/run/munge.sock" --force \
        --pid-file="$lab/run/munged.own" --log-file="$lab/log/munged.log" --seed-file="$lab/munge/munge.seed"
    for _ in {1..100}; do munge -S "$lab/run/munge.sock" -n >/dev/null 2>&1 && break; sleep 0.1; done
    start slurmctld slurmctld -D -f "$SLURM_CONF"
    for ((i = 1; i <= nodes; i++)); do node "n$i"; done
    for _ in {1..300}; do
        if [ "$(sinfo -h -N -o %t 2>/dev/null | grep -c '^idle$')" = "$nodes" ]; then return; fi
        sleep 0.1
    done
    tail -n 5 "$lab"/log/* >&2
    die "the nodes did not come up"
}

down() {
    local i file
    [ -d "$lab/run" ] || return 0
    if mine slurmctld; then
        timeout 10 scancel --user=root || true
        for _ in {1..40}; do [ -n "$(timeout 5 squeue -h 2>/dev/null)" ] || break; sleep 0.5; done
    fi
    for file in "$lab"/run/slurmd-n*.pid; do [ ! -e "$file" ] || stop "$(basename "$file" .pid)"; done
    stop slurmctld; stop munged
    # Written in place: where /etc/hosts is a bind mount it cannot be replaced by another file.
    if grep -qF -- "$mark" /etc/hosts; then
        local left; left="$(grep -vF -- "$mark" /etc/hosts)"; printf '%s\n' "$left" >/etc/hosts
    fi
}

[ "$(id -u)" = 0 ] || lacks "needs root"
[ -e /etc/debian_version ] || lacks "needs Debian"
case "$action" in
    up)
        trap '[ "$?" = 0 ] || down' EXIT
        up
        if [ -n "${3:-}" ]; then setsid bash "$0" guard "$lab" "$3" >/dev/null 2>&1 </dev/null & fi ;;
    guard) while kill -0 "$3" 2>/dev/null && [ -e "$lab/run/slurmctld.pid" ]; do sleep 1; done; down ;;
    node) node "${3:?name of the node}" ;;
    down) down ;;
    *) die "unknown action $action" ;;
esac
