"""``python -m sglp_deploy`` is the same command line as ``sglp-deploy``."""

from __future__ import annotations

import sys

from sglp_deploy.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
