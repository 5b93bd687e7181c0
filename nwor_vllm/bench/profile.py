"""`nwor profile`: one run of a grid under Nsight Compute; with --cost, what a step of this engine costs."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from pathlib import Path

from nwor_vllm.bench import plan
from nwor_vllm.errors import ConfigError

COST = "nwor_vllm.bench.cost_profile"


def configure(parser: argparse.ArgumentParser) -> None:
    plan.add_grid_flags(parser, optional=True)
    parser.add_argument("--cost", action="store_true", help="measure step times by batch and draft length instead")
    parser.add_argument("--output", type=Path, help="the file for the answer as JSON")


def run(args: argparse.Namespace) -> int:
    if args.cost:
        if importlib.util.find_spec(COST) is None:
            raise ConfigError("--cost is not part of this build")
        code: int = importlib.import_module(COST).run(args)
        return code
    raise ConfigError("name a GRID.yaml and one of its runs with --only, or --cost")
