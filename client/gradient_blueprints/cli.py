"""The entry point of the command `blueprints`; its commands need the extra [cli] and stand in commands.py."""

from __future__ import annotations

import sys

from gradient_blueprints.errors import BlueprintsError, ConfigurationError, MissingExtra

FAILED, USAGE, INTERRUPTED = 1, 2, 130


def main() -> None:
    """Run the command; exits 0, 1 when the registry or the network says no, 2 when it was called wrongly."""
    try:
        from gradient_blueprints.commands import app
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] not in {"typer", "rich"}:
            raise
        sys.exit(_complain(MissingExtra("cli", "The command blueprints"), USAGE))
    try:
        app(prog_name="blueprints")
    except ConfigurationError as error:
        sys.exit(_complain(error, USAGE))
    except (BlueprintsError, OSError) as error:  # OSError: a file that cannot be read or written, TimeoutError
        sys.exit(_complain(error, FAILED))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _complain(error: Exception, code: int) -> int:
    sys.stderr.write(f"blueprints: {error}\n")
    return code


if __name__ == "__main__":
    main()
