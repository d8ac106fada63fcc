"""Train a GPT-2: ``python train.py --kernels triton``. See ``python train.py --help``."""

from __future__ import annotations

from fastgpt import cli, device
from fastgpt.config import parse


def main(args: list[str]) -> int:
    config = parse(args, device.present())
    where = device.pick(config.train.device, config.train.kernels)
    from fastgpt.training.loop import train  # after pick(): Triton's interpreter is chosen before triton is imported

    return train(config, where)[1]


if __name__ == "__main__":
    cli.run(main)
