"""The modules under test lie in the folder above; what several test files share."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches for the network
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
