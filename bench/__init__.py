"""Benchmarks: one module a question, variants interleaved in one process. See ``python -m bench --help``."""

import logging

# They warn, when imported or first used, about optional parts of their own that are not installed.
for _noisy in ("torchao", "transformers", "torch.utils._pytree"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)
