#!/bin/bash
# Run a Slurm cluster on this machine, with its own configuration, keys and ports: one controller and N nodes n1, n2, ...
# Jobs of its partition `urgent` preempt those of `main`, which have a minute to stop.
#
#   slurm_cluster.sh up DIR [NODES]       start it, with state and logs in DIR; then export SLURM_CONF=DIR/slurm.conf
#   slurm_cluster.sh fail DIR NODE        kill a node, its slurmd and all processes under it, as in a power loss
#   slurm_cluster.sh mend DIR NODE        start its slurmd again and wait until the node is idle
#   slurm_cluster.sh down DIR             stop the cluster
#
# It needs root and Debian's packages slurm-wlm and munge. It neither uses nor changes a Slurm of the machine.
set -euo pipefail

verb=$1 dir=$(mkdir -p "$2" && cd "$2" && pwd)
export SLURM_CONF=$dir/slurm.conf
PATH=$PATH:/usr/sbin

# Ends the processes whose ids are in the given files.
end() {
  local file
  for file in "$@"; do
    if [[ -s $file ]]; then kill "$(cat "$file")" 2>/dev/null || true; fi
  done
}

case $verb in
up)
  nodes=${3:-2} host=$(hostname) cpus=$(nproc) memory=$(awk '/MemTotal/{print int($2 / 1024 / 2)}' /proc/meminfo)
  port=$((20000 + RANDOM % 10000))
  mkdir -p "$dir/state"
  chmod 755 "$dir"
  head -c 1024 /dev/urandom >"$dir/munge.key"
  chmod 600 "$dir/munge.key"
  {
    cat <<EOF
ClusterName=longring
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmctldPort=$port
AuthInfo=socket=$dir/munge.socket
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmdSpoolDir=$dir/spool.%n
StateSaveLocation=$dir/state
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.%n.log
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
JobRequeue=1
KillWait=5
SlurmdTimeout=10
ReturnToService=2
SchedulerParameters=sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
EOF
    for i in $(seq "$nodes"); do
      echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + i)) CPUs=$cpus RealMemory=$memory"
    done
    echo "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60"
    echo "PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF"
  } >"$SLURM_CONF"
  # --force: directories such as /tmp are writable by all, which munge would refuse.
  munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
    --log-file="$dir/munged.log" --seed-file="$dir/munged.seed" 2>/dev/null
  slurmctld -f "$SLURM_CONF"
  for i in $(seq "$nodes"); do slurmd -f "$SLURM_CONF" -N "n$i"; done
  for _ in $(seq 60); do
    if [[ $(sinfo -h -t idle -o %D) == "$nodes" ]]; then exit 0; fi
    sleep 0.5
  done
  sinfo
  exit 1
  ;;
fail)
  kill -KILL "$(cat "$dir/slurmd.$3.pid")"
  rm "$dir/slurmd.$3.pid"
  # Processes of the node have its name and this cluster's configuration in their environment; their parent is slurmstepd.
  for environ in /proc/[0-9]*/environ; do
    process=${environ#/proc/} process=${process%/environ}
    if grep -qsz "^SLURMD_NODENAME=$3$" "$environ" && grep -qsz "^SLURM_CONF=$SLURM_CONF$" "$environ"; then
      parent=$(awk '/^PPid/{print $2}' "/proc/$process/status" 2>/dev/null || echo 0)
      if [[ $(cat "/proc/$parent/comm" 2>/dev/null) == slurmstepd ]]; then kill -KILL "$parent" || true; fi
      kill -KILL "$process" 2>/dev/null || true
    fi
  done
  ;;
mend)
  slurmd -f "$SLURM_CONF" -N "$3"
  for _ in $(seq 60); do
    if [[ $(sinfo -h -n "$3" -p main -o %t) == idle ]]; then exit 0; fi
    sleep 0.5
  done
  sinfo
  exit 1
  ;;
down)
  end "$dir/slurmctld.pid"
  for file in "$dir"/slurmd.*.pid; do
    node=${file##*/slurmd.} # slurmd waits for its jobs when it is asked to end
    if [[ -s $file ]]; then "$0" fail "$dir" "${node%.pid}"; fi
  done
  sleep 1
  end "$dir/munged.pid"
  ;;
*)
  echo "usage: $0 up DIR [NODES] | fail DIR NODE | mend DIR NODE | down DIR" >&2
  exit 2
  ;;
esac
