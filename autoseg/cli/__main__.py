"""python -m autoseg.cli"""

from autoseg.cli import main

main()
