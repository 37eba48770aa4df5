"""`python -m auto_round` is `auto-round`."""

from __future__ import annotations

import sys

from auto_round.cli.main import main

sys.exit(main())
