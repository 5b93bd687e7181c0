"""What deciding costs: a plan, an observation, and rounds per second of the default policy, on one core.

python benchmarks/policy_speed.py [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np

from nwor_vllm.bench.sim.curves import CURVES
from nwor_vllm.bench.sim.replay import Load, replay
from nwor_vllm.bench.sim.synthetic import DOMAINS, generate
from nwor_vllm.policy import Policy, Round, Step, make_policy

LADDER = (0, 1, 2, 3, 5, 8)


def median_us(call: Callable[[], object], times: int = 300) -> float:
    samples = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return 1e6 * statistics.median(samples)


def warm(batch: int) -> tuple[Policy, list[str], Step]:
    """A policy that has seen 30 steps with confidences, and a step to show it again."""
    policy, ids, rng = make_policy("goodput", None, LADDER), [f"r{i}" for i in range(batch)], np.random.default_rng(0)
    for _ in range(30):
        k = policy.plan(ids).k
        drafts = [tuple(rng.uniform(0.2, 0.99, k).tolist()) for _ in ids]
        rounds = [Round(r, k, k, int(rng.integers(0, k + 1)), c) for r, c in zip(ids, drafts, strict=True)]
        step = Step(rounds, k, k, 5e-3 * (1 + 0.1 * k), batch, batch * (1 + k))
        policy.observe(step)
    return policy, ids, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=1_000_000)
    args = parser.parse_args()
    rows = []
    for batch in (1, 8, 32, 256):
        policy, ids, step = warm(batch)
        rows.append(
            {
                "batch": batch,
                "plan_us": median_us(lambda p=policy, i=ids: p.plan(i)),  # type: ignore[misc]
                "observe_us": median_us(lambda p=policy, s=step: p.observe(s)),  # type: ignore[misc]
            }
        )
    trace = generate(DOMAINS[1], 400, 100, 8, 0)
    load = Load(trace, tuple(range(400)), 32, 3 * args.rounds)
    start, done, tokens = time.process_time(), 0, 0
    policy = make_policy("goodput", None, LADDER)
    while done < args.rounds:
        out = replay(
            policy, Load(trace, load.order, 32, min(300_000, 3 * (args.rounds - done))), CURVES["h200-8b-eagle"]
        )
        done, tokens = done + out.rounds, tokens + out.tokens
    result = {"decisions": rows, "rounds": done, "replay_cpu_s": time.process_time() - start}
    if args.json:
        print(json.dumps(result, indent=1))
        return
    for row in rows:
        print(f"batch {row['batch']:>3}: plan {row['plan_us']:.0f} us, observe {row['observe_us']:.0f} us")
    print(f"{done} rounds of goodput at batch 32, simulator included: {result['replay_cpu_s']:.1f} s of CPU")


if __name__ == "__main__":
    main()
