#!/usr/bin/env bash
# One run on several nodes: Ray on every node, one worker process for each GPU but one, which is the driver's.
#
#   sbatch examples/cluster/slurm.sh runs/mine small-1gpu --model MODEL --problems hard.jsonl
#
# The first argument is the run folder, on a disk that all nodes see; the rest goes to `soar run`. Submitted again with the
# same folder, the run goes on. SLURM sends SIGTERM five minutes before the end, and the run saves itself.
#SBATCH --job-name=soar
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --open-mode=append
set -euo pipefail

out=$1
shift
gpus=${SLURM_GPUS_PER_NODE:-8}
cpus=${SLURM_CPUS_PER_TASK:-64}
port=6379
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN # only this job may use the cluster
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')

# GPU 0 of the first node is the driver's: the teacher writes and learns there while Ray knows only of the others.
others=$(seq -s, 1 $((gpus - 1)))
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
  env CUDA_VISIBLE_DEVICES="$others" ray start --head --node-ip-address="$address" --port="$port" \
  --num-cpus="$cpus" --num-gpus=$((gpus - 1)) --disable-usage-stats --block &
sleep 20
for node in "${nodes[@]:1}"; do
  srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" \
    ray start --address="$address:$port" --num-cpus="$cpus" --num-gpus="$gpus" --disable-usage-stats --block &
done
sleep 20

if [ -e "$out/manifest.json" ]; then again=(--resume); else again=("$@"); fi
workers=$((gpus * ${#nodes[@]} - 1))
CUDA_VISIBLE_DEVICES=0 soar run "${again[@]}" --out "$out" --workers "$address:$port" \
  --set "cluster.workers=$workers" &
run=$!
trap 'kill -TERM "$run"' TERM
code=0
wait "$run" || code=$?
wait "$run" 2> /dev/null || code=$? # the first wait ends with the signal, the second with the run
exit "$code"
