#!/usr/bin/env bash
# The TL;DR experiment of Huang et al. 2024 (arXiv 2403.17031), with the paper's hyper-parameters.
#
#   ./run_tldr.sh                     Pythia 1B
#   SIZE=2.8b ./run_tldr.sh           Pythia 2.8B (or 6.9b)
#   ./run_tldr.sh --seed 2 ...        further flags go to pmo.py, and override those below
#
# Other variables: MODEL (a folder or Hub name, instead of SIZE), DATA (folder of the five data files; what is missing
# there is downloaded, and an interrupted download goes on where it stopped), MICRO (rows per forward and backward
# pass) and SAMPLE (responses sampled together), both by SIZE: memory and speed, not the result; LAUNCH (python, or for
# several GPUs "torchrun --nproc-per-node 4").
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

SIZE=${SIZE:-1b}
MODEL=${MODEL:-EleutherAI/pythia-$SIZE-deduped}
DATA=${DATA:-tldr}
if [ "$SIZE" = 1b ]; then MICRO=${MICRO:-32} SAMPLE=${SAMPLE:-256}; else MICRO=${MICRO:-8} SAMPLE=${SAMPLE:-128}; fi
LAUNCH=${LAUNCH:-python}
SOURCE=${SOURCE:-https://openaipublic.blob.core.windows.net/summarize-from-feedback}

stop() {
  echo "run_tldr.sh: $*" >&2
  exit 2
}

# check FILE RECORDS: a file is put in place only when it has as many records as were published.
check() {
  local found
  found=$(grep -c '' "$1" || true)
  [ "$found" = "$2" ] || stop "$1 has $found records, should have $2; remove it to load it again"
}

# fetch PATH FILE [RECORDS]: resumes FILE.part, and names it FILE when it is complete.
fetch() {
  [ -f "$2" ] && return
  echo "loading $SOURCE/$1"
  curl --fail --location --retry 5 --continue-at - --silent --show-error --output "$2.part" "$SOURCE/$1" ||
    stop "cannot load $SOURCE/$1; start again to go on, or put the data into $DATA yourself"
  [ $# -lt 3 ] || check "$2.part" "$3"
  mv "$2.part" "$2"
}

mkdir -p "$DATA"
fetch datasets/tldr_3_filtered/train.jsonl "$DATA/train.jsonl" 116722
fetch datasets/tldr_3_filtered/valid.jsonl "$DATA/valid.jsonl" 6447
fetch datasets/tldr_3_filtered/test.jsonl "$DATA/test.jsonl" 6553
if [ ! -f "$DATA/comparisons_train.jsonl" ] || [ ! -f "$DATA/comparisons_valid.jsonl" ]; then
  mkdir -p "$DATA/comparisons"
  for batch in batch{3..20} batch22 edit_b2_eval_test batch0_cnndm cnndm0 cnndm2; do
    fetch "dataset/comparisons/$batch.json" "$DATA/comparisons/$batch.jsonl"
  done
  grep -h '"split": "train"' "$DATA"/comparisons/*.jsonl >"$DATA/comparisons_train.part" || true
  grep -hv '"split": "train"' "$DATA"/comparisons/*.jsonl >"$DATA/comparisons_valid.part" || true
  check "$DATA/comparisons_train.part" 92858
  check "$DATA/comparisons_valid.part" 86086
  mv "$DATA/comparisons_train.part" "$DATA/comparisons_train.jsonl"
  mv "$DATA/comparisons_valid.part" "$DATA/comparisons_valid.jsonl"
fi

cat <<'END'
What one GPU needs, by README's formulas, which fit what a 1B model took on an H100 to 4% (hours: PPO of 1B measured
over two updates and extrapolated, the rest at 400 TFLOP/s):
                 SFT            reward model   PPO, training   and sampling
  Pythia 1B       40 GB 0.2 h    44 GB 0.3 h    64 GB  17 h     62 GB (MICRO=32, SAMPLE=256)
  Pythia 2.8B     63 GB 0.5 h    66 GB 0.9 h   130 GB  43 h    124 GB (MICRO=8, SAMPLE=128)
  Pythia 6.9B    145 GB 1.3 h   149 GB 2.1 h   309 GB 107 h    280 GB (MICRO=8, SAMPLE=128); more than one GPU has
END

# shellcheck disable=SC2086
exec $LAUNCH "$here/pmo.py" \
  --stages sft reward ppo evaluate --model "$MODEL" \
  --data.train "$DATA/train.jsonl" --data.valid "$DATA/valid.jsonl" --data.test "$DATA/test.jsonl" \
  --data.comparisons-train "$DATA/comparisons_train.jsonl" --data.comparisons-valid "$DATA/comparisons_valid.jsonl" \
  --data.query-tokens 512 --data.response-tokens 53 --data.comparison-tokens 169 \
  --sft.epochs 1 --sft.batch-size 128 --sft.lr 3e-6 --sft.prompt-weight 0 \
  --reward.pretraining-pairs 0 --reward.epochs 1 --reward.batch-size 64 --reward.lr 3e-6 \
  --ppo.total-episodes 1000000 --ppo.batch-size 512 --ppo.responses-per-query 1 --ppo.num-minibatches 1 --ppo.num-ppo-epochs 4 \
  --ppo.baseline value-model --ppo.lr 3e-6 --ppo.value-lr 3e-6 --ppo.kl-coef 0.05 --ppo.temperature 0.7 --ppo.missing-eos-score -1 \
  --ppo.gamma 1 --ppo.lam 0.95 --ppo.cliprange 0.2 --ppo.cliprange-value 0.2 --ppo.vf-coef 0.1 \
  --evaluate.temperature 0.01 --optimizer.max-grad-norm 0 --optimizer.beta2 0.999 --compute.micro-batch-size "$MICRO" \
  --compute.sample-batch-size "$SAMPLE" \
  "$@"
