"""One thread per process: the tests' networks are so small that threads would only wait."""

import os

import torch

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes the tests start
torch.set_num_threads(1)
