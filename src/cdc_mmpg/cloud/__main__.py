"""`python -m cdc_mmpg.cloud`: see `app.main`."""

import sys

from cdc_mmpg.cloud.app import main

if __name__ == "__main__":
    sys.exit(main())
