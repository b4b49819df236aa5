"""`deepspeed train.py --config configs/smollm2-arithmetic.yaml`: train a policy with PAPO."""

import sys

from papo.cli import main

if __name__ == "__main__":
    sys.exit(main())
