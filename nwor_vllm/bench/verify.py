"""`nwor verify`: is the output the target's own? Token for token at temperature 0, in distribution above it.

Each runner carries its negative control: a rule that is wrong, and must be noticed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from pydantic import Field

from nwor_vllm.bench.grid import Frozen
from nwor_vllm.bench.verify_journal import Check, Journal
from nwor_vllm.errors import ConfigError, MissingError

LIMIT_Z = 3.5
RUNNERS = ("v1", "v2")
SAMPLES = 20000
INTERPRETED_SAMPLES = 2000  # a tenth of a second each; of 1200 the planted rule hides in the noise
ENGINES = 6


class Verdict(Frozen):
    """What `--json` prints."""

    passed: bool
    compared: int = Field(ge=0, description="outputs compared, the planted rule's not counted")
    differences: int = Field(ge=0, description="outputs that are not the target's own")
    samples: int | None = Field(description="continuations per rule, the fewest; null at temperature 0")
    max_abs_z: float | None = Field(description="null at temperature 0: no distribution was compared")
    negative_control_caught: bool | None = Field(description="null where no planted rule was run")
    seconds: float = Field(ge=0)
    checks: list[Check]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full", action="store_true", help="every combination, on both model runners")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 compares tokens, 1 compares distributions")
    parser.add_argument(
        "--samples",
        type=int,
        help=f"continuations per rule at temperature 1; default {SAMPLES}, interpreted {INTERPRETED_SAMPLES}",
    )
    parser.add_argument("--engines", type=int, default=ENGINES, help="how many combinations are sampled without --full")
    parser.add_argument("--seed", type=int, default=0, help="which combinations are sampled")
    parser.add_argument("--journal", type=Path, metavar="FILE", help="keep checks there; again: go on where it stopped")
    parser.add_argument("--json", action="store_true", help="print one JSON object; progress goes to stderr")
    parser.add_argument("--runner", choices=RUNNERS, help="vLLM's model runner; default v1, with --full both")
    parser.add_argument("--target", type=Path, help="a model folder in place of the embedded target")
    parser.add_argument(
        "--drafter", action="append", default=[], metavar="METHOD=DIR", help="its drafters, with --target; repeatable"
    )


def run(args: argparse.Namespace) -> int:
    started = time.monotonic()
    _check(args)
    with tempfile.TemporaryDirectory() as folder:
        about = {"temperature": args.temperature, "samples": args.samples, "target": str(args.target or "")}
        journal = Journal(args.journal or Path(folder) / "journal", about | {"drafters": args.drafter})
        runners = (args.runner,) if args.runner else RUNNERS if args.full else RUNNERS[:1]
        for runner in runners:
            if runner == "v1" or os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
                os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
                _here(runner, args, journal)
            else:
                _on_v2(args, journal)
        verdict = judge(journal.checks.values(), round(time.monotonic() - started, 1))
    print(verdict.model_dump_json() if args.json else summary(verdict))
    return 0 if verdict.passed else 1


def _check(args: argparse.Namespace) -> None:
    if args.temperature not in (0.0, 1.0):
        raise ConfigError(f"--temperature is {args.temperature}; expected 0 (token identity) or 1 (distribution)")
    least = INTERPRETED_SAMPLES if args.runner == "v2" else SAMPLES
    if args.samples is not None and args.samples < least:
        raise ConfigError(f"--samples is {args.samples}; expected at least {least}, or a bias may pass unnoticed")
    if args.engines < 1:
        raise ConfigError(f"--engines is {args.engines}; expected 1 or more")
    if args.temperature and (args.target or args.drafter):
        raise ConfigError("--target is for temperature 0; at 1 a pair of eight tokens is sampled, whose truth is exact")


def _here(runner: str, args: argparse.Namespace, journal: Journal) -> None:
    from nwor_vllm.bench import verify_identity, verify_sampling

    if args.temperature:
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        samples = args.samples or (INTERPRETED_SAMPLES if interpreted else SAMPLES)
        verify_sampling.check(runner, samples, journal)
    else:
        cells = verify_identity.combinations(None if args.full else args.engines, args.seed)
        verify_identity.check(runner, verify_identity.pair_of(args.target, args.drafter), cells, journal)


def _on_v2(args: argparse.Namespace, journal: Journal) -> None:
    """The V2 runner is chosen before vLLM is imported; without a GPU its kernels are interpreted, too."""
    start = [sys.executable, "-m", "nwor_vllm.plugin.v2_interpreter", "nwor_vllm.bench.cli"]
    command = [*start, "verify", "--json", "--runner", "v2", "--journal", str(journal.path)]
    command += ["--seed", str(args.seed), "--temperature", str(args.temperature), "--engines", str(args.engines)]
    command += ["--full"] if args.full else []
    command += ["--samples", str(args.samples)] if args.samples is not None else []
    command += ["--target", str(args.target)] if args.target is not None else []
    command += [part for drafter in args.drafter for part in ("--drafter", drafter)]
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_USE_V2_MODEL_RUNNER"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    journal.read()
    if not any(line.startswith('{"passed":') for line in done.stdout.splitlines()):
        # What it had checked until then proves nothing of the rest.
        raise MissingError(f"the check of the V2 runner ended early, with code {done.returncode}; see above")


def judge(checks: Iterable[Check], seconds: float) -> Verdict:
    """A control that is missing, an engine that never did what its combination is about: no proof."""
    rows = list(checks)
    honest = [row for row in rows if not row.planted and not row.refused]
    planted = [row.caught for row in rows if row.planted]
    scores = [abs(z) for row in honest for z in (row.z or {}).values()]
    differences = sum(row.differences for row in honest)
    caught = all(planted) if planted else None
    done = bool(honest) and all(row.met for row in honest)
    return Verdict(
        passed=done and not differences and bool(caught) and max(scores, default=0.0) < LIMIT_Z,
        compared=sum(row.compared for row in honest),
        differences=differences,
        samples=min((row.compared for row in honest if row.z), default=None),
        max_abs_z=max(scores, default=None),
        negative_control_caught=caught,
        seconds=seconds,
        checks=rows,
    )


def summary(verdict: Verdict) -> str:
    lines = [f"refused by the engine: {row.name}: {row.refused}" for row in verdict.checks if row.refused]
    lines += [f"did not happen: {row.name}" for row in verdict.checks if not row.met]
    z = "" if verdict.max_abs_z is None else f", largest |z| {verdict.max_abs_z:.2f}"
    control = {True: "was caught", False: "was NOT CAUGHT", None: "was NOT RUN"}[verdict.negative_control_caught]
    lines.append(
        f"{'passed' if verdict.passed else 'FAILED'}: {verdict.compared} outputs compared, {verdict.differences} differ"
        f"{z}; the planted wrong rule {control}; {verdict.seconds:.0f} s"
    )
    return "\n".join(lines)
