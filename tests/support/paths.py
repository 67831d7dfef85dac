"""Where the repository is, and the scripts that tests start in processes of their own."""

from pathlib import Path


SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parents[1]
