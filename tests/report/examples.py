"""Records of made-up runs, with all that a report may hold."""

from __future__ import annotations

from typing import Any

BLOCKS = 5


def report(**changes: Any) -> dict[str, Any]:
    """`report.json` of a run with a mixed plan, massive activations and other kinds of rows in each part."""
    line = {"scheme": "W4 g128 sym", "bits": 4, "stored_bits": 4.1563, "layers": 1, "weights": 4096}
    found: dict[str, Any] = {
        "autoround_version": "1.0.0",
        "versions": {"torch": "2.13.0", "transformers": "5.24.0"},
        "model": "tiny <b>&</b> model",
        "scheme": "W4 g128 sym",
        "formats": ["auto_round"],
        "method": "SignRound, 2 steps of sign descent a block",
        "seed": 42,
        "layers": {"quantized": 10, "kept": 1},
        "bits_per_quantized_weight": 4.1563,
        "bytes_before": 90_123,
        "bytes_after": {"auto_round": 30_321, "fake": 90_123},
        "plan": [
            {**line, "kind": "self_attn.q_proj", "reason": "scheme W4 g128 sym", "blocks": [[0, 1], [3, 4]]},
            {**line, "kind": "self_attn.q_proj", "bits": 8, "reason": "layer_config", "blocks": [[2, 2]]},
            {**line, "kind": "mlp.experts.*.up_proj", "layers": 8, "reason": "scheme", "blocks": [[0, 4]]},
            {**line, "kind": "mlp.shared.up_proj", "bits": 2, "reason": "scheme", "blocks": [[0, 4]]},
            {
                **line,
                "kind": "lm_head",
                "scheme": "16 bits",
                "bits": 16,
                "reason": "output head",
                "blocks": [],
            },
        ],
        "blocks": [
            {
                "unit": f"model.layers.{i}",
                "initial_loss": 0.123456789 * 3**i,
                "loss": 0.1111111111 * 3**i,
                "best_step": i % 3,
                "errors": {"q_proj": 0.01234567 * (i + 1), "up_proj": 0.0 if i == 2 else 0.003},
                "experts": {f"model.layers.{i}.mlp.experts": [i, 17, 5 + i]},
                **({"massive_tokens": 0.007, "massive_energy": 0.987654321} if i in (1, 3) else {}),
            }
            for i in range(BLOCKS)
        ]
        + [{"unit": "lm_head"}],
        "calibration": {
            "dataset": "a.jsonl,b",
            "summary": "a.jsonl: 6 rows from 9 samples; b: 2 rows from 2 samples",
            "fingerprint": "f" * 64,
            "sources": [
                {"name": "a.jsonl", "samples": 9, "rows": 6, "dropped": {"too short": 3}},
                {"name": "b", "samples": 2, "rows": 2, "dropped": {}},
            ],
            "letters": {"Latin": 1234, "Cyrillic": 56},
            "rows_tuned": 6,
            "rows_held_out": 2,
            "tokens_per_row": 64,
            "tokens_tuned": 380,
        },
        "held_out": {
            "positions": 126,
            "tuned_on_too": False,
            "perplexity_before": 10.123456,
            "perplexity_after": 11.654321,
            "kl": 0.3987654321,
            "same_top_token": 0.8765432,
            "kl_histogram": {"first_power": -3, "bins_per_decade": 2, "positions": [1, 25, 60, 30, 10, 0]},
        },
        "distillation": {
            "steps": 20,
            "rows": 80,
            "tokens": 20480,
            "kl_before": 0.45,
            "kl_best": 0.3987,
            "kept_step": 20,
            "looks": [[0, 0.45], [10, 0.46], [20, 0.3987]],
        },
        "hard_cases": {
            "kept_as_started": {"units": ["model.layers.0"], "of": 5},
            "far_from_the_original": {"kl": 0.39, "bound": 0.3, "largest_errors": {"q_proj": 0.06}},
        },
        "engines": {"auto_round": {"vLLM": {"loads": True}, "SGLang": {"loads": False, "reasons": ["no"]}}},
        "verified": {"auto_round": {"kl": 0.0, "sample": "a"}, "fake": {"skipped": "there was no memory"}},
        "auto_scheme": {
            "made_by": "AutoScheme",
            "target": "4 bits per weight",
            "average_bits": 3.9876,
            "predicted_kl": 0.0456789,
            "gap": 0.0012,
            "options": ["W2A16", "W4A16"],
        },
        "sensitivity": {
            "measure": "first-order score",
            "layers": [
                {"kind": "q_proj", "block": i, "scores": {"W2A16": 0.5 / (i + 1), "W4A16": 0.0123 / (i + 1)}}
                for i in range(BLOCKS)
            ],
        },
    }
    return {**found, **changes}


def record(**changes: Any) -> dict[str, Any]:
    """`report_run.json` of it."""
    units = [
        {
            "unit": f"model.layers.{i}",
            "seconds": 12.345 + i,
            "resident_bytes": 600_000_001,
            "peak_bytes": 700_000_003 + i,
            "device_peak_bytes": 1_234_567_891,
        }
        for i in range(BLOCKS)
    ]
    found = {
        "command": 'auto-round a/model --layer_config \'{"q_proj": {"bits": 8}}\'',
        "beside_command": ["lr_scheduler: <function>"],
        "finished": "2026-01-02T03:04:05+00:00",
        "seconds": 123.456,
        "continued": False,
        "stages": {"prepare": 1.25, "tune": 111.5},
        "peak_bytes": 700_000_008,
        "device": "cuda",
        "units": units,
        "machine": {"processor": "a processor", "accelerator": "a card"},
        "versions": {"auto_round": "1.0.0", "triton": None},
    }
    return {**found, **changes}


def evaluation(**changes: Any) -> dict[str, Any]:
    """What `auto-round eval --original` writes, as far as a page reads it."""

    def estimate(value: float) -> dict[str, float]:
        return {"value": value, "error": value / 20, "low": value * 0.875, "high": value * 1.125}

    def spread(scale: float) -> dict[str, Any]:
        found = {"mean": 0.0345, "median": 0.0123, "p90": 0.0789, "p99": 0.234, "p99_9": 0.678}
        return {**{name: estimate(scale * value) for name, value in found.items()}, "largest": scale * 2.71}

    found: dict[str, Any] = {
        "model": "tiny",
        "original": "original",
        "text": "some/where/wiki <test>.txt",
        "positions": 40_880,
        "perplexity_original": estimate(12.25),
        "perplexity": estimate(12.75),
        "perplexity_ratio": estimate(1.040816),
        "kl": spread(1.0),
        "kl_reverse": spread(1.25),
        "same_top": estimate(0.8125),
        "probability_difference": {"mean": estimate(0.001), "rms": estimate(0.0625)},
        "noise_floor": {"dtype": "bfloat16", "rows": 16, "kl": 0.00021, "same_top": 0.99},
    }
    return {**found, **changes}
