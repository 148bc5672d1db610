"""What is hard about quantizing a model, as one HTML page of pictures; ``--help`` lists the flags."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from qdiff.cli.inspect_model import main

if __name__ == "__main__":
    sys.exit(main())
