"""`python -m jaxinterp` is the command line."""

import sys

from jaxinterp.cli import main

sys.exit(main())
