"""`vit_dist.train` with the faults of VIT_DIST_FAULT. Started by the real launchers in its place."""

from __future__ import annotations

import os
import sys

from points import install

from vit_dist import train

if __name__ == "__main__":
    install(int(os.environ.get("RANK", 0)))
    sys.exit(train.main())
