"""Entry point of `python -m cdc_mmpg`: see `commands.main`."""

import sys

from cdc_mmpg.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
