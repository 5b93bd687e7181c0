"""What deciding costs: a decision, a step's whole share of the policy, and a million rounds replayed, on one core.

python benchmarks/policy_speed.py [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from nwor_vllm.bench.sim.curves import CURVES
from nwor_vllm.bench.sim.load import Load
from nwor_vllm.bench.sim.replay import replay
from nwor_vllm.bench.sim.synthetic import DOMAINS, generate
from nwor_vllm.policy import Plan, Round, Step, make_policy

LADDER = (0, 1, 2, 3, 5, 8)
STEPS = 1600


def measure(batch: int) -> dict[str, float]:
    """CPU time of `plan` and `observe` over steps as an engine runs them, confidences included, past the eager start.

    Learning comes every sixteenth step and the plan is kept in between, so the mean is a step's share; of the plans,
    the slowest sixteenth were really made: `decision` is their median.
    """
    policy, ids, rng = make_policy("goodput", None, LADDER), [f"r{i}" for i in range(batch)], np.random.default_rng(0)
    spent, plans = [], []
    for _ in range(STEPS):
        start = time.thread_time()
        plan = policy.plan(ids)
        planned = time.thread_time()
        step = _step(plan, ids, rng)
        learning = time.thread_time()
        policy.observe(step)
        plans.append(planned - start)
        spent.append(planned - start + time.thread_time() - learning)
    settled, made = spent[STEPS // 4 :], sorted(plans[STEPS // 4 :])[-STEPS * 3 // 64 :]
    return {
        "batch": batch,
        "decision_us": 1e6 * statistics.median(made),
        "step_us": 1e6 * statistics.mean(settled),
        "worst_step_us": 1e6 * float(np.quantile(settled, 0.99)),
    }


def _step(plan: Plan, ids: list[str], rng: np.random.Generator) -> Step:
    k, n = plan.k, len(ids)
    drafts = rng.uniform(0.2, 0.99, (n, k)).tolist()
    kept = rng.integers(0, k + 1, n).tolist()
    rounds = [Round(r, k, k, a, tuple(c)) for r, a, c in zip(ids, kept, drafts, strict=True)]
    return Step(rounds, k, k, 5e-3 * (1 + 0.1 * k), n, n * (1 + k))


def replay_cpu_s(rounds: int, batch: int) -> float:
    trace = generate(DOMAINS[1], 400, 100, 8, 0)
    policy, done, start = make_policy("goodput", None, LADDER), 0, time.process_time()
    while done < rounds:
        load = Load(trace, tuple(range(400)), batch, min(300_000, 3 * (rounds - done)))
        done += replay(policy, load, CURVES["h200-8b-eagle"]).rounds
    return (time.process_time() - start) * rounds / done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=1_000_000)
    parser.add_argument("--batches", type=int, nargs="+", default=[32], help="of the replay")
    args = parser.parse_args()
    steps = [measure(batch) for batch in (1, 8, 32, 256)]
    replays = [{"batch": b, "rounds": args.rounds, "cpu_s": replay_cpu_s(args.rounds, b)} for b in args.batches]
    if args.json:
        print(json.dumps({"steps": steps, "replays": replays}, indent=1))
        return
    for row in steps:
        print(
            f"batch {row['batch']:>3}: a decision {row['decision_us']:.0f} us, a step's share "
            f"{row['step_us']:.0f} us, 99 of 100 steps under {row['worst_step_us']:.0f} us"
        )
    for got in replays:
        print(f"{args.rounds} rounds at batch {got['batch']}, simulator included: {got['cpu_s']:.1f} s of CPU")


if __name__ == "__main__":
    main()
