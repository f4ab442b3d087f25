"""`python -m goldfish`, and so `accelerate launch -m goldfish`: the command line."""

import sys

from goldfish.cli import main

sys.exit(main())
