"""`python -m superexperts` is the `superexperts` command."""

import sys

from superexperts.cli import main

sys.exit(main())
