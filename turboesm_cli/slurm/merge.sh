#!/bin/bash
# Join what the tasks of array.sh wrote: sbatch --dependency=afterok:JOB merge.sh OUT
#SBATCH --job-name=turboesm-merge
#SBATCH --cpus-per-task=1
#SBATCH --mem=8G
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=turboesm-%j.out

exec srun turboesm merge "$1" "$1".parts/part-*[0-9] --if-done skip
