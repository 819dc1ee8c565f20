"""compare.json and a board's results as they are written, for the tests of the report."""

from typing import Any


def _timed(p50: float, top1: float, share: float | None = None) -> dict[str, Any]:
    return {
        "available": True,
        "why": None,
        "top1": top1,
        "latency_ms": {"p50": p50, "p90": 1.09 * p50, "p99": 1.31 * p50},
        "throughput": 1000 / p50,
        "int8_mac_share": share,
        "peak_memory_bytes": int(40e6 * p50),
    }


def _absent(why: str) -> dict[str, Any]:
    return {
        "available": False,
        "why": why,
        "top1": None,
        "latency_ms": None,
        "throughput": None,
        "int8_mac_share": None,
    }


def comparison(candidate: str = "int8_ptq") -> dict[str, Any]:
    """fp32, bf16 and the candidate on two runtimes here, and one that cannot run here."""
    no_gpu = "there is no NVIDIA GPU: make bundle packs what the board needs"
    return {
        "images": 400,
        "models": {
            "fp32": {"top1": 95.0, "top5": 99.75, "size_bytes": 2115364, "params": 457292},
            "bf16": {"top1": 95.0, "top5": 99.75, "size_bytes": 2115364, "params": 457292},
            candidate: {"top1": 94.75, "top5": 99.75, "size_bytes": 872348, "params": 457292},
        },
        "pairs": [
            {
                "baseline": "fp32",
                "candidate": candidate,
                "drop": 0.25,
                "drop_ci95": [-0.24, 0.74],
                "agreement": 99.25,
                "mcnemar_p": 1.0,
            },
            {
                "baseline": "fp32",
                "candidate": "bf16",
                "drop": 0.0,
                "drop_ci95": [0.0, 0.0],
                "agreement": 100.0,
                "mcnemar_p": 1.0,
            },
        ],
        "targets": {
            "openvino-cpu": {
                "fp32": _timed(0.98, 95.0),
                "bf16": _timed(0.71, 95.0),
                candidate: _timed(0.52, 94.75, 1.0),
            },
            "onnxruntime-cpu": {
                "fp32": _timed(1.42, 95.0),
                "bf16": _absent("ONNX Runtime has no bfloat16 convolution on a CPU"),
                candidate: _timed(1.18, 94.75),
            },
            "tensorrt-jetson-orin": {name: _absent(no_gpu) for name in ("fp32", "bf16", candidate)},
        },
        "verdicts": [
            {
                "target": "openvino-cpu",
                "pays": True,
                "text": "INT8 pays: 1.9x over FP32, 1.4x over BF16, drop 0.25 [-0.24, 0.74]",
            },
            "onnxruntime-cpu: INT8 pays little: 1.2x over FP32",
        ],
        "budgets": [
            {"name": "max_top1_drop", "limit": 0.3, "value": 0.25, "ok": True},
            {"name": "min_speedup openvino-cpu", "limit": 2.0, "value": 1.88, "ok": False},
        ],
        "machine": {"noisy": False},
    }


def layers(precision: str, scale: float, convert: bool, site: str = "stem.0") -> dict[str, Any]:
    """A convolution and a reorder as compare writes them."""
    rows = [
        ("conv", "Convolution", [site], precision, scale),
        ("reorder", "Reorder", [], "f32", 0.5 * scale if convert else 0.0),
    ]
    group = "integer products" if precision == "u8" else "float products"
    total = sum(row[4] for row in rows)
    keys = ("name", "kind", "sites", "precision", "ms")
    found = [dict(zip(keys, row, strict=True)) for row in rows]
    for one, place in zip(found, (group, "reorder and convert"), strict=True):
        one |= {"group": place, "share": one["ms"] / total}
    by_kind = {one["group"]: {"layers": 1, "ms": one["ms"], "share": one["share"]} for one in found}
    empty = {"layers": 0, "ms": 0.0, "share": 0.0}
    kinds = ("integer products", "float products", "reorder and convert")
    return {
        "layers": found,
        "by_kind": {kind: by_kind.get(kind, empty) for kind in kinds},
        "layers_ms": total,
        "profiled_ms": 1.1 * total,
    }


def engine_speed(p50: float, mode: str = "MAXN") -> dict[str, Any]:
    """An engine's speed as `bench` and `tune` describe it."""
    spread = {"p50": p50, "p90": 1.05 * p50, "p99": 1.2 * p50}
    return {
        "batch": 1,
        "cuda_graph": True,
        "runs": 500,
        "seconds": 5.0,
        "latency_ms": spread,
        "host_latency_ms": {name: value + 0.1 for name, value in spread.items()},
        "enqueue_ms": {name: 0.01 for name in spread},
        "throughput": 1000 / p50,
        "during": {
            "power_mode": mode,
            "power_mode_from": "nvpmodel",
            "clocks_locked": True,
            "moments": 50,
            "gpu_mhz": {"least": 1300.0, "median": 1300.0, "most": 1300.5},
            "cpu_mhz": None,
            "temperatures_c": {"gpu": 48.5},
            "throttled": [],
        },
        "energy": None,
        "energy_missing": "no INA3221",
    }


def board_results(run: str) -> dict[str, Any]:
    """Two engines of a Jetson, as `bench` and `verify` describe them."""
    models = {}
    for name, p50 in (("int8", 0.31), ("fp16", 0.36)):
        models[name] = {
            "onnx_sha256": "a" * 64,
            "engine_sha256": "b" * 64,
            "size_bytes": 1_400_000,
            "layers_from": "engine",
            "precisions": {"INT8": 60, "FP16": 20},
            "accuracy": {
                "images": 64,
                "top1": 95.3,
                "expected_top1": 95.3,
                "agreement": 100.0,
                "sqnr_db": 33.0,
                "max_deviation": 0.2,
                "passed": True,
                "measured_at": "2026-11-20T10:00:00+00:00",
            },
            "speed": {**engine_speed(p50), "measured_at": "2026-11-20T10:01:00+00:00"},
            "layer_times": {**engine_layers(p50), "measured_at": "2026-11-20T10:01:00+00:00"},
        }
    return {
        "format": 2,
        "kind": "care-deploy-results",
        "target": "tensorrt-jetson-orin",
        "run": run,
        "recipe": run,
        "fingerprint": "c" * 64,
        "bundle_sha256": "d" * 64,
        "board": {
            "name": "NVIDIA Jetson AGX Orin",
            "gpu": {"name": "Orin", "compute_capability": "8.7"},
            "library": "tensorrt",
            "library_version": "10.3.0",
            "cuda": {},
            "l4t": None,
            "jetpack": None,
            "jetpack_from": None,
            "container": False,
            "python": "3.10",
            "architecture": "aarch64",
        },
        "models": models,
        "candidates": {
            "int8-o5-b1": field_row("int8", "passed", speed=engine_speed(0.31)),
            "int8-late-o5-b1": field_row("int8-late", "failed", reason="no tactic for node 7"),
        },
        "winner": "int8-o5-b1",
        "measured_at": "2026-11-20T10:02:00+00:00",
    }


def engine_layers(p50: float) -> dict[str, Any]:
    """Two layers, the second of which takes two thirds of the time."""
    kinds = (("stem + relu", "CaskConvolution", "INT8"), ("head", "gemm", "FP16"))
    return {
        "layers": [
            {"name": name, "type": kind, "precision": precision, "origin": [name], "ms": part * p50}
            for part, (name, kind, precision) in zip((1 / 3, 2 / 3), kinds, strict=True)
        ]
    }


def field_row(
    model: str, state: str, speed: dict[str, Any] | None = None, reason: str = ""
) -> dict[str, Any]:
    """A candidate as `tune` writes it."""
    return {
        "model": model,
        "optimization_level": 5,
        "batch": 1,
        "onnx_sha256": "a" * 64,
        "state": state,
        "reason": reason,
        "tries": 0,
        "engine_sha256": None,
        "size_bytes": None,
        "build_seconds": None,
        "accuracy": None,
        "speed": speed,
        "layer_times": None,
    }


def cpu_results(run: str, threads: int = 2) -> dict[str, Any]:
    """Two files of a CPU bundle, as `bench` and `verify` describe them."""
    state = {"governor": "ondemand", "load_average": 0.1, "cpu_mhz": 2400.0, "temperatures_c": {}}
    models = {}
    for name, p50 in (("int8", 3.0), ("fp32", 4.5)):
        models[name] = {
            "sha256": "a" * 64,
            "size_bytes": 700_000,
            "floats_in": "f32",
            "accuracy": {
                "images": 64,
                "top1": 95.3,
                "expected_top1": 95.3,
                "agreement": 100.0,
                "sqnr_db": 41.0,
                "max_deviation": 0.02,
                "passed": True,
                "measured_at": "2026-11-20T10:00:00+00:00",
            },
            "speed": {
                "batch": 1,
                "threads": threads,
                "runs": 500,
                "seconds": 5.0,
                "latency_ms": {"p50": p50, "p90": 1.05 * p50, "p99": 1.2 * p50},
                "throughput": 1000 / p50,
                "before": state,
                "after": state,
                "measured_at": "2026-11-20T10:01:00+00:00",
            },
        }
    return {
        "format": 1,
        "kind": "care-deploy-cpu-results",
        "target": "onnxruntime-cpu",
        "run": run,
        "recipe": run,
        "fingerprint": "c" * 64,
        "bundle_sha256": "d" * 64,
        "board": {
            "name": "Raspberry Pi 5 Model B",
            "processor": "Cortex-A76",
            "cores": 4,
            "integer_dot_products": True,
            "library": "onnxruntime",
            "library_version": "1.23.2",
            "python": "3.11.2",
            "architecture": "aarch64",
        },
        "models": models,
        "measured_at": "2026-11-20T10:02:00+00:00",
    }
