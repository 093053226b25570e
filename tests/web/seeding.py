"""A registry as it may look after a while: models, checkpoints, labs that differ, aliases, yanks and evidence."""

from __future__ import annotations

import math
import random
import tempfile
from pathlib import Path
from typing import Any

from gradient_blueprints import Client
from tests.conftest import Server, execute

MODEL = "northwind/atlas-1b"
CHECKPOINTS = (0.2, 0.4, 0.6, 0.8, 1.0)
PARTS = (
    ("self_attn", "attention", 8_850_000, 0.9),
    ("mlp", "feed_forward", 26_500_000, 1.4),
    ("input_layernorm", "normalization", 2_048, 0.12),
    ("post_attention_layernorm", "normalization", 2_048, 0.1),
)
_SHARES = (0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


def profile(
    checkpoint: float, blocks: int = 30, *, seed: int, scale: float = 1.0, noise: float = 0.08
) -> dict[str, Any]:
    """Four layers a block and two more, with all that a profiler can measure; `seed` and `scale` tell labs apart."""
    rng = random.Random(seed)
    layers = [_layer("model.embed_tokens", "embedding", None, 98_000_000, 2.1 * scale, rng, noise)]
    for depth in range(blocks):
        early, late = math.exp(-depth / 5), math.exp((depth - blocks) / 4)
        for name, kind, parameters, size in PARTS:
            norm = size * scale * (0.25 + early * (1.4 - checkpoint) + late * checkpoint + 0.15 * math.sin(depth))
            layers.append(_layer(f"model.layers.{depth}.{name}", kind, depth, parameters, norm, rng, noise))
    layers.append(_layer("model.norm", "normalization", None, 2_048, 0.6 * scale, rng, noise))
    return {
        "schema_version": 1,
        "model_id": MODEL,
        "training_checkpoint": checkpoint,
        "statistic": "mean",
        "cost_model": {"fixed": 4.0, "variable": 12.0},
        "layers": layers,
        "provenance": {
            "profiler": "gradient-blueprints 0.1.0",
            "weights_revision": f"step-{round(checkpoint * 500_000)}",
            "batches": 96,
            "batch_size": 8,
            "tokens": 1_572_864,
            "sequence_length": 2_048,
            "loss": {"general": 2.31, "bio": 2.77, "legal": 2.12},
            "seed": seed,
            "dtype": "bfloat16",
            "device": "NVIDIA H100 80GB",
            "resources": {"seconds": 412.0, "peak_memory_bytes": 38_654_705_664},
        },
    }


def _layer(
    name: str, kind: str, depth: int | None, parameters: int, norm: float, rng: random.Random, noise: float
) -> dict[str, Any]:
    norm = abs(norm) * math.exp(rng.gauss(0, noise))
    error = rng.uniform(0.04, 0.14)
    alpha = rng.uniform(0.7, 1.6)
    place = {} if depth is None else {"depth": depth}
    return {
        "id": name,
        "gradient_norm": norm,
        "gradient_norm_ci": [norm * math.exp(-error), norm * math.exp(error)],
        "alpha": alpha,
        "alpha_ci": [alpha * 0.93, alpha * 1.07],
        "gamma": 1 / (1 + alpha),
        "k_star": rng.uniform(0.05, 0.35),
        "domain_tags": {"general": 1.0, "bio": rng.uniform(0.5, 0.9), "legal": rng.uniform(0.4, 1.2)},
        "parameters": parameters,
        "kind": kind,
        **place,
        "example_norm": norm * rng.uniform(1.5, 2.5),
        "signal": norm * rng.uniform(0.5, 0.9),
        "retained_mass": [[share, share ** (1 / (1 + alpha))] for share in _SHARES],
    }


def seed(server: Server, *, blocks: int = 30) -> None:
    """Publish through the SDK, and write the evidence of past days as no client can."""
    with tempfile.TemporaryDirectory() as folder:

        def client(lab: str) -> Client:
            return Client(server.url, api_key=server.key(lab), cache=Path(folder) / lab)

        with client("northwind") as owner, client("blue-harbour") as second, client("tundra.ai") as third:
            for index, checkpoint in enumerate(CHECKPOINTS):
                owner.publish_blueprint(profile(checkpoint, blocks, seed=index))
            second.publish_blueprint(profile(0.8, blocks, seed=50, scale=3.1, noise=0.15))
            third.publish_blueprint(profile(0.8, blocks, seed=51, scale=0.4, noise=0.3))
            owner.publish_blueprint(profile(0.8, blocks, seed=52))
            owner.yank_version(MODEL, 0.8, 1, reason="profiled with the wrong tokenizer; use version 4")
            owner.set_alias(MODEL, "stable", 0.8, 4)
            owner.set_alias(MODEL, "latest", 1.0, 1)
            small = {"training_checkpoint": 0.8, "layers": [{"id": "attn.0", "gradient_norm": 0.052, "alpha": 2.7}]}
            owner.publish_blueprint({"model_id": "northwind/atlas-7b", **small})
            second.publish_blueprint({"model_id": "harbour-350m", **small})
            third.publish_blueprint({"model_id": "tundra.ai/permafrost-13b-base", **small})
    execute(server.settings.database_url, _EVIDENCE)


# Twelve users over thirteen weeks: `bio` turns stale, `general` holds, `legal` is hard to tell.
_EVIDENCE = """
INSERT INTO keys (lab_id, name, prefix, hash, scopes)
SELECT (SELECT min(id) FROM labs), 'adapter', 'gbr_' || n,
       sha256(n::text::bytea), '{read}' FROM generate_series(1, 12) n;
INSERT INTO evidence (checkpoint_id, document_id, key_id, domain, day, verdict, level, threshold, layers, spearman)
SELECT c.id, v.document_id, k.id, d.domain, CURRENT_DATE - week * 7 - (k.id % 5)::int,
       CASE WHEN (week + k.id) % 5 = 0 THEN 'indeterminate' WHEN d.domain = 'bio' AND (k.id % 9) > week THEN 'stale'
            WHEN d.domain = 'legal' AND (k.id + week) % 4 = 0 THEN 'stale' ELSE 'fresh' END,
       'layer', 0.95, 122, 0.9
FROM checkpoints c JOIN models m ON m.id = c.model_id
JOIN versions v ON v.checkpoint_id = c.id AND v.number = 4
CROSS JOIN (SELECT id, row_number() OVER (ORDER BY id) AS n FROM keys WHERE name = 'adapter') k
CROSS JOIN (VALUES ('bio'), ('general'), ('legal')) d (domain)
CROSS JOIN generate_series(0, 12) week
WHERE m.name = 'northwind/atlas-1b' AND c.fraction = 0.8 AND (k.n + week * 3) % 4 <> 0 ORDER BY week DESC;
INSERT INTO staleness_events (kind, at, checkpoint_id, document_id, domain, stale_share, users)
SELECT kind, now() - ago, v.checkpoint_id, v.document_id, 'bio', share, users
FROM versions v JOIN checkpoints c ON c.id = v.checkpoint_id JOIN models m ON m.id = c.model_id
CROSS JOIN (VALUES ('raised', interval '40 days', 0.52, 9), ('cleared', interval '26 days', 0.44, 10),
                   ('raised', interval '12 days', 0.6, 12)) e (kind, ago, share, users)
WHERE m.name = 'northwind/atlas-1b' AND c.fraction = 0.8 AND v.number = 4 ORDER BY ago DESC;
"""
