"""Triton decides at import whether its functions are interpreted, so those tests run in processes of their own."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
