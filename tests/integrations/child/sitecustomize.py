"""For new processes: torchvision's own operators need not load beside this build of torch (see benchmarks/stock.py)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))
from benchmarks import stock

stock._torchvision()
