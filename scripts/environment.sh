# Sourced by the other scripts: a virtual environment in .venv with Hemiola and the extras named in $EXTRAS.
#
# HEMIOLA_PYTHON names the Python to make it with (3.11 or newer). PyTorch comes from wherever pip is set up to look:
# point pip at an index of CPU builds to spare a machine without a GPU the CUDA packages.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${HEMIOLA_PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "Hemiola needs Python 3.11 or newer; $python is $("$python" --version 2>&1). Set HEMIOLA_PYTHON." >&2
  exit 1
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
stamp=.venv/hemiola-$EXTRAS
wanted=$(cat pyproject.toml scripts/constraints.txt | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "Setting up .venv with hemiola[$EXTRAS] ..." >&2
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint scripts/constraints.txt --editable ".[$EXTRAS]"
  echo "$wanted" > "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
