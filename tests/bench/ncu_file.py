"""Writes `.ncu-rep` files: NVIDIA publishes the format (extras/FileFormat of Nsight Compute), and no writer.

`NVR\\0`, then length-prefixed protobuf messages: a file header, and per block a header and its kernel results.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

FORMAT_VERSION = 223
Metrics = Mapping[str, float]


def varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def double(field: int, value: float) -> bytes:
    return varint(field << 3 | 1) + struct.pack("<d", value)


def text(field: int, value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return varint(field << 3 | 2) + varint(len(data)) + data


def sized(message: bytes) -> bytes:
    return struct.pack("<I", len(message)) + message


def kernel(name: str, metrics: Metrics, names: list[str]) -> bytes:
    dimensions = b"".join(number(axis, 1) for axis in (1, 2, 3))
    results = b"".join(
        text(13, number(1, names.index(metric)) + text(2, double(3, value))) for metric, value in metrics.items()
    )
    return b"".join((
        *(number(field, 1) for field in (1, 2, 3, 4)), *(text(field, name) for field in (5, 6, 7)), number(8, 3),
        *(text(field, dimensions) for field in (9, 10, 11)), results, number(14, 1_700_000_000), text(15, b""),
        number(16, 0),
    ))  # fmt: skip


def report(kernels: Sequence[tuple[str, Metrics]]) -> bytes:
    names = sorted({metric for _, metrics in kernels for metric in metrics})
    payload = b"".join(sized(kernel(name, metrics, names)) for name, metrics in kernels)
    table = b"".join(text(1, name) for name in names)
    header = b"".join((
        number(1, 0), number(2, len(kernels)), text(3, number(1, 77)), text(4, table), number(5, len(payload)),
        text(6, number(1, 77) + text(2, "127.0.0.1") + text(3, "python3")), number(7, 0),
    ))  # fmt: skip
    return b"NVR\0" + sized(number(1, FORMAT_VERSION)) + sized(header) + payload
