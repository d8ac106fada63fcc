# docker build -t fastgpt . && docker run --gpus all -v $PWD/runs:/fastgpt/runs fastgpt train --max-iters 1000
# Triton builds its launchers with a C compiler and Python's headers, so the image has both.
FROM nvidia/cuda:12.8.1-base-ubuntu24.04
# No versions: the release is pinned above, and its archive keeps only the newest build of a package.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /fastgpt
COPY pyproject.toml setup.py README.md LICENSE ./
COPY fastgpt fastgpt
COPY configs configs
COPY bench bench
COPY train.py ./
RUN pip install --no-cache-dir --editable ".[data,hf,plot,gpu]"
ENTRYPOINT ["python", "-m", "fastgpt"]
