"""Calibration: state scales, SmoothQuant factors and ESR, written to an artifact that the passes read.

Will use `qmamba_compile.quant`, `artifact`, `state` and `ops`, never the passes. Nothing is here yet.
"""
