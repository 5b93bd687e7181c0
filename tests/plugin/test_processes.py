"""Engines of several processes: identical output, live control, and counters that reach the caller."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROGRAM = """
    import json, sys

    def main():
        import vllm
        from nwor_vllm.plugin import control

        target, draft, prompts, settings = json.loads(sys.argv[1])
        plain = {"model": target, "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True,
                 "max_model_len": 256, "max_num_seqs": 6}
        params = vllm.SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, detokenize=False)
        rows = [{"prompt_token_ids": p} for p in prompts]
        speculative = {"method": "draft_model", "model": draft, "num_speculative_tokens": 5}
        if settings.get("tensor_parallel_size", 1) > 1:
            speculative["draft_tensor_parallel_size"] = settings["tensor_parallel_size"]
        llm = vllm.LLM(**plain, **settings, speculative_config=speculative,
                       additional_config={"nwor": {"policy": "fixed"}})
        found = []
        for rule in ({"policy": "fixed"}, {"early_exit": {"threshold": 0.2}}, {"policy": "off"}, {"policy": "goodput"}):
            control.apply(llm, {**rule, "reset": True})
            tokens = [list(o.outputs[0].token_ids) for o in llm.generate(rows, params, use_tqdm=False)]
            found.append([tokens, control.snapshot(llm)["counters"]])
        try:
            control.apply(llm, {"policy": "fixd"})
            error = ""
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
        theirs = llm.collective_rpc("theirs") if "worker_extension_cls" in settings else []
        print("RESULT" + json.dumps([found, control.workers(llm), error, theirs]))

    if __name__ == "__main__":
        main()
"""

USERS_OWN = """
    from pathlib import Path
    from vllm.v1.core.sched.scheduler import Scheduler

    class Theirs(Scheduler):
        def schedule(self, *args, **kwargs):
            Path(__file__).with_name("scheduled").touch()
            return super().schedule(*args, **kwargs)

    class Extension:
        def theirs(self):
            return self.rank
"""
OWN = {"scheduler_cls": "users_own.Theirs", "worker_extension_cls": "users_own.Extension"}


@pytest.fixture(scope="module")
def truth(tiny, token_prompts, engine_settings):
    from nwor_vllm.bench.backends import vllm as backend

    with backend.engine(tiny[0], None, **engine_settings) as llm:
        return backend.generate(llm, token_prompts, temperature=0.0, max_tokens=24)


def run(tmp_path, tiny, prompts, **settings):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    (tmp_path / "users_own.py").write_text(textwrap.dedent(USERS_OWN))
    argument = json.dumps([str(tiny[0]), str(tiny[1]), [list(p) for p in prompts], settings])
    done = subprocess.run(
        [sys.executable, str(program), argument],
        capture_output=True,
        text=True,
        timeout=900,
        # vLLM binds one rank to a NUMA node each, and this machine may have one.
        env=os.environ
        | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "PYTHONPATH": str(tmp_path)},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, (done.stdout + done.stderr)[-3000:]
    return json.loads(lines[-1].removeprefix("RESULT"))


@pytest.mark.parametrize(
    "settings", [{}, {"tensor_parallel_size": 2} | OWN], ids=["engine core", "tensor parallel, classes of the user"]
)
def test_output_counters_and_control(tmp_path, tiny, truth, token_prompts, settings):
    """The counts of a step are the scheduler's; each rank counts what it wrote itself."""
    found, workers, error, theirs = run(tmp_path, tiny, token_prompts, **settings)
    for tokens, _ in found:
        assert [tuple(t) for t in tokens] == truth
    fixed, cut, off, _ = (counters for _, counters in found)
    assert fixed["accepted_tokens"] > 0 and fixed["tokens_stopped_by_confidence"] == 0
    assert cut["tokens_stopped_by_confidence"] > 0 and cut["verified_tokens"] < fixed["verified_tokens"]
    assert off["drafted_tokens"] == 0 and set(off["length_histogram"]) == {"0"}
    assert error == "ConfigError: unknown policy 'fixd'; did you mean 'fixed'?"
    assert len(workers) == settings.get("tensor_parallel_size", 1)
    assert all(worker == workers[0] for worker in workers)
    assert workers[0]["draft_rows_written"] > 0 and workers[0]["draft_rows_avoided"] > 0
    if "worker_extension_cls" in settings:
        assert theirs == [0, 1]
        assert (tmp_path / "scheduled").exists()
