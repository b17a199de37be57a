# Training, evaluation and comparisons on NVIDIA GPUs, or on processors without --gpus.
#   docker build -f deploy/train.Dockerfile -t shadowtune-train .
#   docker run --gpus all --ipc=host --user "$(id -u)" -v "$PWD:/work" -v "$HOME/.cache/huggingface:/cache/huggingface" \
#       shadowtune-train train config.yaml
#   docker run --gpus all --ipc=host --user "$(id -u)" -v "$PWD:/work" --entrypoint torchrun \
#       shadowtune-train --standalone --nproc-per-node 8 -m shadowtune train config.yaml
# --ipc=host: data loaders and NCCL share memory. Results are written below /work, as the user who started it.
FROM python:3.12-slim

# Triton compiles the launchers of its kernels with a C compiler, at the first step
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/shadowtune
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src ./src
RUN pip install --no-cache-dir -c constraints.txt '.[peft,hub,smollm2,plot,quant,tensorboard,cluster]'

# any user may write the caches: --user names one that the image does not know, and torch asks for the user's name
ENV HOME=/cache HF_HOME=/cache/huggingface USER=shadowtune
RUN useradd --no-create-home --home-dir /cache --uid 1000 shadowtune && install -d -m 1777 /cache /cache/huggingface /work
USER shadowtune
WORKDIR /work

STOPSIGNAL SIGINT
ENTRYPOINT ["shadowtune"]
CMD ["--help"]
