"""Tables of the measured delay, for the terminal and as Markdown."""

import sys
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cdc_mmpg.benchmarks.delay_cells import ANSWER_STAGES, FAR_RATE, IDLE_PAUSE_SECONDS
from cdc_mmpg.wire.messages import UPLOAD_BYTES

CELL_COLUMNS = ("layer", "kind", "MiB/s", "payload", "on the link", "paper up", "paper down", "floor", "whole p50",
                "p99", "compute", "transfer", "/ floor", "verify")  # fmt: skip
FAR_COLUMNS = ("layer", "kind", "connection", "payload", "whole p50", "p99", "compute", "transfer", "round trips")
TEXT_COLUMNS = ("layer", "kind", "connection", "bundle")
CONNECTION_NAMES = {"each": "new", "idle": f"kept, idle {IDLE_PAUSE_SECONDS} s", "kept": "kept"}


def format_cell(cell: dict[str, Any]) -> list[str]:
    """Format a cell as a row of the first table."""
    link = f"{cell['link_up_bytes']:,.0f} + {cell['link_down_bytes']:,.0f}"
    times = ("paper_up_ms", "paper_down_ms", "floor_ms", "whole_p50_ms", "whole_p99_ms", "compute_ms", "transfer_ms")
    return [
        f"{cell['case']}, {cell['outputs']}", cell["kind"], str(cell["rate_mib_s"]), f"{cell['payload_bytes']:,}",
        link, *(f"{cell[name]:.2f}" if cell[name] < 10 else f"{cell[name]:.1f}" for name in times),
        f"{cell['transfer_by_floor']:.2f}", f"{cell['verify_ms']:.2f}",
    ]  # fmt: skip


def explain_cells(result: dict[str, Any]) -> list[str]:
    """Return the remarks below the first table."""
    where = "Two network namespaces, a veth pair, a token bucket (tbf) at both ends"
    counted = "the kernel's count, with Ethernet headers and acknowledgements"
    if result["link"] == "proxy":
        where = "A throttling proxy on the loopback device"
        where += f" ({result['why']})" if result["why"] else " (--proxy)"
        counted = "bytes that passed the proxy, with HTTP's headers, but TCP's not"
    machine = result["machine"]
    return [
        f"{where}; {result['requests']} requests per row over a kept connection, after one warm-up request.",
        f"Random weights; uploads of {UPLOAD_BYTES} bytes, layers of payload + 132. On the link, up + down: {counted}.",
        "Times in ms. Paper: 768 bytes and the payload, divided by the rate. Floor: bytes on the link, divided by the "
        "rate. Transfer: median of whole - compute (generate and wait, as the service reports). Acknowledgements count "
        "in the floor but pass in parallel: the transfer may be up to 3 % below it.",
        f"{machine['processors']} x {machine['processor']}, Linux {machine['kernel']}, "
        f"{machine.get('tcp_congestion_control', 'unknown congestion control')}; {result['made']}, "
        f"commit {result['commit']}.",
    ]


def format_far_cell(cell: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """Format a cell of the series with delay as a row; round trips are (transfer - payload / rate) / (2 delays)."""
    trips = (cell["transfer_ms"] - cell["paper_down_ms"]) / (2000 * result["delay"]["seconds_each_way"])
    return [
        f"{cell['case']}, {cell['outputs']}", cell["kind"], CONNECTION_NAMES[cell["connection"]],
        f"{cell['payload_bytes']:,}", f"{cell['whole_p50_ms']:.1f}", f"{cell['whole_p99_ms']:.1f}",
        f"{cell['compute_ms']:.1f}", f"{cell['transfer_ms']:.1f}", f"{trips:.1f}",
    ]  # fmt: skip


def explain_far_cells(result: dict[str, Any]) -> str:
    """Return the remark below the second table."""
    delay = result["delay"]
    link = f"{1000 * delay['seconds_each_way']:.0f} ms each way at {delay['rate_mib_s']} MiB/s, "
    if delay["link"] == "TUN":
        return link + "packets delayed between two TUN devices. Round trips: (transfer - payload / rate) / 40 ms."
    return link + (
        "delayed by the proxy, which terminates TCP connections: handshakes and small initial windows cost no round "
        "trips here, so these figures do not include them."
    )


def build_tables(result: dict[str, Any]) -> list[tuple[tuple[str, ...], list[list[str]], list[str]]]:
    """Build columns, rows and remarks of all tables."""
    far = [format_far_cell(cell, result) for cell in result["delay"]["cells"]]
    tables = [
        (CELL_COLUMNS, [format_cell(cell) for cell in result["cells"]], explain_cells(result)),
        (FAR_COLUMNS, far, [explain_far_cells(result)]),
    ]
    if answers := result["answers"]:
        tables.append(
            (
                ("bundle", *ANSWER_STAGES, "whole p50", "p99"),
                [
                    [answer["name"], *(f"{answer['stages_ms'][stage]:.2f}" for stage in ANSWER_STAGES),
                     f"{answer['whole_p50_ms']:.1f}", f"{answer['whole_p99_ms']:.1f}"]
                    for answer in answers
                ],
                [f"Answers of the device client, each with a new layer, at {FAR_RATE} MiB/s: medians in ms. Generate "
                 "is the cloud's time; upload and download are the transfers."],
            )
        )  # fmt: skip
    return tables


def format_page(result: dict[str, Any]) -> str:
    """Format all tables as Markdown."""
    lines = ["# The time delay, measured", ""]
    for columns, rows, remarks in build_tables(result):
        lines += [*remarks, ""]
        aligned = ["---" if column in TEXT_COLUMNS else "---:" for column in columns]
        lines += [f"| {' | '.join(cells)} |" for cells in (columns, aligned)]
        lines += [f"| {' | '.join(cells)} |" for cells in rows]
        lines.append("")
    return "\n".join(lines)


def print_tables(result: dict[str, Any]) -> None:
    """Print all tables on the terminal."""
    console = Console(width=None if sys.stdout.isatty() else 180, markup=False, emoji=False)  # names may hold brackets
    for columns, rows, remarks in build_tables(result):
        table = Table(box=SIMPLE_HEAD)
        for column in columns:
            table.add_column(column, justify="left" if column in TEXT_COLUMNS else "right")
        for cells in rows:
            table.add_row(*cells)
        console.print(table)
        console.print("\n".join(remarks), highlight=False, soft_wrap=True)
