# shellcheck shell=bash
# Sourced by the batch scripts (*.sbatch), which SLURM runs on the first node of a job: what they have in common.
#
# How a job ends before its work is done:
#   time limit     SLURM sends SIGUSR2 to the batch script some minutes earlier (#SBATCH --signal); the run saves,
#                  leaves REQUEUE, and this file requeues the job, MAX_REQUEUES times at most.
#   STOP file      the same, by hand: touch RUN/STOP.
#   preemption, scontrol requeue
#                  SLURM sends SIGTERM to every process, waits (GraceTime, KillWait), and requeues by itself.
#   scancel        the same signal; the run saves if the cluster's KillWait leaves it the time. Nothing is requeued.
#
# Set in the job's environment if need be: PROCESSES_PER_NODE (the node's allocated GPUs, else 1), MAX_REQUEUES (100),
# MASTER_ADDR (what SLURM calls the first node), PYTHON (.venv/bin/python).

# shellcheck source=launch/stoppable.sh
source launch/stoppable.sh

# Here and below: exec, so that no bash stands between a script and its srun and dies of a signal alone. And srun does
# not take the number of CPUs over from the batch script by itself; each task gets all that the job has on the node.
on_one_node() { exec srun --nodes=1 --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" "$@"; }

# What SLURM itself reaches the first node by, which need not be its host name.
first_node_address() {
    local nodes node
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || return
    nodes=${nodes%%$'\n'*}
    node=$(scontrol show node "$nodes") || return
    [[ $node =~ NodeAddr=([^[:space:]]+) ]] || return
    printf '%s\n' "${BASH_REMATCH[1]}"
}

# torchrun_on_every_node SCRIPT ARGUMENTS...
torchrun_on_every_node() {
    local processes=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS
    MASTER_ADDR=${MASTER_ADDR:-$(first_node_address)} || return
    # Another port at every restart: the last run's may not be free yet. Below the range of outgoing connections.
    MASTER_PORT=$((20000 + (SLURM_JOB_ID + 97 * ${SLURM_RESTART_COUNT:-0}) % 10000))
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SLURM_CPUS_ON_NODE > processes ? SLURM_CPUS_ON_NODE / processes : 1))}
    say "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}: $SLURM_JOB_NUM_NODES nodes x $processes processes," \
        "rendezvous at $MASTER_ADDR:$MASTER_PORT"
    # A crash on one node ends the others within two minutes, but not at once: where all nodes were asked to stop,
    # the first torchrun to leave reports the signal as a failure, and the others may still be saving.
    # SLURM_NODEID is set in every task, so the task's shell must expand it, not this one.
    # shellcheck disable=SC2016
    exec srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" \
        --kill-on-bad-exit=0 --wait=120 \
        bash -c 'exec "$0" -m torch.distributed.run --max-restarts 0 \
            --nnodes "$SLURM_JOB_NUM_NODES" --node-rank "$SLURM_NODEID" \
            --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --nproc-per-node "$@"' \
        "$PYTHON" "$processes" "$@"
}

# The part i/n that falls to this task of an array, `sbatch --array=0-15`; nothing where there is no array. Some of its
# tasks are submitted again with PARTS=16 sbatch --array=3,7.
array_part() {
    [ -n "${SLURM_ARRAY_TASK_ID:-}" ] || return 0
    local whole=0-$((SLURM_ARRAY_TASK_COUNT - 1))
    if [ -z "${PARTS:-}" ] && [ "${SLURM_ARRAY_TASK_MIN:-}-${SLURM_ARRAY_TASK_MAX:-}" != "$whole" ]; then
        say "error: parts are numbered from 0: --array=0-15 for 16 parts; PARTS=16 sbatch --array=3,7 for two of them"
        return 2
    fi
    printf '%s/%s\n' "$SLURM_ARRAY_TASK_ID" "${PARTS:-$SLURM_ARRAY_TASK_COUNT}"
}

requeue() {
    local restarts=${SLURM_RESTART_COUNT:-0} limit=${MAX_REQUEUES:-100}
    if [[ $(scontrol show job "$SLURM_JOB_ID") != *JobState=RUNNING* ]]; then
        say "stopped with a checkpoint; SLURM is ending this job itself, so it is not requeued from here"
        return 0
    fi
    if [ "$restarts" -ge "$limit" ]; then
        say "stopped with a checkpoint; not requeued: this was restart $restarts and MAX_REQUEUES is $limit"
        return 75
    fi
    say "stopped with a checkpoint; requeueing job $SLURM_JOB_ID (restart $((restarts + 1)) of at most $limit)"
    scontrol requeue "$SLURM_JOB_ID" && return 0
    say "error: scontrol could not requeue the job; submit the same command again to continue"
    return 75
}

# train SCRIPT ARGUMENTS...: one torchrun a node, until the end or a stop; requeued after a stop.
train() {
    local folder status=0
    folder=$(run_folder "$@") || return
    stoppable "$folder" torchrun_on_every_node "$@" || status=$?
    if [ -e "$folder/REQUEUE" ]; then
        rm -f "$folder/REQUEUE"
        requeue
        return
    fi
    return "$status"
}
