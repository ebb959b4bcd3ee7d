"""The package index shows README.md alone: what leads to other files of the repository is words there."""

import re
from pathlib import Path

from setuptools import setup

ELSEWHERE = r"\((?!https?://)[^)]*\)"
readme = re.sub(rf"!\[[^\]]*\]{ELSEWHERE}\n*", "", Path("README.md").read_text(encoding="utf-8"))
readme = re.sub(rf"\[([^\]]*)\]{ELSEWHERE}", r"\1", readme)
setup(long_description=readme, long_description_content_type="text/markdown")
