"""The carbon disclosure of a run: Hugging Face's `co2_eq_emissions` metadata and a block for people."""

from __future__ import annotations

import json
from collections import Counter

from gradient_blueprints.run_models import Method, Resource, Tally

UNITS = {
    "seconds": "s",
    "processor_hours": "h",
    "accelerator_hours": "h",
    "energy_kwh": "kWh",
    "carbon_kg": "kg CO2e",
    "vram_gb_hours": "GB·h",
    "optimizer_gb_hours": "GB·h",
    "flops": "",
    "tokens": "",
}


def model_card(tally: Tally, training_type: str | None) -> str:
    """The YAML front matter and the Markdown section, in this order.

    The hub wants emissions in grams. Where carbon was not read there is no `co2_eq_emissions`: zero would be a claim.
    """
    return "\n".join([*_metadata(tally, training_type), *_section(tally)]) + "\n"


def hardware_used(tally: Tally) -> str:
    """Such as `AMD EPYC (64 cores), 2 × NVIDIA A100`."""
    counts = sorted(Counter(tally.hardware.values()).items())
    return ", ".join(name if count == 1 else f"{count} × {name}" for name, count in counts)


def _metadata(tally: Tally, training_type: str | None) -> list[str]:
    if tally.carbon_kg is None:
        return []
    fields = {
        "emissions": tally.carbon_kg * 1e3,
        "source": f"gradient-blueprints ResourceMeter; {_how(tally.methods[Resource.CARBON_KG])}",
        "training_type": training_type,
        "geographical_location": tally.region,
        "hardware_used": hardware_used(tally),
    }
    lines = [f"  {name}: {_yaml(value)}" for name, value in fields.items() if value not in (None, "")]
    return ["---", "co2_eq_emissions:", *lines, "---", ""]


def _yaml(value: object) -> str:
    if isinstance(value, float):  # written out: YAML takes 1e-06 for a string
        return f"{float(f'{value:.4g}'):.15f}".rstrip("0") + "0"
    return json.dumps(value, ensure_ascii=False)  # a JSON string is a YAML string, whatever stands in it


def _section(tally: Tally) -> list[str]:
    lines = ["## Resources spent in training", "", "| Resource | Amount | How it was read |", "|---|---|---|"]
    for resource, method in tally.methods.items():
        amount = getattr(tally, resource)
        shown = "not read" if amount is None else f"{amount:,.4g} {UNITS[resource]}".strip()
        lines.append(f"| {resource.replace('_', ' ')} | {shown} | {_how(method)} |")
    if tally.carbon_intensity is not None:
        place = f" ({tally.region})" if tally.region else ""
        lines += ["", f"Carbon intensity of the electricity{place}: {tally.carbon_intensity:g} g CO2e per kWh."]
    return [*lines, "", f"Hardware: {hardware_used(tally) or 'not told'}."]


def _how(method: Method) -> str:
    if not method.instruments:
        return ""
    text = f"{method.basis}: {', '.join(method.instruments)}"
    return f"{text}; a lower bound, without {', '.join(method.missing)}" if method.missing else text
