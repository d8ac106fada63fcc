"""Train a GPT-2: ``python train.py``. See ``python train.py --help``."""

from fastgpt import common
from fastgpt.train import main

if __name__ == "__main__":
    common.run(main)
