"""Which implementation runs, and the one wording for arguments that no implementation takes."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Literal, NoReturn

import torch

Backend = Literal["triton", "reference"]
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
MAX_SPLITS = 64  # partials the last program of a row combines in one vector


def refuse(name: str, got: object, expected: object) -> NoReturn:
    raise ValueError(f"{name}: got {got}; expected {expected}")


def check_dtype(name: str, tensor: torch.Tensor, dtypes: Collection[torch.dtype]) -> None:
    if not isinstance(tensor, torch.Tensor):
        refuse(name, type(tensor).__name__, "a tensor")
    if tensor.dtype not in dtypes:
        refuse(name, tensor.dtype, " or ".join(str(d) for d in dtypes))


def check_shape(name: str, tensor: torch.Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        refuse(name, f"shape {tuple(tensor.shape)}", f"shape {tuple(shape)}")


def check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        refuse(name, f"device {tensor.device}", f"device {device}, where the first argument is")


def check_buffer(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: Sequence[int], like: torch.Tensor) -> None:
    """A tensor that kernels index as one dense block: exact dtype, shape and device, contiguous."""
    check_dtype(name, tensor, (dtype,))
    check_shape(name, tensor, shape)
    check_device(name, tensor, like.device)
    if not tensor.is_contiguous():
        refuse(name, f"strides {tensor.stride()}", "a contiguous tensor")


def check_logits(name: str, logits: torch.Tensor) -> tuple[int, int]:
    check_dtype(name, logits, FLOATS)
    if logits.dim() != 2:
        refuse(name, f"shape {tuple(logits.shape)}", "shape (rows, vocab)")
    rows, vocab = logits.shape
    if vocab == 0:
        refuse(name, "vocab 0", "a vocabulary of 1 or more")
    return rows, vocab


def choose(tensor: torch.Tensor, backend: Backend | None) -> Backend:
    """CUDA runs Triton, CPU the twin. Anything else has to be asked for, and is refused where it cannot run."""
    if backend not in (None, "triton", "reference"):
        refuse("backend", repr(backend), "None, 'triton' or 'reference'")
    kind = tensor.device.type
    if kind not in ("cuda", "cpu"):
        refuse("device", kind, "cuda or cpu")
    if backend is None:
        return "triton" if kind == "cuda" else "reference"
    if backend == "triton" and kind == "cpu" and not _interpreting():
        refuse("backend", "'triton' with CPU tensors", "CUDA tensors, or TRITON_INTERPRET=1 set before triton loads")
    return backend


def _interpreting() -> bool:
    try:
        import triton
    except ImportError:
        refuse("backend", "'triton' without the triton package", "triton installed")
    return bool(triton.knobs.runtime.interpret)


class Workspace:
    """Scratch of the kernels that split a row over programs: partials, and arrival counters that end each launch at 0.

    Launches that may overlap (other streams, graphs replayed side by side) need a workspace each. A captured graph
    keeps the addresses, so a workspace never shrinks or moves: rows above its size are refused.
    """

    FIELDS = 8

    def __init__(self, rows: int, device: torch.device | str) -> None:
        self.rows = rows
        self.partials = torch.empty(rows * MAX_SPLITS * self.FIELDS, dtype=torch.float32, device=device)
        # One counter a row, and a last one for the rule that looks at the whole batch.
        self.arrivals = torch.zeros(rows + 1, dtype=torch.int32, device=device)

    def fit(self, rows: int, like: torch.Tensor) -> Workspace:
        if rows > self.rows:
            refuse("workspace", f"{self.rows} rows", f"at least {rows} rows")
        check_device("workspace", self.arrivals, like.device)
        return self


_SHARED: dict[tuple[torch.device, int], list[Workspace]] = {}


def workspace_for(tensor: torch.Tensor, rows: int) -> Workspace:
    """The shared workspace of the tensor's device and current stream. Outgrown ones stay: graphs may point at them."""
    stream = torch.cuda.current_stream(tensor.device).cuda_stream if tensor.device.type == "cuda" else 0
    grown = _SHARED.setdefault((tensor.device, stream), [])
    if not grown or grown[-1].rows < rows:
        grown.append(Workspace(max(256, 1 << (rows - 1).bit_length()), tensor.device))
    return grown[-1]


@functools.cache
def programs_wanted(device: torch.device) -> int:
    """Enough programs to fill the device several times over, so that the slowest one costs little."""
    if device.type == "cuda" and torch.cuda.is_available():
        return 8 * int(torch.cuda.get_device_properties(device).multi_processor_count)
    return 8 * 132


def split(rows: int, vocab: int, block: int, programs: int) -> tuple[int, int]:
    """(programs per row, blocks per program); no program is empty."""
    blocks = -(-vocab // block)
    wanted = max(1, min(blocks, MAX_SPLITS, programs // max(rows, 1)))
    per_program = -(-blocks // wanted)
    return -(-blocks // per_program), per_program * block
