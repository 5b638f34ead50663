# shellcheck shell=bash
# Functions of the batch scripts (*.sbatch), which SLURM runs on the first node of a job.
#
# Reasons for which a job ends early:
#   time limit     SLURM sends SIGUSR2 to the batch script some minutes earlier (#SBATCH --signal); the run saves,
#                  leaves REQUEUE, and this file requeues the job, MAX_REQUEUES times at most.
#   STOP file      the same, requested by the user: touch RUN/STOP.
#   preemption, scontrol requeue
#                  SLURM sends SIGTERM to every process, waits (GraceTime, KillWait), and requeues the job itself.
#   scancel        the same signal; the run saves if the KillWait of the cluster is long enough. No requeue.
#
# Optional environment variables of a job (defaults): PROCESSES_PER_NODE (the allocated GPUs of the node, else 1),
# MAX_REQUEUES (100), MASTER_ADDR (the address of the first node in SLURM), PYTHON (.venv/bin/python).

# shellcheck source=launch/stoppable.sh
source launch/stoppable.sh

# exec, here and below: a signal would kill an intermediate bash, but not its srun. srun does not inherit the number of
# CPUs of the batch script; each task gets all CPUs that the job has on the node.
on_one_node() { exec srun --nodes=1 --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" "$@"; }

# Address by which SLURM reaches the first node; it may differ from the host name.
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
    # A different port at every restart, since the previous one may still be in use; below the range of outgoing ports.
    MASTER_PORT=$((20000 + (SLURM_JOB_ID + 97 * ${SLURM_RESTART_COUNT:-0}) % 10000))
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((SLURM_CPUS_ON_NODE > processes ? SLURM_CPUS_ON_NODE / processes : 1))}
    say "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}: $SLURM_JOB_NUM_NODES nodes x $processes processes," \
        "rendezvous at $MASTER_ADDR:$MASTER_PORT"
    # --wait: a crash on one node ends the other nodes within two minutes, but not immediately. After a stop of all
    # nodes, the first torchrun to exit reports the signal as a failure while the others may still be saving.
    # SLURM_NODEID is set in every task, so the shell of the task must expand it, not this one.
    # shellcheck disable=SC2016
    exec srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" \
        --kill-on-bad-exit=0 --wait=120 \
        bash -c 'exec "$0" -m torch.distributed.run --max-restarts 0 \
            --nnodes "$SLURM_JOB_NUM_NODES" --node-rank "$SLURM_NODEID" \
            --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --nproc-per-node "$@"' \
        "$PYTHON" "$processes" "$@"
}

# Print the part i/n of this task of a job array (`sbatch --array=0-15`), or nothing outside an array. To submit some of
# the tasks again: PARTS=16 sbatch --array=3,7.
array_part() {
    [ -n "${SLURM_ARRAY_TASK_ID:-}" ] || return 0
    local all_tasks=0-$((SLURM_ARRAY_TASK_COUNT - 1))
    if [ -z "${PARTS:-}" ] && [ "${SLURM_ARRAY_TASK_MIN:-}-${SLURM_ARRAY_TASK_MAX:-}" != "$all_tasks" ]; then
        say "error: parts are numbered from 0: --array=0-15 for 16 parts; PARTS=16 sbatch --array=3,7 for two of them"
        return 2
    fi
    printf '%s/%s\n' "$SLURM_ARRAY_TASK_ID" "${PARTS:-$SLURM_ARRAY_TASK_COUNT}"
}

requeue() {
    local restarts=${SLURM_RESTART_COUNT:-0} limit=${MAX_REQUEUES:-100}
    if [[ $(scontrol show job "$SLURM_JOB_ID") != *JobState=RUNNING* ]]; then
        say "stopped with a checkpoint; SLURM is ending this job itself, so this script does not requeue it"
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

# train SCRIPT ARGUMENTS...: run a training script with one torchrun per node, and requeue the job after a stop.
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
