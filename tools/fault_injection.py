#!/usr/bin/env python3
"""Run `megatron-adalrs fault-injection` from a checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_adalrs.commands.fault_injection import main

if __name__ == "__main__":
    sys.exit(main())
