"""`nwor record`: acceptance traces from real vLLM on the embedded pair, one file per domain, temperature and batch.

Two walks over the same prompts. The first drafts the full length at every output position and verifies nothing, so that
every position has its draft; its acceptance is read off the text that came out. The second serves rounds of the full
length: at temperature 0 it must emit the same text in exactly the rounds that a replay of the trace has, which is
checked and kept in the file.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from nwor_vllm import zoo
from nwor_vllm.bench import provenance, traces
from nwor_vllm.bench.grid import digest
from nwor_vllm.errors import ConfigError, CorruptFileError, MissingError
from nwor_vllm.zoo import store

METHODS = {"eagle": "eagle", "eagle3": "eagle3", "draft": "draft_model"}
REQUESTS = {1: 8, 4: 24, 16: 64}  # by batch; small batches are slow


@dataclass(frozen=True)
class Recording:
    """What a file holds; the same again is not recorded twice."""

    target: str
    drafter: str
    k: int
    domain: str
    temperature: float
    batch: int
    requests: int
    max_tokens: int
    seed: int
    dtype: str = "float32"

    @property
    def file(self) -> str:
        return f"{self.domain}-t{self.temperature:g}-b{self.batch}.npz"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("outputs/traces"), help="folder (default outputs/traces)")
    parser.add_argument("--domains", nargs="+", default=list(zoo.DOMAINS), help="kinds of prompts (default: all)")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 0.7, 1.0], help="default 0 0.7 1.0")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16], help="requests in flight; default 1 4 16")
    parser.add_argument("--requests", type=int, default=0, help="per file (default: 8, 24 or 64, by batch)")
    parser.add_argument("--max-tokens", type=int, default=96, help="per request (default 96)")
    parser.add_argument("--k", type=int, default=15, help="full draft length (default 15)")
    parser.add_argument("--target", default="target", help="target, wide or wider")
    parser.add_argument("--drafter", default="eagle", choices=METHODS, help="default eagle")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16"], help="default float32: no near ties to round"
    )
    parser.add_argument("--seed", type=int, default=1, help="of prompts and sampling")
    parser.add_argument("--redo", action="store_true", help="record anew what is there already")


def run(args: argparse.Namespace) -> int:
    todo = [r for r in _recordings(args) if args.redo or not _done(r, args.out)]
    args.out.mkdir(parents=True, exist_ok=True)
    if not todo:
        print(f"{args.out}: everything is recorded")
        return 0
    command = shlex.join(["nwor", "record", *sys.argv[2:]])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from nwor_vllm.bench.backends import drafts

    first = todo[0]
    method, drafter = METHODS[first.drafter], f"zoo:{first.drafter}"
    with drafts.watched(
        f"zoo:{first.target}", method, drafter, first.k, max(r.batch for r in todo), dtype=first.dtype
    ) as llm:
        for number, recording in enumerate(todo, 1):
            trace = record(llm, recording, command)
            traces.save(trace, args.out / recording.file)
            about = trace.about
            rounds = "" if about["rounds_differ"] is None else f", {about['rounds_differ']} rounds differ when served"
            print(
                f"[{number}/{len(todo)}] {recording.file}: {trace.requests} requests, {len(trace.accepted)} positions, "
                f"tau {about['tau_replayed']:.2f} replayed, {about['tau_served']:.2f} served{rounds}",
                flush=True,
            )
    return 0


def _recordings(args: argparse.Namespace) -> Iterator[Recording]:
    if min(args.batches) < 1 or args.requests < 0 or args.max_tokens < 2 or args.k < 1 or min(args.temperatures) < 0:
        raise ConfigError(
            "--batches and --k count from 1, --max-tokens from 2, --requests and --temperatures from 0; one is less"
        )
    for domain in args.domains:
        zoo.prompts(domain, 1)  # an unknown name is an error before an engine starts
    for batch in sorted(args.batches, reverse=True):  # the quick ones first
        requests = args.requests or REQUESTS.get(batch, max(16, 2 * batch))
        for domain in args.domains:
            for temperature in args.temperatures:
                yield Recording(
                    args.target, args.drafter, args.k, domain, temperature, batch, requests, args.max_tokens, args.seed,
                    args.dtype,
                )  # fmt: skip


def _done(recording: Recording, folder: Path) -> bool:
    try:
        found = traces.load(folder / recording.file)
    except (MissingError, CorruptFileError):
        return False
    return bool({"dtype": "float32"} | found.about.get("recording", {}) == asdict(recording))


def record(llm: Any, r: Recording, command: str) -> traces.Trace:
    """Both walks; the trace of the first, checked against the second."""
    from nwor_vllm.bench.backends import drafts

    prompts = chats(r)
    sampling = [
        {"temperature": r.temperature, "max_tokens": r.max_tokens, "seed": r.seed * 1000 + i} for i in range(r.requests)
    ]
    drafted = drafts.walk(llm, prompts, sampling, r.k, r.batch, verify=False)
    served = drafts.walk(llm, prompts, sampling, r.k, r.batch, verify=True)
    usable = [i for i in range(r.requests) if len(drafted.texts[i]) > 1]
    accepted, confidence, starts = [], [], [0]
    for i in usable:
        kept, shown = positions(drafted.texts[i], drafted.drafts[i], r.k)
        accepted.append(kept)
        confidence.append(shown)
        starts.append(starts[-1] + len(kept))
    trace = traces.Trace(
        starts=np.array(starts, np.int64),
        accepted=np.concatenate(accepted),
        confidence=np.concatenate(confidence),
        categories=(r.domain,) * len(usable),
        steps=np.array([row for walk in (drafted, served) for row in step_rows(walk.steps)]),
        about={
            "recording": asdict(r), "command": command, "pair": pair(r), "dtype": r.dtype,
            "draft_sample_method": "greedy", "versions": provenance.versions(), "hardware": provenance.hardware(),
            "git": provenance.git()["sha"],
        },
    )  # fmt: skip
    replayed = [replayed_rounds(trace, row) for row in range(len(usable))]
    rounds = [[min(x.accepted, len(drafted.texts[i])) for x in served.rounds.get(i, [])] for i in usable]
    same = drafted.texts == served.texts
    differ = sum(a[:-1] != b[:-1] for a, b in zip(replayed, rounds, strict=True)) if r.temperature == 0 else None
    trace.about.update(
        tau_replayed=1 + statistics.fmean(x for row in replayed for x in row[:-1] or row),
        tau_served=1 + statistics.fmean(x for row in rounds for x in row[:-1] or row),
        text_same=same if r.temperature == 0 else None,
        rounds_differ=differ,  # requests whose served rounds are not the replayed ones
    )
    return trace


def pair(r: Recording) -> str:
    """Which weights drafted: a widened target is the target's."""
    members = {"target" if store.MEMBERS[r.target].ffn else r.target, r.drafter}
    sums = store.checksums(store.weights_root())
    return digest({file: value for file, value in sums.items() if file.partition("/")[0] in members})[:16]


def chats(r: Recording) -> list[tuple[int, ...]]:
    """Token ids of the prompts; other ones for every batch, so that the files of a domain add up."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(zoo.path(r.target)))
    rows = zoo.prompts(r.domain, r.requests, r.seed * 1000 + r.batch)
    return [
        tuple(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_dict=False
            )
        )
        for row in rows
    ]


def positions(text: Sequence[int], drafted: Sequence[Any], k: int) -> tuple[Any, Any]:
    """Drafts kept, and confidences, of a round that starts after 1, 2, ... tokens of `text`."""
    if [d.at for d in drafted] != list(range(1, len(text))):
        raise CorruptFileError(f"{len(text)} tokens came out but {len(drafted)} drafts were seen: not one at each")
    kept = np.zeros(len(drafted), np.int64)
    shown = np.full((len(drafted), k), np.nan)
    for row, draft in enumerate(drafted):
        rest = text[draft.at :]
        kept[row] = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(draft.tokens, rest, strict=False)))
        shown[row, : len(draft.confidence)] = draft.confidence
    return kept, shown


def replayed_rounds(trace: traces.Trace, request: int) -> list[int]:
    """Drafts kept in each round when every round has the full length."""
    at, end, out = int(trace.starts[request]), int(trace.starts[request + 1]), []
    while at < end:
        out.append(int(trace.accepted[at]))
        at += out[-1] + 1
    return out


def step_rows(steps: Sequence[Any]) -> Iterator[tuple[float, ...]]:
    """Decode steps: requests, verified tokens, draft steps, context, seconds."""
    for s in steps:
        if s.requests and not s.prefill_tokens and s.seconds > 0:
            yield s.requests, s.verified_tokens, s.draft_steps, s.context_tokens, s.seconds
