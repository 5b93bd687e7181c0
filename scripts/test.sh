#!/usr/bin/env bash
# The gate: sets the environment up and runs everything that must hold. Goes on after a failure, names it at the end.
#
#   ./scripts/test.sh            everything
#   ./scripts/test.sh --quick    no engines, nothing slow: under a minute
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh

quick=
case "${1:-}" in
    --quick) quick=yes ;;
    '') ;;
    *) die "unknown argument '$1'; expected --quick or nothing" ;;
esac
[[ $# -le 1 ]] || die "expected at most one argument, --quick"

failed=() times=()

stage() {
    local name=$1 start=$SECONDS result=passed
    shift
    say "== $name"
    "$@" || { result=FAILED && failed+=("$name"); }
    times+=("$(printf '%5d s  %-7s %s' $((SECONDS - start)) "$result" "$name")")
}

style() {
    ruff check . && ruff format --check .
}

# nwor_vllm.kernels lives in ./kernels: mypy sees the tree as it is installed.
types() {
    rm -rf build/mypy && mkdir -p build/mypy/nwor_vllm &&
        ln -s "$PWD"/nwor_vllm/* build/mypy/nwor_vllm/ && ln -s "$PWD/kernels" build/mypy/nwor_vllm/kernels &&
        (cd build/mypy && mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p nwor_vllm)
}

shell() {
    local files=(scripts/*.sh *.sh .ci/run)
    shellcheck -x "${files[@]}" && shfmt -d -i 4 -ci "${files[@]}"
}

./scripts/bootstrap.sh </dev/null
enter_env

stage "style (ruff)" style
stage "types (mypy)" types
stage "shell (shellcheck, shfmt)" shell
if [[ $quick ]]; then
    stage "unit" pytest -q -n 2 -m "not vllm and not slow and not serial"
else
    stage "unit" pytest -q -n 2 -m "not vllm and not serial"
    # One file's engines are shared by its tests, so a file stays in one process.
    stage "real vLLM" pytest -q -n 2 --dist loadfile -m "vllm and not serial"
    stage "times, alone on the machine" pytest -q -m serial
fi

printf '\n' >&2
printf '%s\n' "${times[@]}" "$(printf '%5d s  in all' "$SECONDS")" >&2
((${#failed[@]} == 0)) || die "failed: $(printf '%s; ' "${failed[@]}")"
