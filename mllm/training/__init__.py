"""Training from recipes. Nothing here is imported by `import mllm`."""
