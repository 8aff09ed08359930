"""`python -m vlm_train`."""

from vlm_train.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
