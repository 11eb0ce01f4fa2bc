# The repository with its environment: docker build -t hts . && docker run --rm hts demo
# With a GPU: docker run --rm --gpus all hts test-gpu
FROM python:3.12-slim
# git names the revision in rows; Triton compiles its launchers with gcc.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc git libc6-dev make && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/hts
COPY . .
# What is installed here meets pyproject.toml on any machine; on one with a GPU pip picks torch for CUDA.
RUN make lint
ENTRYPOINT ["make"]
CMD ["help"]
