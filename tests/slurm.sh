#!/usr/bin/env bash
# The graph on a real SLURM of one node: install Debian's packages, start the daemons, run notebooks
# as jobs of one (pretended) GPU each, stop the daemons.
#
#   tests/slurm.sh
#
# Needs root, apt and a machine without a SLURM of its own. Where one is missing it says so and
# passes: `SLURM test skipped: …`.
source "$(dirname "$0")/../workflow/environment.sh"
cd "$ROOT"
skip() { echo "SLURM test skipped: $*"; exit 0; }

MARK="# written by tests/slurm.sh"
RUN=$(mktemp -d)
trap 'rm -rf "$RUN"' EXIT
[ "$(id -u)" = 0 ] || skip "it installs packages, and so needs root."
command -v apt-get >/dev/null || skip "there is no apt-get here."
if [ -e /etc/slurm/slurm.conf ] && ! grep -q "$MARK" /etc/slurm/slurm.conf; then
  skip "this machine has a SLURM of its own."
fi
install_packages() {
  apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
    slurmctld slurmd slurm-client munge
}
command -v slurmctld >/dev/null || install_packages > "$RUN/apt.log" 2>&1 ||
  skip "Debian's packages cannot be installed ($(tail -n 1 "$RUN/apt.log"))"
"$PYTHON" -m pip install -q -c constraints.txt -e '.[slurm]' > "$RUN/pip.log" 2>&1 ||
  skip "Snakemake's plugin cannot be installed ($(tail -n 1 "$RUN/pip.log"))"

stop() {  # each daemon that was started here, and nothing else
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
# The place is fixed: Snakemake's plugin drops SLURM_CONF. Memory is a number to schedule by, here.
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
# A GPU needs a device file, of whatever device.
echo "NodeName=localhost Name=gpu File=/dev/null,/dev/zero" > /etc/slurm/gres.conf
# Without an accounting database only squeue knows of jobs, and the plugin would ask sacct for ever.
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
  { cat "$KDLIB_HOME/logs/snakemake.log" >&2; die "The graph failed on SLURM."; }
jobs=$(squeue --states=all --noheader --Format=state:12,tres-per-job:30)
printf 'Jobs, and what they asked for:\n%s\n' "$jobs"
[ "$(grep -c COMPLETED <<< "$jobs")" -eq 3 ] || die "Three completed jobs were expected."
[ "$(grep -c gpu <<< "$jobs")" -eq 2 ] || die "Two of them should have asked for a GPU."
for file in kr/figure2/figure.png scorecard.html; do
  [ -s "$KDLIB_RESULTS/smoke/$file" ] || die "$file was not made."
done
echo "SLURM test: 3 passed, 0 failed"
