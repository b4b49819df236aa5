"""`deepspeed train.py --config configs/smollm2-arithmetic.yaml`: train a policy with PAPO."""

import sys

if __name__ == "__main__":
    from papo.dist import termination

    termination.install()  # before imports that take seconds
    from papo.cli import main

    status = main()
    termination.PROCESS.close()
    sys.exit(status)
