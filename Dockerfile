# s2d on vLLM's own image, for GPU hosts.
#
#     docker build -t s2d .
#     docker run --rm --gpus all --ipc host -v s2d-hub:/hub -v "$PWD:/data" s2d grpo --help
#
# The base brings CUDA, torch 2.13.0, transformers and vLLM in versions that belong together, so
# they stay as they are and constraints.txt is not applied. User 2000 is the base's own `vllm`;
# to write into a folder of yours add `--user "$(id -u):0" -e HOME=/tmp -e USER=s2d`.
FROM vllm/vllm-openai:v0.32.0

ENV HF_HOME=/hub

WORKDIR /opt/s2d
COPY pyproject.toml README.md LICENSE ./
COPY s2dcli ./s2dcli
RUN uv pip install --system --no-cache . \
    && install -d -o 2000 -g 0 -m 775 /hub /data

USER 2000
WORKDIR /data
VOLUME ["/hub"]
ENTRYPOINT ["s2d"]
CMD ["--help"]
