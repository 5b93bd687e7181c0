"""The `nwor` command. Each command's module is imported only when it is called, so that --help costs nothing.

A command module has `configure(parser)` and `run(args) -> int`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from nwor_vllm import __version__
from nwor_vllm.errors import NworError, unknown_key

COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("nwor_vllm.bench.doctor", "say what works on this machine, and what to do where it does not"),
    "plan": ("nwor_vllm.bench.plan", "what a grid holds, what is done, what is pending and why"),
    "bench": ("nwor_vllm.bench.bench", "measure what a grid lacks: arms interleaved in one engine, a record a run"),
    "sweep": ("nwor_vllm.bench.sweep", "grids or configurations over the devices of this machine or a Ray cluster"),
    "profile": ("nwor_vllm.bench.profile", "one run under Nsight Compute; --cost: what a step costs here"),
    "compare": ("nwor_vllm.bench.compare", "two records or two folders of them, paired: ratio, interval, verdict"),
    "report": ("nwor_vllm.report.cli", "what the runs show: findings here, and one HTML page with all of it"),
    "verify": (
        "nwor_vllm.bench.verify",
        "prove that the output is the target's own, with planted mistakes as controls",
    ),
    "record": ("nwor_vllm.bench.record_traces", "acceptance traces from real vLLM, at every position of every output"),
    "simulate": ("nwor_vllm.bench.simulate", "replay acceptance traces: a policy against its oracles"),
    "zoo": ("nwor_vllm.zoo.cli", "the embedded pair: build, path, list, prompts; scripted pairs of any shape"),
}


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "usage: nwor COMMAND ...\n\nElastic speculative decoding on stock vLLM.\n\n" + "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        if not args or args[0] in ("-h", "--help", "help"):
            print(_help())
            return 0
        if args[0] == "--version":
            print(__version__)
            return 0
        if args[0] not in COMMANDS:
            raise unknown_key("command", args[0], COMMANDS)
        module_name, text = COMMANDS[args[0]]
        module = importlib.import_module(module_name)
        parser = argparse.ArgumentParser(prog=f"nwor {args[0]}", description=text[0].upper() + text[1:] + ".")
        module.configure(parser)
        code: int = module.run(parser.parse_args(args[1:]))
        return code
    except NworError as error:
        print(f"nwor: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        return 141
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
