#!/usr/bin/env bash
# All checks: formatting, lint, types, import contracts, tests. Sets up what it needs. Arguments go to pytest.
set -euo pipefail
EXTRAS=dev
source "$(dirname "$0")/environment.sh"

ruff format --check .
ruff check .
mypy
lint-imports
pytest --numprocesses auto --dist loadfile "$@"
