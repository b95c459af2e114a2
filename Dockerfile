# A machine with NVIDIA GPUs. The host needs a driver of branch R580 or newer and the NVIDIA Container Toolkit; the wheels
# of torch bring CUDA 13. `checkpoints` must be writable for user 1000. Loading frames needs shared memory (--shm-size).
#
#   docker build --tag cdc-mmpg .
#   docker run --rm --gpus all --shm-size 8g --volume "$PWD/checkpoints:/cdc-mmpg/checkpoints" \
#     --volume "$PWD/data:/cdc-mmpg/data" cdc-mmpg train DATASET=msvd DATA=data/msvd
FROM python:3.13-slim-trixie

# git names the commit of a result; gcc is for COMPILE=1. Debian keeps only the latest version of a package.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc git libc6-dev make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 researcher \
    && install --directory --owner=researcher --group=researcher /cdc-mmpg
USER 1000:1000
WORKDIR /cdc-mmpg

# What the environment is made from comes first, so that another source file does not install it again.
COPY --chown=1000:1000 Makefile README.md pyproject.toml requirements.lock ./
COPY --chown=1000:1000 src/cdc_mmpg/__init__.py src/cdc_mmpg/
RUN make environment && rm -rf /home/researcher/.cache
COPY --chown=1000:1000 . .

ENTRYPOINT ["make"]
CMD ["help"]
