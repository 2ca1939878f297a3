# CPU:  docker build -t soar .
# CUDA: docker build -t soar --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
# Run:  docker run --gpus all -v "$PWD:/work" -w /work soar run small-1gpu --model ... --problems ... --out runs/mine
FROM python:3.12-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update && apt-get install -y --no-install-recommends bubblewrap gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" -c constraints.txt '.[train,hub,parquet,tensorboard]'
RUN useradd --create-home soar
USER soar
ENTRYPOINT ["soar"]
