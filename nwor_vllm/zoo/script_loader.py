"""vLLM's load format `scripted`: fills a scripted pair's tensors on the device, so that no large file is written.

The one module of the zoo that imports vllm. Importing it registers the format. Worker processes import it when vLLM is
started with `--worker-extension-cls nwor_vllm.zoo.script_loader.ScriptedWorker --load-format scripted`; code that runs
the engine in its own process can call `register()` instead.
"""

from __future__ import annotations

from pathlib import Path

import torch
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import get_model_loader, register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from nwor_vllm.errors import MissingError
from nwor_vllm.zoo.scripted import DRAFTER, TARGET, load_scripted

LOAD_FORMAT = "scripted"


class ScriptedModelLoader(BaseModelLoader):  # type: ignore[misc]
    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing to fetch: the directory's script.json says it all."""

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        path = Path(model_config.model)
        if path.name not in (TARGET, DRAFTER):
            raise MissingError(f"load format {LOAD_FORMAT}: {path} is not the {TARGET} or {DRAFTER} of a scripted pair")
        device = next(model.parameters()).device
        model.load_weights(load_scripted(path.parent).tensors(path.name, device))  # type: ignore[operator]


def register() -> None:
    """Idempotent, because vLLM warns when a format is registered twice."""
    try:
        get_model_loader(LoadConfig(load_format=LOAD_FORMAT))
    except ValueError:
        register_model_loader(LOAD_FORMAT)(ScriptedModelLoader)


class ScriptedWorker:
    """A worker extension that adds nothing: naming it makes every worker import this module."""


register()
