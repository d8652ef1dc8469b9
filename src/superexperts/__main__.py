"""`python -m superexperts` is the `superexperts` command."""

import sys

from .cli import main

sys.exit(main())
