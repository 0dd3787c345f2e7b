"""`python -m hemiola`: the command line."""

import sys

from hemiola.cli import main

sys.exit(main())
