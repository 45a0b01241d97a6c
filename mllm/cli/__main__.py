"""`python -m mllm.cli`."""

from mllm.cli import main

main()
