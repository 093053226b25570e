"""Documents for tests: the paper's example, and blueprints of any size."""

from __future__ import annotations

import copy
from typing import Any

# Appendix A.1 of the paper, without its comment line.
PAPER_EXAMPLE: dict[str, Any] = {
    "model_id": "foundation-7b",
    "training_checkpoint": 0.80,
    "layers": [
        {
            "id": "attn.0",
            "gradient_norm": 0.052,
            "alpha": 1.47,
            "gamma": 0.60,
            "k_star": 0.15,
            "domain_tags": {"general": 1.0, "bio": 0.79, "legal": 0.63},
        },
        {
            "id": "ffn.0",
            "gradient_norm": 0.033,
            "alpha": 1.12,
            "gamma": 0.53,
            "k_star": 0.25,
            "domain_tags": {"general": 1.0, "bio": 0.68, "legal": 0.50},
        },
        {
            "id": "attn.1",
            "gradient_norm": 0.045,
            "alpha": 1.50,
            "gamma": 0.60,
            "k_star": 0.13,
            "domain_tags": {"general": 1.0, "bio": 0.75, "legal": 0.80},
        },
    ],
}


def paper_example(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(PAPER_EXAMPLE) | changes


def blueprint_document(
    model_id: str = "tiny", checkpoint: float = 0.8, *, layers: int = 3, norm: float = 0.1, **changes: Any
) -> dict[str, Any]:
    """A valid document; `norm` tells documents apart, layer i has the norm `norm / (i + 1)`."""
    return {
        "model_id": model_id,
        "training_checkpoint": checkpoint,
        "layers": [{"id": f"block.{index}.attn", "gradient_norm": norm / (index + 1)} for index in range(layers)],
        **changes,
    }
