#!/usr/bin/env bash
# The TL;DR experiment of Huang et al. 2024 (arXiv 2403.17031) with the paper's hyper-parameters.
#
#   DATA=path/to/tldr ./run_tldr.sh                Pythia 1B
#   MODEL=EleutherAI/pythia-2.8b-deduped DATA=... ./run_tldr.sh
#
# DATA holds train.jsonl, valid.jsonl, test.jsonl (OpenAI's tldr_3_filtered) and comparisons_train.jsonl,
# comparisons_valid.jsonl (OpenAI's comparisons, batches joined). Further flags are passed on: ./run_tldr.sh --seed 2
#
# One process, so models that fit one GPU: at 1B the four models in float32 with AdamW take about 40 GB before
# activations (16 bytes per trained parameter, 4 per frozen one).
set -euo pipefail
cd "$(dirname "$0")"

MODEL=${MODEL:-EleutherAI/pythia-1b-deduped}
DATA=${DATA:?set DATA to the folder with the TL;DR files}
MICRO=${MICRO:-8} # rows per forward and backward pass: changes memory and speed, not the result

for file in train valid test comparisons_train comparisons_valid; do
  [ -f "$DATA/$file.jsonl" ] || { echo "run_tldr.sh: no $DATA/$file.jsonl" >&2; exit 2; }
done

exec python pmo.py \
  --stages sft reward ppo evaluate --model "$MODEL" \
  --data.train "$DATA/train.jsonl" --data.valid "$DATA/valid.jsonl" --data.test "$DATA/test.jsonl" \
  --data.comparisons-train "$DATA/comparisons_train.jsonl" --data.comparisons-valid "$DATA/comparisons_valid.jsonl" \
  --data.query-tokens 512 --data.response-tokens 53 --data.comparison-tokens 169 \
  --sft.epochs 1 --sft.batch-size 128 --sft.lr 3e-6 --sft.prompt-weight 0 \
  --reward.pretraining-pairs 0 --reward.epochs 1 --reward.batch-size 64 --reward.lr 3e-6 \
  --ppo.total-episodes 1000000 --ppo.batch-size 512 --ppo.num-minibatches 1 --ppo.num-ppo-epochs 4 \
  --ppo.lr 3e-6 --ppo.value-lr 3e-6 --ppo.kl-coef 0.05 --ppo.temperature 0.7 --ppo.missing-eos-score -1 \
  --ppo.gamma 1 --ppo.lam 0.95 --ppo.cliprange 0.2 --ppo.cliprange-value 0.2 --ppo.vf-coef 0.1 \
  --evaluate.temperature 0.01 --compute.max-grad-norm 0 --compute.micro-batch-size "$MICRO" \
  "$@"
