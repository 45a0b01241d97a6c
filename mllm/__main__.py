"""`python -m mllm`: the `mllm` command."""

from mllm.cli import main

main()
