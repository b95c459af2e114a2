"""The measured delay as tables: on the terminal, and as Markdown."""

import sys
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cdc_mmpg.benchmarks.delay_cells import ANSWER_STAGES, FAR_RATE, PAUSE_SECONDS
from cdc_mmpg.wire.messages import UPLOAD_BYTES

CELL_COLUMNS = ("layer", "kind", "MiB/s", "payload", "on the link", "paper up", "paper down", "floor", "whole p50",
                "p99", "compute", "transfer", "/ floor", "verify")  # fmt: skip
FAR_COLUMNS = ("layer", "kind", "connection", "payload", "whole p50", "p99", "compute", "transfer", "round trips")
TEXT_COLUMNS = ("layer", "kind", "connection", "bundle")
CONNECTION_NAMES = {"each": "new", "idle": f"kept, idle {PAUSE_SECONDS} s", "kept": "kept"}


def format_cell(found: dict[str, Any]) -> list[str]:
    """Return a cell as a row of the first table."""
    link = f"{found['link_up_bytes']:,.0f} + {found['link_down_bytes']:,.0f}"
    times = ("paper_up_ms", "paper_down_ms", "floor_ms", "whole_p50_ms", "whole_p99_ms", "compute_ms", "transfer_ms")
    return [
        f"{found['case']}, {found['outputs']}", found["kind"], str(found["rate_mib_s"]), f"{found['payload_bytes']:,}",
        link, *(f"{found[name]:.2f}" if found[name] < 10 else f"{found[name]:.1f}" for name in times),
        f"{found['transfer_by_floor']:.2f}", f"{found['verify_ms']:.2f}",
    ]  # fmt: skip


def explain_cells(result: dict[str, Any]) -> list[str]:
    """Return the remarks that the first table needs."""
    where = "Two network namespaces, a veth pair, a token bucket (tbf) at both ends"
    counted = "the kernel's count, Ethernet headers and acknowledgements included"
    if result["link"] == "proxy":
        where = "A throttling proxy on the loopback device"
        where += f" ({result['why']})" if result["why"] else " (--proxy)"
        counted = "what passed the proxy, HTTP's headers included, TCP's not"
    machine = result["machine"]
    return [
        f"{where}; {result['requests']} requests a row over a kept connection, after one that does not count.",
        f"Random weights; uploads of {UPLOAD_BYTES} bytes, layers of payload + 132. On the link, up + down: {counted}.",
        "Milliseconds. Paper: 768 bytes, and the payload, by the rate. Floor: both on the link by the rate. "
        "Transfer: whole less compute (generate and wait, as the service says), medians. Acknowledgements are part of "
        "the floor and pass meanwhile: up to 3 % less is possible.",
        f"{machine['processors']} x {machine['processor']}, Linux {machine['kernel']}, "
        f"{machine.get('tcp_congestion_control', 'unknown congestion control')}; {result['made']}, "
        f"commit {result['commit']}.",
    ]


def format_far_cell(found: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """Return a cell of the series with delay as a row; round trips are the transfer beyond the payload by the rate."""
    trips = (found["transfer_ms"] - found["paper_down_ms"]) / (2000 * result["delay"]["seconds_each_way"])
    return [
        f"{found['case']}, {found['outputs']}", found["kind"], CONNECTION_NAMES[found["connection"]],
        f"{found['payload_bytes']:,}", f"{found['whole_p50_ms']:.1f}", f"{found['whole_p99_ms']:.1f}",
        f"{found['compute_ms']:.1f}", f"{found['transfer_ms']:.1f}", f"{trips:.1f}",
    ]  # fmt: skip


def explain_far_cells(result: dict[str, Any]) -> str:
    """Return the remark that the second table needs."""
    delay = result["delay"]
    link = f"{1000 * delay['seconds_each_way']:.0f} ms each way at {delay['rate_mib_s']} MiB/s, "
    if delay["link"] == "TUN":
        return link + "packets held back between two TUN devices. Round trips: transfer less payload / rate, by 40 ms."
    return link + (
        "held back by the proxy. It ends connections itself: a handshake, or a window that is small at first, costs no "
        "round trip here, and so these figures do not show them."
    )


def build_tables(result: dict[str, Any]) -> list[tuple[tuple[str, ...], list[list[str]], list[str]]]:
    """Return columns, rows and remarks of all tables."""
    far = [format_far_cell(found, result) for found in result["delay"]["cells"]]
    tables = [
        (CELL_COLUMNS, [format_cell(found) for found in result["cells"]], explain_cells(result)),
        (FAR_COLUMNS, far, [explain_far_cells(result)]),
    ]
    if answers := result["answers"]:
        tables.append(
            (
                ("bundle", *ANSWER_STAGES, "whole p50", "p99"),
                [
                    [each["name"], *(f"{each['stages_ms'][stage]:.2f}" for stage in ANSWER_STAGES),
                     f"{each['whole_p50_ms']:.1f}", f"{each['whole_p99_ms']:.1f}"]
                    for each in answers
                ],
                [f"One answer of the device client, each with its own layer, at {FAR_RATE} MiB/s: medians in ms. "
                 "Generate is the cloud's share, upload and download are the way there and back."],
            )
        )  # fmt: skip
    return tables


def format_page(result: dict[str, Any]) -> str:
    """Return all tables as Markdown."""
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
    console = Console(width=None if sys.stdout.isatty() else 180, markup=False, emoji=False)  # names are no markup
    for columns, rows, remarks in build_tables(result):
        table = Table(box=SIMPLE_HEAD)
        for column in columns:
            table.add_column(column, justify="left" if column in TEXT_COLUMNS else "right")
        for cells in rows:
            table.add_row(*cells)
        console.print(table)
        console.print("\n".join(remarks), highlight=False, soft_wrap=True)
