# shellcheck shell=bash
# What the slurm*.sbatch scripts share: one attempt at a run, then a requeue where exit.json says so. They source it
# in the repository, since sbatch runs a copy of a script that lies elsewhere. After launch/demo.sh (it makes .venv).
#   NPROC: ranks per node (default: the node's GPUs, else 4)   MAX_REQUEUE: restarts at most (default 20)
set -euo pipefail
if [ -z "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ]; then PATH="$PWD/.venv/bin:$PATH"; fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi

job="$SLURM_JOB_ID" restart="${SLURM_RESTART_COUNT:-0}" most="${MAX_REQUEUE:-20}" step="" cancelled=""
# One task of an array; SLURM_JOB_ID alone would be the whole array for one of them.
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"; fi
trap 'echo "mat_dist: time limit is near, stopping"; [ -z "$step" ] || kill -USR1 "$step"' USR1
trap 'echo "mat_dist: ended by SLURM, stopping"; cancelled=1' TERM  # SLURM has told the ranks itself

train_and_requeue() {  # default run.root, default run.name, the trainer's arguments
    local root="$1" name="$2" argument nodes rc=0 code; shift 2
    for argument in "$@"; do
        case "$argument" in
            run.root=*) root="${argument#*=}" ;;
            run.name=*) name="${argument#*=}" ;;
        esac
    done
    local exit_file="$root/$name/exit.json" newest="$root/$name/checkpoints/latest" before saved
    before="$(cat "$exit_file" 2>/dev/null || true)" saved="$(cat "$newest" 2>/dev/null || true)"
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

    # One node: a store that listens on loopback only. Several: the first one has rank 0 and the store, and torchrun on
    # a node that is cut off ends with its ranks (with c10d it does not).
    local rendezvous=(--rdzv_backend=mat_dist_local)
    if [ "${#nodes[@]}" -gt 1 ]; then
        rendezvous=(--rdzv_backend=static --rdzv_endpoint="${nodes[0]}:$((20000 + SLURM_JOB_ID % 10000))")
    fi
    # srun hands USR1 to every process of the step. torchrun and the ranks handle it once they have loaded; until then
    # they inherit that it is ignored, since the default is to die of it.
    # shellcheck disable=SC2016  # each node's own SLURM_NODEID
    srun --kill-on-bad-exit=1 bash -c 'trap "" USR1; PET_NODE_RANK="$SLURM_NODEID" exec "$@"' step \
        python -m torch.distributed.run --nnodes="${#nodes[@]}" \
        --nproc_per_node="${NPROC:-${SLURM_GPUS_ON_NODE:-4}}" "${rendezvous[@]}" --rdzv_id="$SLURM_JOB_ID.$restart" \
        -m mat_dist.train "$@" run.root="$root" run.name="$name" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do rc=0; wait "$step" || rc=$?; done  # a trap ends `wait` before the step ends

    # srun may tell another code than that of the ranks: it is in exit.json, if this attempt wrote one.
    if [ "$(cat "$exit_file" 2>/dev/null || true)" != "$before" ]; then
        code="$(python -c 'import json, sys; print(int(json.load(open(sys.argv[1]))["code"]))' "$exit_file")"
    else
        echo "mat_dist: srun ended with $rc and the ranks wrote no $exit_file" >&2
        if [ "$(cat "$newest" 2>/dev/null || true)" = "$saved" ]; then exit "$rc"; fi
        code=14  # killed, but not before it had saved something new
    fi
    case "$code" in
        75|13|14)  # saved on request, a peer failed, a peer fell silent
            if [ -n "$cancelled" ]; then
                echo "mat_dist: ended with $code; SLURM ended this job and knows whether to requeue it"
            elif [ "$restart" -lt "$most" ]; then
                echo "mat_dist: ended with $code, requeue $((restart + 1)) of $most"
                exec scontrol requeue "$job"
            else
                echo "mat_dist: ended with $code after $restart restarts, no more (MAX_REQUEUE)" >&2
            fi ;;
    esac
    exit "$code"
}
