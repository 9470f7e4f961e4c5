"""``python -m swincupy`` is the command line."""

import sys

from swincupy.cli import main

sys.exit(main())
