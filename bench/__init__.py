"""Benchmarks: shapes by name, one module a question. Nothing is here yet; `make demo` measures the bundled model."""
