"""Train a GPT-2: ``python train.py --kernels triton``. See ``python train.py --help``."""

from fastgpt import cli
from fastgpt.train import main

if __name__ == "__main__":
    cli.run(main)
