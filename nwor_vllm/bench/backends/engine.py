"""The measuring driver over a real vLLM engine: batches in, the engine's own timestamps and our counters out."""

from __future__ import annotations

import gc
import importlib
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from nwor_vllm.bench import provenance
from nwor_vllm.bench.grid import Cell, Engine
from nwor_vllm.bench.metrics import Counters, RequestResult
from nwor_vllm.bench.workload import Prompt
from nwor_vllm.errors import ConfigError
from nwor_vllm.plugin import control

EMPTY: dict[str, Any] = {"policy": "fixed"}


def open_engine(engine: Engine) -> VllmDriver:
    return VllmDriver(engine)


def arguments(engine: Engine) -> dict[str, Any]:
    """As vLLM's `LLM` takes them. No prefix cache: the second arm would find the first arm's prompts in it."""
    given: dict[str, Any] = {
        "model": provenance.model_path(engine.target), "tensor_parallel_size": engine.tensor_parallel_size,
        "max_model_len": engine.max_model_len, "max_num_seqs": engine.max_num_seqs, "dtype": engine.dtype,
        "enforce_eager": engine.enforce_eager, "gpu_memory_utilization": engine.gpu_memory_utilization,
        "enable_prefix_caching": False, "disable_log_stats": False, "seed": 0,
    }  # fmt: skip
    if engine.method == "none" or engine.draft_length == 0:
        return given
    speculative: dict[str, Any] = {"method": engine.method, "num_speculative_tokens": engine.draft_length}
    if engine.method == "ngram":
        speculative["prompt_lookup_max"] = 4
    else:
        speculative["model"] = provenance.model_path(engine.drafter)
    return given | {"speculative_config": speculative, "additional_config": {"nwor": EMPTY}}


class VllmDriver:
    def __init__(self, engine: Engine, extra: Mapping[str, Any] | None = None) -> None:
        # In this process the switch between arms is a function call and memory is measured where it is used.
        if engine.tensor_parallel_size == 1:
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        if not provenance.gpus():
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        vllm: Any = importlib.import_module("vllm")
        self.engine = engine
        self.llm: Any = vllm.LLM(**arguments(engine), **(extra or {}))
        self.sampling: Any = vllm.SamplingParams
        self.tokenizer: Any = self.llm.get_tokenizer()
        self.speculates = engine.method != "none" and engine.draft_length > 0
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
        rows = [{"prompt_token_ids": self._tokens(prompt, cell)} for prompt in prompts]
        params = [self._sampling(prompt, cell) for prompt in prompts]
        gc.collect()
        started = time.perf_counter()
        outputs = self.llm.generate(rows, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        seen = control.snapshot(self.llm)["requests"] if self.speculates else {}
        # The engine core knows a request by the frontend's id and a random suffix.
        rounds = {name.rpartition("-")[0] or name: counts for name, counts in seen.items()} | seen
        return seconds, [
            _result(prompt, output, rounds.get(output.request_id, {}))
            for prompt, output in zip(prompts, outputs, strict=True)
        ]

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
            seed=prompt.seed if sampled else None, ignore_eos=cell.ignore_eos,
        )  # fmt: skip

    def counters(self) -> Counters | None:
        if not self.speculates:
            return None
        state = control.snapshot(self.llm)
        control.apply(self.llm, {"reset": True})
        return counters_of(state)

    def peak_memory_bytes(self) -> tuple[int | None, str]:
        if not provenance.gpus():
            # Linux counts kilobytes, macOS bytes.
            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, ""
        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
            return None, "the engine runs in other processes"
        torch: Any = importlib.import_module("torch")
        return int(torch.cuda.max_memory_allocated()), ""

    def close(self) -> None:
        core = self.llm.llm_engine.engine_core
        core.shutdown()
        self.llm = None
        gc.collect()
        distributed: Any = importlib.import_module("vllm.distributed")
        distributed.cleanup_dist_env_and_memory()


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


def _result(prompt: Prompt, output: Any, counts: Mapping[str, int]) -> RequestResult:
    done, stats = output.outputs[0], output.metrics
    tokens = tuple(done.token_ids)
    ttft = tpot = latency = None
    if stats is not None and stats.first_token_latency:
        ttft = float(stats.first_token_latency)
        decode = float(stats.last_token_ts - stats.first_token_ts)
        latency = ttft + decode
        tpot = decode / (len(tokens) - 1) if len(tokens) > 1 else None
    return RequestResult(
        prompt.id, tokens, str(done.finish_reason), ttft, tpot, latency, len(output.prompt_token_ids), done.text,
        counts.get("rounds"), counts.get("drafted"), counts.get("accepted"),
    )  # fmt: skip
