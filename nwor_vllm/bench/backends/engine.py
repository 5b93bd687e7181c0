"""The measuring driver over a real vLLM engine: requests in as they fall due, timestamps and counters out."""

from __future__ import annotations

import gc
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nwor_vllm.bench import provenance
from nwor_vllm.bench.grid import Cell, Engine
from nwor_vllm.bench.metrics import Counters, RequestResult
from nwor_vllm.bench.workload import Prompt
from nwor_vllm.errors import ConfigError
from nwor_vllm.plugin import control

MEMORY = "nwor_vllm.bench.backends.memory.PeakMemory"
TOP = 5  # tokens whose probability is asked for where two arms' outputs part


def open_engine(engine: Engine) -> VllmDriver:
    return VllmDriver(engine)


def arguments(engine: Engine) -> dict[str, Any]:
    """As vLLM's `LLM` takes them. No prefix cache: the second arm would find the first arm's prompts in it."""
    given: dict[str, Any] = {
        "model": provenance.model_path(engine.target), "tensor_parallel_size": engine.tensor_parallel_size,
        "max_model_len": engine.max_model_len, "max_num_seqs": engine.max_num_seqs, "dtype": engine.dtype,
        "enforce_eager": engine.enforce_eager, "gpu_memory_utilization": engine.gpu_memory_utilization,
        "enable_prefix_caching": False, "disable_log_stats": False, "seed": 0, "worker_extension_cls": MEMORY,
    }  # fmt: skip
    if engine.method == "none" or engine.draft_length == 0:
        return given
    speculative: dict[str, Any] = {"method": engine.method, "num_speculative_tokens": engine.draft_length}
    if engine.method == "ngram":
        speculative["prompt_lookup_max"] = 4
    else:
        speculative["model"] = provenance.model_path(engine.drafter)
    given |= {"speculative_config": speculative, "per_request_spec_decode_metrics": "detailed"}
    if not engine.elastic:
        return given
    return given | {"additional_config": {"nwor": {"policy": "fixed", "ladder": list(engine.ladder)}}}


@dataclass(frozen=True, slots=True)
class Due:
    """A request, and when after the start of its batch it arrives."""

    id: str
    arrival_s: float
    prompt: Any
    params: Any


@dataclass(frozen=True, slots=True)
class Served:
    output: Any
    sent: float  # by the engine core's clock, time.monotonic


def serve(
    engine: Any, requests: Sequence[Due], limit: int | None, open_loop: bool,
    clock: Callable[[], float] = time.monotonic, wait: Callable[[float], None] = time.sleep,
) -> tuple[float, dict[str, Served]]:  # fmt: skip
    """Each request goes in at the first step boundary after it is due, and its times count from when it was due.

    In a closed loop every user has one request: it counts from when it is sent, as a place in flight becomes free. An
    engine takes requests up between steps, so nothing waits here but while the engine has nothing to do.
    """
    started, offset = clock(), time.time() - time.monotonic()
    waiting, sent, done = deque(requests), dict[str, float](), dict[str, Served]()
    while waiting or len(done) < len(sent):
        while waiting and (limit is None or len(sent) - len(done) < limit):
            now = clock()
            due = started + waiting[0].arrival_s
            if due > now:
                break
            item = waiting.popleft()
            sent[item.id] = due if open_loop else now
            engine.add_request(item.id, item.prompt, item.params, arrival_time=sent[item.id] + offset)
        if len(done) == len(sent):
            wait(max(started + waiting[0].arrival_s - clock(), 0.0))
            continue
        for output in engine.step():
            if output.finished:
                done[output.request_id] = Served(output, sent[output.request_id])
    return clock() - started, done


class VllmDriver:
    def __init__(self, engine: Engine, extra: Mapping[str, Any] | None = None) -> None:
        # In this process the switch between arms is a function call and memory is measured where it is used.
        if engine.tensor_parallel_size == 1:
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        if not provenance.gpus():
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        import vllm
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        self.engine = engine
        self.llm: Any = vllm.LLM(**arguments(engine), **(extra or {}))
        self.sampling: Any = vllm.SamplingParams
        self.final: Any = RequestOutputKind.FINAL_ONLY
        self.tokens_input: Any = tokens_input
        self.served = 0
        self.tokenizer: Any = self.llm.get_tokenizer()
        self.speculates = engine.elastic
        self.learnt: dict[str, Any] = {}  # an arm's policy goes on where it stopped, not from nothing
        self.current: str | None = None

    def switch(self, setting: Mapping[str, Any]) -> None:
        if not self.speculates:
            return
        name = repr(sorted(setting.items()))
        if name == self.current:
            return
        if self.current is not None:
            self.learnt[self.current] = control.snapshot(self.llm)["policy"]
        change = dict(setting)
        if name in self.learnt:
            change["restore"] = self.learnt[name]
        control.apply(self.llm, change)
        self.current = name

    def generate(self, prompts: Sequence[Prompt], cell: Cell) -> tuple[float, list[RequestResult]]:
        due = [
            Due(f"due{i}", prompt.arrival_s, self._input(prompt, cell), self._sampling(prompt, cell))
            for i, prompt in enumerate(prompts, self.served)
        ]
        self.served += len(due)
        gc.collect()
        seconds, done = serve(self.llm.llm_engine, due, cell.max_concurrency, cell.request_rate != "inf")
        seen = control.snapshot(self.llm)["requests"] if self.speculates else {}
        # The engine core knows a request by the frontend's id and a random suffix.
        rounds = {name.rpartition("-")[0] or name: counts for name, counts in seen.items()} | seen
        return seconds, [
            _result(prompt, done[item.id], rounds.get(item.id, {})) for prompt, item in zip(prompts, due, strict=True)
        ]

    def top_logprobs(self, texts: Sequence[tuple[Prompt, Sequence[int]]], cell: Cell) -> list[dict[int, float]]:
        rows = [{"prompt_token_ids": [*self._tokens(prompt, cell), *more]} for prompt, more in texts]
        asked = self.sampling(temperature=0.0, max_tokens=1, logprobs=TOP)
        found = self.llm.generate(rows, asked, use_tqdm=False)
        return [{token: p.logprob for token, p in output.outputs[0].logprobs[0].items()} for output in found]

    def dtype(self) -> str:
        return str(self.llm.llm_engine.model_config.dtype).removeprefix("torch.")

    def _input(self, prompt: Prompt, cell: Cell) -> Any:
        return self.tokens_input(self._tokens(prompt, cell))

    def _tokens(self, prompt: Prompt, cell: Cell) -> list[int]:
        if getattr(self.tokenizer, "chat_template", None):
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt.text}], tokenize=False, add_generation_prompt=True
            )
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = self.tokenizer(prompt.text)["input_ids"]
        if len(ids) + cell.max_tokens > self.engine.max_model_len:
            raise ConfigError(
                f"prompt {prompt.id} has {len(ids)} tokens; with max_tokens {cell.max_tokens} it exceeds "
                f"max_model_len {self.engine.max_model_len}"
            )
        return list(ids)

    def _sampling(self, prompt: Prompt, cell: Cell) -> Any:
        sampled = cell.temperature > 0
        return self.sampling(
            temperature=cell.temperature, top_p=cell.top_p if sampled else 1.0, max_tokens=cell.max_tokens,
            seed=prompt.seed if sampled else None, ignore_eos=cell.ignore_eos, output_kind=self.final,
        )  # fmt: skip

    def counters(self) -> Counters | None:
        if not self.speculates:
            return None
        state = control.snapshot(self.llm)
        control.apply(self.llm, {"reset": True})
        return counters_of(state)

    def peak_memory_bytes(self) -> tuple[int | None, str]:
        """Of the largest worker, asked where the model runs: in this process or another."""
        return max(self.llm.collective_rpc("nwor_peak_memory_bytes")), ""

    def close(self) -> None:
        core = self.llm.llm_engine.engine_core
        core.shutdown()
        self.llm = None
        gc.collect()
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()


def counters_of(state: Mapping[str, Any]) -> Counters:
    """The plugin's snapshot in our words."""
    c = state["counters"]
    return Counters(
        rounds=c["rounds"], drafted=c["drafted_tokens"], verified=c["verified_tokens"], accepted=c["accepted_tokens"],
        accepted_per_position=tuple(c["accepted_per_position"]), stopped=c["tokens_stopped_by_confidence"],
        trimmed=c["drafted_tokens"] - c["verified_tokens"], draft_forwards=c["draft_forwards"],
        k_histogram={int(k): n for k, n in c["length_histogram"].items()},
        draft_kv_bytes_written=c["draft_kv_bytes_written"], draft_kv_bytes_avoided=c["draft_kv_bytes_avoided"],
        target_kv_bytes_written=c["target_kv_bytes_written"], target_kv_bytes_avoided=c["target_kv_bytes_avoided"],
        cost_model_error=state["policy_metrics"].get("cost_error"),
    )  # fmt: skip


def _result(prompt: Prompt, served: Served, counts: Mapping[str, int]) -> RequestResult:
    output = served.output
    done, stats, speculation = output.outputs[0], output.metrics, output.outputs[0].spec_decode_metrics
    tokens = tuple(done.token_ids)
    ttft = tpot = latency = queued = None
    if stats is not None and stats.first_token_latency:
        ttft = float(stats.first_token_latency)
        decode = float(stats.last_token_ts - stats.first_token_ts)
        latency = ttft + decode
        tpot = decode / (len(tokens) - 1) if len(tokens) > 1 else None
        queued = max(float(stats.scheduled_ts) - served.sent, 0.0)
    rounds = None
    if speculation is not None:
        rounds = tuple(zip(speculation.per_step_drafted, speculation.per_step_accepted, strict=True))
    return RequestResult(
        prompt.id, tokens, str(done.finish_reason), ttft, tpot, latency, len(output.prompt_token_ids), done.text,
        counts.get("rounds"), counts.get("drafted"), counts.get("accepted"), rounds, prompt.arrival_s, queued,
    )  # fmt: skip
