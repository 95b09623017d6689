"""Calibration and faithful evaluation: state scales, SmoothQuant, ESR, perplexity of the recurrence that decode runs.

Uses `qmamba_compile.quant`, `artifact`, `state` and the operators, never the passes. ``qmamba calibrate`` writes the
artifact that ``torch.compile(model, backend="qmamba", options={"calibration": ...})`` reads.
"""
