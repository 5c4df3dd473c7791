#!/usr/bin/env python3
"""Pretrain a GPT: `deepspeed pretrain_gpt.py --config FILE.yaml [flags]`. See `--help`."""

from megatron_adalrs.commands.pretrain import leave, main

if __name__ == "__main__":
    leave(main())
