"""`python -m nwor_vllm.bench.trial torch hooks`: import things that may crash or chatter, away from whoever asks.

One marked JSON line for each, written as soon as it is known, so that what came before a crash is kept.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

MARK = "nwor-trial "


def torch() -> dict[str, Any]:
    module = importlib.import_module("torch")
    return {"version": module.__version__, "gpus": module.cuda.device_count()}


def transformers() -> dict[str, Any]:
    return {"version": importlib.import_module("transformers").__version__}


def triton() -> dict[str, Any]:
    return {"version": importlib.import_module("triton").__version__}


def hooks() -> dict[str, Any]:
    compat = importlib.import_module("nwor_vllm.plugin.compat")
    return {"hooks": compat.hooks()}


TRIALS = {action.__name__: action for action in (torch, transformers, triton, hooks)}


def main(names: list[str]) -> None:
    for name in names:
        answer: dict[str, Any]
        try:
            answer = {"ok": True, **TRIALS[name]()}
        except BaseException as error:  # a broken library may even call exit; that is what is asked about
            text = " ".join(str(error).split())
            answer = {"ok": False, "error": f"{type(error).__name__}: {text}"[:300]}
        print(MARK + json.dumps({"name": name, **answer}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
