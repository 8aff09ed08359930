"""`python -m vlm_train.contract <group>=<name> ...`."""

import sys

from vlm_train.contract.command import main

if __name__ == "__main__":
    sys.exit(main())
