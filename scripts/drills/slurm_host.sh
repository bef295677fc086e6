#!/bin/bash
# Run SLURM on this one host, for scripts/drills/slurm.py: two GPUs that do not exist, a partition that preempts another, no accounting.
#
#     apt-get install slurm-wlm munge
#     scripts/drills/slurm_host.sh start FOLDER; export SLURM_CONF=FOLDER/slurm.conf
#     scripts/drills/slurm_host.sh stop FOLDER
#
# Run it as root, in a container too: it needs neither cgroups nor systemd. Configuration, state and logs lie in FOLDER. What jobs
# of partition `urgent` need, it takes from those of `low`: these get SIGCONT and SIGTERM, are killed after 30 s and requeued.
set -euo pipefail
action=${1:-} folder=$(realpath -m "${2:-}")
[[ $action =~ ^(start|stop)$ && -n ${2:-} ]] || { sed -n 2,9p "$0" >&2; exit 2; }

if [[ $action == stop ]]; then
    for daemon in slurmd slurmctld munged; do
        [[ -e $folder/$daemon.pid ]] && kill "$(cat "$folder/$daemon.pid")" || true
    done
    exit
fi

host=$(hostname -s) cpus=$(nproc) memory=$(($(free -m | awk '/^Mem:/ {print $2}') * 9 / 10))
mkdir -p "$folder"/{state,spool}
for gpu in 0 1; do
    [[ -e $folder/gpu$gpu ]] || mknod "$folder/gpu$gpu" c 1 3  # as /dev/null
done
chmod 755 "$folder"

cat > "$folder/slurm.conf" <<CONF
ClusterName=drill
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=30
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$memory Gres=gpu:2 State=UNKNOWN
PartitionName=low Nodes=$host Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=$host MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
CONF
echo "NodeName=$host Name=gpu File=$folder/gpu[0-1]" > "$folder/gres.conf"
printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' > "$folder/cgroup.conf"

head -c 128 /dev/urandom > "$folder/munge.key"
chmod 600 "$folder/munge.key"
munged --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"
export SLURM_CONF=$folder/slurm.conf
slurmctld -f "$SLURM_CONF"
slurmd -f "$SLURM_CONF"
for _ in $(seq 60); do
    [[ $(sinfo --noheader --partition=low --format=%t 2>/dev/null) == idle ]] && exec sinfo
    sleep 1
done
sinfo >&2
tail -n 20 "$folder"/slurm*.log >&2
exit 1
