# docker build -t rlpost .                                    (CUDA)
# docker build -t rlpost:cpu --build-arg FLAVOUR=cpu .        (CPU)
# docker run --gpus all -v $PWD/runs:/rlpost/runs rlpost accelerate launch --config_file launch/gpu.yaml -m rlpost recipes/quickstart.yaml
ARG FLAVOUR=cuda
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS base-cuda
FROM ubuntu:24.04 AS base-cpu
FROM base-${FLAVOUR}
ARG FLAVOUR
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv python3-dev build-essential git make libnuma1 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /rlpost
# Dependencies first, so that a change of the code does not install them again.
COPY pyproject.toml README.md LICENSE ./
COPY launch launch
COPY rlpost/__init__.py rlpost/__init__.py
COPY rewards rewards
COPY recipes recipes
RUN launch/install.sh --flavour ${FLAVOUR} --no-dev
COPY . .
ENV PATH=/rlpost/.venv/bin:$PATH VIRTUAL_ENV=/rlpost/.venv PYTHONUNBUFFERED=1
CMD ["rlpost", "doctor"]
