"""Preloaded into a worker (`dask worker --preload`), this machine's CPU is one of another kind there."""

import torch

here = dict(torch.cpu.get_capabilities())
torch.cpu.get_capabilities = lambda: {**here, "cpu_name": "Another CPU"}
