#!/bin/bash
# One job that may take longer than its time limit, or be preempted: it goes back into the queue, and continues.
#   sbatch requeue.sh decode.csv decode 650M.tqz proteins.fasta --prompt 0.5
#SBATCH --job-name=turboesm
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=turboesm-%j.out
# For a GPU add a line: #SBATCH --gres=gpu:1

out=$1
shift
# Two minutes before the time limit this shell is told, and requeues the job. Slurm ends the step by SIGTERM, which
# saves its work; so does preemption, where the partition requeues what it preempts. The shell stays until Slurm ends
# it, too: its exit code could be taken for that of the job that was just requeued.
again() { scontrol requeue "$SLURM_JOB_ID" && sleep 120; }
trap again USR1
srun turboesm "$@" -o "$out" --if-done skip &
wait $!
code=$?
# A step that was killed (kill -9, out of memory) is tried again, three times.
if [ "$code" -eq 137 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; then
  again
fi
exit "$code"
