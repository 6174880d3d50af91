"""One thread for numpy's linear algebra: the stages bring their own threads, and OpenBLAS's wait for work by running in circles.

Measured: after each case was preprocessed they took half of the processor from the network for 50 ms. numpy reads this when it is
imported first, so this module is the first that the command line imports.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
