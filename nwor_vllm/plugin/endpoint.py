"""`GET /nwor` and `POST /nwor` on vLLM's API server: the snapshot, and live changes of settings.

Off unless three things agree: VLLM_PLUGINS names `nwor`, `control_endpoint` is true, and NWOR_CONTROL_TOKEN is set;
callers send the token as `Authorization: Bearer ...`.
"""

from __future__ import annotations

import hmac
import os
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from nwor_vllm.config import load
from nwor_vllm.errors import ConfigError
from nwor_vllm.plugin import control
from nwor_vllm.plugin.compat import log

VARIABLE = "NWOR_CONTROL_TOKEN"
SHORTEST_TOKEN = 16


class ControlEndpoint:
    name = "nwor"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.engine: Any = None
        self.token = ""

    def attach_router(self, app: FastAPI) -> None:
        app.add_api_route("/nwor", self.read, methods=["GET"])
        app.add_api_route("/nwor", self.change, methods=["POST"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        config = load(getattr(args, "additional_config", None), os.environ)
        token = os.environ.get(VARIABLE, "")
        if config is None or not config.control_endpoint or engine_client is None:
            return
        if len(token) < SHORTEST_TOKEN:
            log.warning("nwor: POST /nwor stays off: set %s to at least %d characters", VARIABLE, SHORTEST_TOKEN)
            return
        self.engine, self.token = engine_client, token

    async def read(self, request: Request) -> JSONResponse:
        return self._refusal(request) or JSONResponse(await control.call_async(self.engine, {}))

    async def change(self, request: Request) -> JSONResponse:
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        try:
            change = await request.json()
        except ValueError as error:
            return JSONResponse({"error": f"the body is no JSON: {error}"}, status_code=400)
        try:
            if not isinstance(change, dict):
                raise ConfigError(f"the body is {change!r}; expected an object of settings")
            return JSONResponse(await control.call_async(self.engine, change))
        except ConfigError as error:
            return JSONResponse({"error": str(error)}, status_code=400)

    def _refusal(self, request: Request) -> JSONResponse | None:
        if self.engine is None:
            return JSONResponse({"error": "the control endpoint is off"}, status_code=404)
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), self.token.encode()):
            return JSONResponse({"error": f"send {VARIABLE} as a bearer token"}, status_code=401)
        return None
