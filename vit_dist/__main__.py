"""python -m vit_dist: the same as vit-dist."""

import sys

from vit_dist.cli import main

sys.exit(main())
