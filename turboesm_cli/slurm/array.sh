#!/bin/bash
# One input over the tasks of an array, and a job that joins what they wrote once all have succeeded:
#   job=$(sbatch --parsable array.sh decode.csv decode 650M.tqz proteins.fasta --prompt 0.5)
#   sbatch --dependency=afterok:$job merge.sh decode.csv
#SBATCH --job-name=turboesm
#SBATCH --array=0-3
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=turboesm-%A_%a.out
# For a GPU add a line: #SBATCH --gres=gpu:1

out=$1
shift
mkdir -p "$out.parts"
# As in requeue.sh: before the time limit, and where its step was killed, the task goes back into the queue. It must
# not fail before that: a job that waits by afterok would never start, although the task succeeds later.
again() { scontrol requeue "$SLURM_JOB_ID" && sleep 120; }
trap again USR1
srun turboesm "$@" --shard auto -o "$out.parts/part-$SLURM_ARRAY_TASK_ID" --if-done skip &
wait $!
code=$?
if [ "$code" -eq 137 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; then
  again
fi
exit "$code"
