"""``d2v-fast pretrain`` with plants, for torchrun: command.py PLANTS PRESET KEY=VALUE..."""

import json
import os
import sys

import plants
import torch

from d2v_fast.cli import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    plants.plant(int(os.environ["RANK"]), json.loads(sys.argv[1]))
    sys.argv = ["d2v-fast", "pretrain", *sys.argv[2:]]
    main()
