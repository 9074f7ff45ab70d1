"""What an export carries: the files of this folder but this one are copied into every exported folder."""

from pathlib import Path

FILES = tuple(sorted(path for path in Path(__file__).parent.glob("*_nsa.py")))
