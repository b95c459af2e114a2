"""Cells of the delay measurement: generators, rates, and the figures of one kind of layer over one link (a cell).

payload     bytes of the layer's numbers; the paper's delay is 768 bytes up and the payload down, divided by the rate
whole       time from the first byte of the request to the last of the reply, at the client
compute     part of it that the service reports for generating and queueing
transfer    rest of it: the link, HTTP, TCP, the processes
floor       bytes that the kernel counted on the link, with all headers and acknowledgements, divided by the rate
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cdc_mmpg.benchmarks.links import MIB, LinkCounts
from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.wire.messages import UPLOAD_BYTES, LayerKind, Layout

LINK_RATES = (5, 15, 50, 100)  # MiB/s
FAR_RATE = 15  # MiB/s in the series with delay and of complete answers
FAR_DELAY_SECONDS = 0.02  # each way
IDLE_PAUSE_SECONDS = 0.5  # longer than TCP's timeout, after which a congestion window may shrink
ANSWER_STAGES = ("decode", "encode", "anchor", "upload", "generate", "download", "verify", "swap", "answer")


class DelayCase(NamedTuple):
    """A generator, and the kinds of layers that are requested from it."""

    name: str
    outputs: int
    inputs: int = 96
    native: LayerKind = "float32"
    number: int = 0  # rank for low_rank, number of layers for basis
    kinds: tuple[LayerKind, ...] = ("float32",)

    def layout(self, kind: LayerKind) -> Layout:
        """Return the layout of a requested layer."""
        return Layout(kind, self.outputs, self.inputs + 1, self.number if kind == self.native else 0)


DELAY_CASES = (
    DelayCase("msrvtt_qa", 1501, kinds=("float32", "float16", "int8")),
    DelayCase("msvd_qa", 1001),
    DelayCase("tgif", 1541),
    DelayCase("multiple choice", 1, 192),
    DelayCase("msrvtt_qa", 1501, native="low_rank", number=4, kinds=("low_rank",)),
    DelayCase("msrvtt_qa", 1501, native="basis", number=8, kinds=("basis",)),
)


def divide_by_rate(count_bytes: int, rate: float) -> float:
    """Return the paper's delay in milliseconds: bytes divided by a rate in MiB/s."""
    return 1000 * count_bytes / (rate * MIB)


def summarise_cell(
    case: DelayCase, kind: LayerKind, rate: int, replies: Sequence[dict[str, float]], passed: LinkCounts
) -> dict[str, Any]:
    """Summarise the requests for one kind of layer over one link; times are in milliseconds.

    Args:
        case: generator of the layers.
        kind: kind of the layers.
        rate: rate of the link in MiB/s.
        replies: milliseconds "whole", "compute" and "verify" of each request.
        passed: bytes and packets that passed the link during the requests.
    """
    layout = case.layout(kind)
    whole, compute, verify = (np.array([reply[name] for reply in replies]) for name in ("whole", "compute", "verify"))
    up, down = passed.up_bytes / len(replies), passed.down_bytes / len(replies)
    floor = 1000 * (up + down) / (rate * MIB)
    transfer = float(np.median(whole - compute))
    return {
        "case": case.name,
        "kind": kind,
        "outputs": case.outputs,
        "rate_mib_s": rate,
        "payload_bytes": layout.payload_bytes,
        "message_bytes": layout.message_bytes,
        "upload_bytes": UPLOAD_BYTES,
        "link_up_bytes": up,
        "link_down_bytes": down,
        "link_packets": (passed.up_packets + passed.down_packets) / len(replies),
        "dropped": passed.dropped,
        "paper_up_ms": divide_by_rate(4 * FEATURE_DIM, rate),
        "paper_down_ms": divide_by_rate(layout.payload_bytes, rate),
        "floor_ms": floor,
        "whole_p50_ms": float(np.percentile(whole, 50)),
        "whole_p99_ms": float(np.percentile(whole, 99)),
        "compute_ms": float(np.median(compute)),
        "transfer_ms": transfer,
        "verify_ms": float(np.median(verify)),
        "transfer_by_floor": transfer / floor,
        "requests": list(replies),
    }
