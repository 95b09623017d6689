"""Generated Triton kernels: `render` writes and loads them, `tuning` chooses, `launch` calls, `compiled` inspects."""
