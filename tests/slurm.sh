#!/usr/bin/env bash
# Run two notebooks on a real SLURM cluster of one node: install the packages of Debian, start the
# daemons, run each notebook as a job with one (fake) GPU, stop the daemons.
#
#   tests/slurm.sh
#
# Needs root, apt and a machine without a SLURM installation. If one of them is missing, the test
# prints `SLURM test skipped: …` and passes.
source "$(dirname "$0")/../workflow/environment.sh"
cd "$ROOT"
skip() { echo "SLURM test skipped: $*"; exit 0; }

MARK="# written by tests/slurm.sh"
RUN=$(mktemp -d)
trap 'rm -rf "$RUN"' EXIT
[ "$(id -u)" = 0 ] || skip "it installs packages, which needs root."
command -v apt-get >/dev/null || skip "this machine has no apt-get."
if [ -e /etc/slurm/slurm.conf ] && ! grep -q "$MARK" /etc/slurm/slurm.conf; then
  skip "this machine has its own SLURM installation."
fi
install_packages() {
  apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
    slurmctld slurmd slurm-client munge
}
command -v slurmctld >/dev/null || install_packages > "$RUN/apt.log" 2>&1 ||
  skip "the packages of Debian cannot be installed ($(tail -n 1 "$RUN/apt.log"))"
"$PYTHON" -m pip install -q -c constraints.txt -e '.[slurm]' > "$RUN/pip.log" 2>&1 ||
  skip "the SLURM plugin of Snakemake cannot be installed ($(tail -n 1 "$RUN/pip.log"))"

stop() {  # stop the daemons that this script has started, and no others
  local file pid
  for file in "$RUN"/slurmd.pid "$RUN"/slurmctld.pid /run/munge/munged.pid; do
    [ -s "$file" ] || continue
    pid=$(cat "$file")
    kill "$pid" 2>/dev/null || continue
    for _ in $(seq 40); do kill -0 "$pid" 2>/dev/null && sleep 0.25; done
  done
  rm -rf "$RUN" /etc/slurm/slurm.conf /etc/slurm/gres.conf
}
trap stop EXIT

mkdir -p "$RUN/state" "$RUN/spool" "$RUN/profile" /etc/slurm
# The path is fixed, because Snakemake's plugin ignores SLURM_CONF. RealMemory is not the real
# memory: the number only has to be large enough for the jobs.
cat > /etc/slurm/slurm.conf <<CONF
$MARK
ClusterName=kdlib
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
SlurmctldPidFile=$RUN/slurmctld.pid
SlurmdPidFile=$RUN/slurmd.pid
SlurmctldLogFile=$RUN/slurmctld.log
SlurmdLogFile=$RUN/slurmd.log
StateSaveLocation=$RUN/state
SlurmdSpoolDir=$RUN/spool
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
ReturnToService=2
EnforcePartLimits=ALL
MinJobAge=3600
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=localhost CPUs=2 RealMemory=64000 Gres=gpu:2 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
# SLURM needs a device file for each GPU; any device will do.
echo "NodeName=localhost Name=gpu File=/dev/null,/dev/zero" > /etc/slurm/gres.conf
# There is no accounting database, so the plugin must ask squeue for the state of a job. If it asks
# sacct, it waits forever.
cat > "$RUN/profile/config.yaml" <<YAML
slurm-status-command: squeue
slurm-init-seconds-before-status-checks: 20
YAML

start() {
  install -d -o munge -g munge -m 755 /run/munge &&
    su -s /bin/sh munge -c /usr/sbin/munged && slurmctld && slurmd || return
  for _ in $(seq 80); do
    [ "$(sinfo -h -o %T 2>/dev/null)" != idle ] || return 0
    sleep 0.25
  done
  return 1
}
start > "$RUN/start.log" 2>&1 ||
  skip "SLURM does not start here ($(tail -qn 1 "$RUN"/start.log "$RUN"/slurm*.log | tail -n 1))"

export KDLIB_HOME=$RUN/runs KDLIB_RESULTS=$RUN/results SNAKEMAKE_PROFILE=$RUN/profile
timeout 900 ./run_all.sh --executor slurm --only book/start_here,kr/figure2 ||
  { cat "$KDLIB_HOME/logs/snakemake.log" >&2; die "A job failed on SLURM: see the log above."; }
jobs=$(squeue --states=all --noheader --Format=state:12,tres-per-job:30)
printf 'Jobs and their requested resources:\n%s\n' "$jobs"
[ "$(grep -c COMPLETED <<< "$jobs")" -eq 3 ] || die "Expected three completed jobs."
[ "$(grep -c gpu <<< "$jobs")" -eq 2 ] || die "Expected two jobs that request a GPU."
for file in kr/figure2/figure.png scorecard.html; do
  [ -s "$KDLIB_RESULTS/smoke/$file" ] || die "$file was not written."
done
echo "SLURM test: 3 passed, 0 failed"
