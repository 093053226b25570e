"""A blueprint as a CSV table, a row a layer, and back without loss.

Columns are the dotted names of the fields: `gradient_norm_ci.low`, `domain_tags.bio`,
`retained_mass.0.01`. What belongs to the document and not to a layer stands in the first row
(`model_id` and `training_checkpoint` in every row); structures among it are JSON in their cell.
Numbers are written with the fewest digits that read back as the same float64.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from gradient_blueprints.errors import ErrorPlace, InvalidDocument, MalformedRequest

csv.field_size_limit(max(csv.field_size_limit(), 16 << 20))  # a structure in its cell may be as long as a document
KEY_COLUMNS = ("model_id", "training_checkpoint")
DOCUMENT_COLUMNS = ("schema_version", "statistic", "cost_model", "attachments", "provenance", "extra")
_JSON_COLUMNS = frozenset(DOCUMENT_COLUMNS) - {"statistic"}
LAYER_COLUMNS = ("id", "gradient_norm", "alpha", "gamma", "k_star")
_SCALARS = (*LAYER_COLUMNS, "parameters", "kind", "depth", "example_norm", "signal", "spread", "first_order")
_TEXT_COLUMNS = frozenset({"id", "kind", "tail_fit.method"})
_INTEGER_COLUMNS = frozenset({"parameters", "depth", "tail_fit.entries"})
_INTERVALS = ("gradient_norm_ci", "alpha_ci")
_TAIL_FIT = tuple(f"tail_fit.{name}" for name in ("method", "start", "entries", "ks", "versus_lognormal"))
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_MOST_PLACES = 100
_OPEN_COLUMNS = ("domain_tags", "domain_norms", "retained_mass")
_FIXED_COLUMNS = frozenset(
    (
        *KEY_COLUMNS,
        *DOCUMENT_COLUMNS,
        *_SCALARS,
        *_TAIL_FIT,
        *(f"{name}.{end}" for name in _INTERVALS for end in ("low", "high")),
    )
)


def table_of(document: Mapping[str, Any]) -> str:
    """Render a valid document with CRLF line ends (RFC 4180); equal documents give equal text."""
    rows: list[dict[str, str]] = []
    for index, layer in enumerate(document["layers"]):
        row = {name: _cell(document[name]) for name in KEY_COLUMNS}
        if index == 0:
            row |= {
                name: _json(document[name]) if name in _JSON_COLUMNS else _cell(document[name])
                for name in DOCUMENT_COLUMNS
                if name in document
            }
        rows.append(row | layer_cells(layer))
    used = {column for row in rows for column in row}
    fixed = [*KEY_COLUMNS, *_SCALARS, *(f"{n}.{e}" for n in _INTERVALS for e in ("low", "high")), *_TAIL_FIT]
    columns = [name for name in fixed if name in used or name in LAYER_COLUMNS]
    for name in _OPEN_COLUMNS:
        mine = [column for column in used if column.startswith(f"{name}.")]
        key = (lambda column: float(column.removeprefix("retained_mass."))) if name == "retained_mass" else str
        columns += sorted(mine, key=key)
    columns += [name for name in DOCUMENT_COLUMNS if name in used]

    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def layer_columns(members: Mapping[str, Sequence[str]]) -> list[str]:
    """Every column that a layer can have, with these members of domain_tags, domain_norms and retained_mass."""
    intervals = [f"{name}.{end}" for name in _INTERVALS for end in ("low", "high")]
    return [*_SCALARS, *intervals, *_TAIL_FIT, *(f"{name}.{member}" for name in members for member in members[name])]


def layer_cells(layer: Mapping[str, Any]) -> dict[str, str]:
    """A layer as the cells of its columns; what it lacks is absent."""
    row: dict[str, str] = {}
    for name, value in layer.items():
        if name in _INTERVALS:
            row[f"{name}.low"], row[f"{name}.high"] = map(_cell, value)
        elif name == "retained_mass":
            row |= {f"{name}.{float(k)!r}": _cell(share) for k, share in value}  # canonical JSON writes 1.0 as 1
        elif isinstance(value, dict):
            row |= {f"{name}.{key}": _cell(member) for key, member in value.items()}
        else:
            row[name] = _cell(value)
    return row


def _cell(value: object) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def document_of(text: str) -> dict[str, Any]:
    """Parse a table into a document that is still to be validated.

    Raises MalformedRequest when it is not CSV, and InvalidDocument, with the row and column of each
    fault, when it has other columns or cells that cannot be read.
    """
    reader = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True)
    try:
        header = next(reader, [])
        rows = [row for row in reader if row]
    except csv.Error as error:
        raise MalformedRequest(f"Not a CSV table: {error} in line {reader.line_num}.") from None
    _check_header(header)
    if not rows:
        raise MalformedRequest("The table has a header and no rows; give one row per layer.")

    faults: list[ErrorPlace] = []
    document: dict[str, Any] = {}
    layers: list[dict[str, Any]] = []
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise MalformedRequest(f"Row {number} has {len(row)} cells, the header has {len(header)}.")
        layer: dict[str, Any] = {}
        for column, cell in zip(header, row, strict=True):
            if cell == "" and column not in KEY_COLUMNS:
                continue
            try:
                if column in KEY_COLUMNS:
                    _set_once(document, column, cell if column == "model_id" else _number(cell))
                elif column in DOCUMENT_COLUMNS:
                    _set_once(document, column, _structure(cell) if column in _JSON_COLUMNS else cell)
                else:
                    _unflatten(layer, column, cell)
            except ValueError as error:
                if len(faults) < _MOST_PLACES:
                    faults.append({"pointer": f"/{number}/{column}", "code": "bad_cell", "detail": str(error)})
        if "retained_mass" in layer:
            layer["retained_mass"].sort()
        faults += [
            {"pointer": f"/{number}/{name}", "code": "bad_cell", "detail": "one end is missing"}
            for name in _INTERVALS
            if None in layer.get(name, ())
        ]
        layers.append(layer)
    if faults:
        raise InvalidDocument("Some cells cannot be read.", errors=faults[:_MOST_PLACES])
    document["layers"] = layers
    return document


def _check_header(header: list[str]) -> None:
    missing = [name for name in (*KEY_COLUMNS, "id", "gradient_norm") if name not in header]
    foreign = [
        name
        for name in header
        if name not in _FIXED_COLUMNS and not any(name.startswith(f"{prefix}.") for prefix in _OPEN_COLUMNS)
    ]
    twice = sorted(name for name, count in Counter(header).items() if count > 1)
    if missing or foreign or twice:
        said = [
            f"{what}: {', '.join(map(repr, names[:10]))}"
            for what, names in (("missing columns", missing), ("unknown columns", foreign), ("repeated columns", twice))
            if names
        ]
        errors: list[ErrorPlace] = [
            {"pointer": f"/0/{name}", "code": code, "detail": detail}
            for names, code, detail in (
                (missing, "missing_column", "this column is required"),
                (foreign, "unknown_column", "no such column"),
                (twice, "repeated_column", "a column may stand once"),
            )
            for name in names[:_MOST_PLACES]
        ]
        raise InvalidDocument(f"The header cannot be used; {'; '.join(said)}.", errors=errors)


def _set_once(document: dict[str, Any], column: str, value: Any) -> None:
    if document.setdefault(column, value) != value:
        raise ValueError(f"{value!r} differs from {document[column]!r} above; one table holds one blueprint")


def _unflatten(layer: dict[str, Any], column: str, cell: str) -> None:
    name, dot, member = column.partition(".")
    if not dot:
        layer[name] = _value(column, cell)
    elif name in _INTERVALS:
        layer.setdefault(name, [None, None])[member == "high"] = _number(cell)
    elif name == "retained_mass":
        layer.setdefault(name, []).append([_number(member), _number(cell)])
    else:
        layer.setdefault(name, {})[member] = _value(column, cell)


def _value(column: str, cell: str) -> Any:
    if column in _TEXT_COLUMNS:
        return cell
    if column in _INTEGER_COLUMNS:
        if not re.fullmatch(r"[0-9]{1,20}", cell):
            raise ValueError(f"{cell!r} is not a whole number")
        return int(cell)
    return _number(cell)


def _structure(cell: str) -> Any:
    """JSON of a cell, as strict as a JSON body."""
    try:
        return json.loads(cell, object_pairs_hook=_unique_members, parse_constant=_number)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _unique_members(members: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(members)
    if len(unique) < len(members):
        raise ValueError("a member name is repeated")
    return unique


def _number(cell: str) -> float:
    """A finite float64; the texts that Python reads as numbers and JSON does not are refused."""
    if not _NUMBER.fullmatch(cell):
        raise ValueError(f"{cell!r} is not a number as JSON spells it")
    value = float(cell)
    if value - value != 0:
        raise ValueError(f"{cell!r} is not a finite number")
    return value


def places_in_table(invalid: ValidationError) -> list[ErrorPlace]:
    """Pydantic's locations in the words of the table: row and column."""
    places: list[ErrorPlace] = []
    for error in invalid.errors(include_url=False, include_context=False, include_input=False)[:_MOST_PLACES]:
        match error["loc"]:
            case ("layers", int() as index, *rest):
                pointer = "/".join(["", str(index + 1), ".".join(map(str, rest))])
            case location:
                pointer = "/1/" + ".".join(map(str, location))
        places.append({"pointer": pointer, "code": error["type"], "detail": error["msg"]})
    return places
