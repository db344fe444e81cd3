# shellcheck shell=bash
# What the job scripts share; sourced. Variables that a user may set before sbatch, which passes them on, have their defaults here.
#
# Signals. USR1 comes to the batch script alone, before the time limit (#SBATCH --signal): the run saves, and the job is requeued. TERM comes of
# scancel, or of a preemption, after which SLURM itself requeues: the run saves, if SLURM's KillWait or GraceTime gives it the time.
# To save and requeue now: scancel --batch --signal=USR1 JOB.

VENV=${VENV:-.venv}
export GPUS_PER_NODE=${GPUS_PER_NODE:-8} # trainers' ranks of a node, each with a GPU
# Seconds that torchrun gives its ranks between SIGTERM and SIGKILL, for the step's update and a save; its default is 30. With 120 to close engines
# and Ray, it is less than in #SBATCH --signal.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-420}
export PATH="$PWD/$VENV/bin:$PATH"
export PYTHONUNBUFFERED=1

[ -f launch/train.py ] || { echo "error: $PWD has no launch/train.py. Remedy: submit from the repository's root." >&2; exit 2; }

# Exit status of child $1. `wait` alone returns as soon as a trapped signal comes.
wait_for() {
  local code=0
  wait "$1" || code=$?
  while kill -0 "$1" 2>/dev/null; do
    code=0
    wait "$1" || code=$?
  done
  return "$code"
}

# The batch script's end: $1 is the exit status, $2 not empty if time was up. A run that went on to its end is not requeued.
finish() {
  if [ -n "$2" ] && [ "$1" -ne 0 ]; then
    echo "requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$1"
}
