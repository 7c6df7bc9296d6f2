"""One thread: models of this size gain nothing from two, and processes side by side lose by them."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
