"""The part `table` of `scripts/bench_gpu.py`: the records of one run as one page of markdown, and as one JSON file.

The roofline of one forward of a DiT, in bfloat16 with fused kernels:

    F = R·L·(24·D²·N + 4·N²·D + 12·D²)      linear layers, attention, adaLN: a multiply-add is 2 FLOP
    bytes = 2·P + PASSES·2·R·N·D·L          weights, and the passes over a block's tokens that no fusion spares
    floor = max(F / peak FLOP/s, bytes / peak bytes/s)

for R rows (two an image under guidance), L blocks, N tokens, D width and P weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hemiola_runtime.artifacts import write_text
from hemiola_runtime.errors import RequestError

# GPU → dense bfloat16 FLOP/s and bytes/s of its memory, as NVIDIA's data sheet has them. A product of 8192³ and a copy
# reach about 0.8 and 0.9 of that on an H200.
PEAKS: Final[dict[str, tuple[float, float]]] = {"NVIDIA H200": (989e12, 4.8e12)}
BF16_BYTES: Final = 2
PASSES: Final = 20  # over residual, q, k, v, attention and MLP of one block, written or read
ROWS_PER_IMAGE: Final = 2  # classifier-free guidance
RESULTS_FILE: Final = "results.json"

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Roofline:
    """What one uncached forward takes at least."""

    flop: float
    num_bytes: float

    def floor_ms(self, gpu: str) -> float | None:
        """Return milliseconds; None for a GPU whose peaks are not known."""
        if gpu not in PEAKS:
            return None
        flops, bandwidth = PEAKS[gpu]
        return 1000 * max(self.flop / flops, self.num_bytes / bandwidth)


def roofline(shape: Mapping[str, int], rows: int) -> Roofline:
    """Count operations and bytes of one forward; see the formula above.

    Args:
        shape: width, num_blocks, num_tokens and num_weights of the model.
        rows: R.
    """
    width, blocks, tokens = shape["width"], shape["num_blocks"], shape["num_tokens"]
    flop = rows * blocks * (24 * width**2 * tokens + 4 * tokens**2 * width + 12 * width**2)
    activations = PASSES * BF16_BYTES * rows * tokens * width * blocks
    return Roofline(flop, BF16_BYTES * shape["num_weights"] + activations)


def run(options: argparse.Namespace) -> None:
    """Write `table.md` and `results.json` into --out, and print the table.

    Raises:
        RequestError: there are no records.
    """
    folder: Path = options.records or options.out
    files = [path for path in sorted(folder.glob("*.json")) if path.name != RESULTS_FILE]
    records = [record for record in map(_read, files) if "part" in record]
    if not records:
        raise RequestError(f"{folder} holds no records; the other parts of bench_gpu write them")
    page = table(records)
    write_text(json.dumps({"schema": 1, "records": records}, indent=1) + "\n", options.out / RESULTS_FILE)
    write_text(page, options.out / "table.md")
    sys.stdout.write(page)


def _read(path: Path) -> dict[str, Any]:
    record = json.loads(path.read_text())
    return record if isinstance(record, dict) else {}


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Lay out the records of one run."""
    rows = [row for record in records for row in record.get("rows", [])]
    shape = next((record["shape"] for record in records if "shape" in record), None)
    gpu = next((str(record["gpu"]["name"]) for record in records if record["gpu"]), "no GPU")
    sections = [_head(records, gpu), _denoising(rows), _forwards(rows, shape, gpu), _making(records), _parity(records)]
    return "\n".join(section for section in sections if section)


def _head(records: Sequence[Mapping[str, Any]], gpu: str) -> str:
    first = records[0]
    machine, state = first["machine"], first["gpu_after"]
    versions: dict[str, str] = {}
    for record in records:
        versions |= record["made_by"]["versions"]
    clocks = [record["gpu_after"].get("clocks.sm", "–") for record in records]
    driver = f", driver {state['driver_version']}, SM clock after each part {', '.join(clocks)}" if state else ""
    return (
        f"# {first['model']}, {first['precision']}, {first['steps']} steps, guidance, on {gpu}\n\n"
        f"{machine['processor']}, {machine['num_cores']} cores{driver}; "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}\n"
    )


def _denoising(rows: Sequence[Row]) -> str:
    """Denoising alone, from noise to final latents; the best of diffusers is what it is compared with."""
    plain = {row["batch_size"]: _ms(row) for row in rows if row["who"] == "diffusers" and row["how"] == "eager"}
    compiled: dict[int, float] = {}
    for row in rows:
        if row["who"] == "diffusers" and row["how"] != "eager":
            compiled[row["batch_size"]] = min(_ms(row), compiled.get(row["batch_size"], _ms(row)))
    lines = []
    for row in sorted(rows, key=lambda row: row["batch_size"]):
        size, milliseconds, spread = row["batch_size"], _ms(row), row["denoise"]
        graph, host, busy = row.get("graph_bytes"), row.get("host_ms"), row.get("busy")
        lines.append(
            [
                size,
                row["who"],
                row["how"],
                row["schedule"],
                f"{milliseconds / size:.2f}",
                f"{1000 * size / milliseconds:.1f}",
                f"{(spread['p90_ms'] - spread['p10_ms']) / milliseconds:.1%}",
                _times(row.get("speedup")),
                _times(plain[size] / milliseconds if size in plain else None),
                _times(compiled[size] / milliseconds if size in compiled else None),
                "–" if busy is None else f"{busy:.1%}",
                "–" if host is None else f"{host / size:.3f}",
                "–" if graph is None else f"{graph / 1e6:.0f}",
                _number(row["vae_ms"] / size if row.get("vae_ms") else None),
            ]
        )
    head = (
        *("batch", "who", "how", "schedule", "ms/image", "images/s", "p10–p90", "over all-full", "over eager"),
        *("over compile", "GPU busy", "host ms/image", "graph MB", "VAE ms/image"),
    )
    return _section("Denoising, without decoding", head, lines)


def _forwards(rows: Sequence[Row], shape: Mapping[str, int] | None, gpu: str) -> str:
    """One forward of each kind; merged over the schedules that ran them."""
    merged: dict[tuple[int, str, str], dict[str, float]] = {}
    for row in rows:
        key = (row["batch_size"], row["who"], row["how"])
        merged[key] = row.get("forwards", {}) | merged.get(key, {})
    lines = []
    for (size, who, how), found in sorted(merged.items()):
        full = found.get("full")
        floor = roofline(shape, ROWS_PER_IMAGE * size).floor_ms(gpu) if shape else None
        kinds = [_number(found.get(kind)) for kind in ("full", "deep", "tokens", "reuse", "residual_1", "conditioning")]
        shares = [
            "–" if full is None or kind not in found else f"{found[kind] / full:.1%}" for kind in ("tokens", "reuse")
        ]
        lines.append(
            [size, who, how, *kinds, *shares, _number(floor), _times(full / floor if full and floor else None)]
        )
    head = (
        *("batch", "who", "how", "full ms", "deep ms", "tokens ms", "reuse ms", "residual ms", "conditioning ms"),
        *("tokens/full", "reuse/full", "roofline ms", "full/roofline"),
    )
    return _section("One forward", head, lines)


def _making(records: Sequence[Mapping[str, Any]]) -> str:
    """What export, builds and compilations took."""
    lines: list[list[object]] = []
    for record in records:
        for key, what in (("load_seconds", "load"), ("export_seconds", "export"), ("build_seconds", "build")):
            if key in record:
                lines.append([record["part"], what, f"{record[key]:.1f}"])
        lines += [
            [record["part"], what, f"{seconds:.1f}"] for what, seconds in record.get("compile_seconds", {}).items()
        ]
        lines += [[record["part"], what, "left out: no time"] for what in record.get("left_out", [])]
    return _section("Made in", ("part", "what", "seconds"), lines)


def _parity(records: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [record["part"], name, f"{difference:.1e}", "no" if name in record["beyond_bounds"] else "yes"]
        for record in records
        for name, difference in record.get("forward_parity", {}).items()
    ]
    return _section("Against PyTorch in float32", ("part", "forward", "relative L2", "within its bound"), lines)


def _ms(row: Row) -> float:
    return float(row["denoise"]["median_ms"])


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}×"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _section(title: str, head: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    if not lines:
        return ""
    ruled = [head, ["---"] * len(head), *lines]
    return f"\n## {title}\n\n" + "".join(f"| {' | '.join(map(str, line))} |\n" for line in ruled)
