"""Scores of finished images; ``--help`` lists the flags."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from qdiff.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
