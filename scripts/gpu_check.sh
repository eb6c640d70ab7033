#!/usr/bin/env bash
# Checks and measures the attention kernels on one GPU: a bare machine with torch, triton and numpy is enough.
#
#     scripts/gpu_check.sh OUT [SECONDS]
#
# OUT gets results.jsonl, sanitizer.txt, ncu.txt, log.txt and summary.txt. SECONDS (default 1500) is for all stages
# together; each has a share, and what a stage leaves is for those behind it. A stage that is complete in OUT is
# skipped, one that was cut off goes on where it was: run it again for the rest.
# BATCHLLM_FA3_LIBRARY names FlashAttention 3 (scripts/fa3_library.py). REHEARSAL=1 runs tiny shapes without a GPU.
set -uo pipefail

out=${1:?usage: scripts/gpu_check.sh OUT [SECONDS]}
total=${2:-1500}
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH=$root/kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$out"
results=$out/results.jsonl
log=$out/log.txt
grace=12 # seconds between "begin nothing new" and the end of a stage
rehearsal=()
processes=8
if [ -n "${REHEARSAL:-}" ]; then
    export TRITON_INTERPRET=1
    rehearsal=(--rehearsal)
    processes=2
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [[ ${BATCHLLM_FA3_LIBRARY:-} == *.xz && -f $BATCHLLM_FA3_LIBRARY ]]; then # unpacked once, not once a stage
    "$python" -c 'import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.argv[1]), open(sys.argv[2], "wb"))' \
        "$BATCHLLM_FA3_LIBRARY" "$work/_vllm_fa3_C.abi3.so" && export BATCHLLM_FA3_LIBRARY=$work/_vllm_fa3_C.abi3.so
fi

end=$((SECONDS + total))
shares_left=100
say() { echo "[$SECONDS s] $*" | tee -a "$log"; }

# complete STAGE: whether OUT has all of it
complete() { [ -f "$results" ] && grep -qF "{\"stage\": \"$1\", \"complete\": true}" "$results"; }

# begin STAGE SHARE: sets `limit`, this stage's seconds; fails where there is nothing to do
begin() {
    local left=$((end - SECONDS))
    limit=$((left * $2 / shares_left))
    shares_left=$((shares_left - $2))
    if complete "$1"; then
        say "$1: complete before"
        return 1
    fi
    if ((limit < 4)); then
        say "$1: no time left"
        return 1
    fi
    say "$1: at most $limit s"
}

# bench SECONDS ARGUMENTS...: one process of the benchmark; its exit status is 0 when the stage is complete
bench() {
    local seconds=$1 soft
    soft=$((seconds > 3 * grace ? seconds - grace : seconds * 2 / 3))
    shift
    timeout -k 5 "$seconds" "$python" -m batchllm_kernels.bench "$@" --seconds "$soft" "${rehearsal[@]}" \
        --results "$results" >>"$log" 2>&1
}

# parallel SECONDS ARGUMENTS...: the cases over several processes, which compile and check beside each other
parallel() {
    local pids=() part failed=0
    for ((part = 0; part < processes; part++)); do
        bench "$@" --part "$part/$processes" &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
    return $failed
}

# sanitize TOOL SECONDS: one tool over a small run; every launch of ours, none of torch's
sanitize() {
    echo "== $1" >>"$out/sanitizer.txt"
    if [ -n "${REHEARSAL:-}" ]; then
        bench "$2" --check --quick --stage-name "$1" || return
        echo "rehearsed without a sanitizer" >>"$out/sanitizer.txt"
        return
    fi
    local filters=(--kernel-regex kns=attend --kernel-regex kns=merge)
    compute-sanitizer "${filters[@]}" "$python" -c pass >/dev/null 2>&1 || filters=() # another version of the tool
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 5 "$2" compute-sanitizer --tool "$1" --error-exitcode 9 \
        "${filters[@]}" --print-limit 20 \
        "$python" -m batchllm_kernels.bench --check --quick --stage-name "$1" --results "$results" \
        >>"$out/sanitizer.txt" 2>&1
}

say "$(uname -m), $("$python" --version), budget $total s"
nvidia-smi >>"$log" 2>&1 || say "nvidia-smi: not here"

begin facts 4 && bench "$limit" --facts
begin check 15 && parallel "$limit" --check
begin host 3 && bench "$limit" --host
for tool in memcheck racecheck; do
    if begin "$tool" 7; then
        sanitize "$tool" "$limit"
        say "$tool: exit status $?"
    fi
done
begin time-important 20 && bench "$limit" --device cuda --quick
begin calibrate 2 && bench "$limit" --calibrate
begin compile_candidates 8 && parallel "$limit" --compile-candidates --quick
begin tune 12 && bench "$limit" --tune --quick
begin replay 6 && bench "$limit" --replay
begin profile 8 && {
    if [ -n "${REHEARSAL:-}" ]; then
        bench "$limit" --profile
    else
        timeout -k 5 "$limit" ncu --clock-control none --kernel-name "regex:attend|merge" \
            --section SpeedOfLight --section MemoryWorkloadAnalysis --section LaunchStats --section Occupancy \
            --section WarpStateStats --section SchedulerStats --section InstructionStats \
            "$python" -m batchllm_kernels.bench --profile --results "$results" >"$out/ncu.txt" 2>&1
    fi
}
begin time 8 && bench "$limit" --device cuda

"$python" -m batchllm_kernels.bench --summary --results "$results" | tee "$out/summary.txt"
say "done"
