"""Triton kernels and their launchers, packaged as d2v_fast.kernels."""

if __name__ != "d2v_fast.kernels":
    raise ImportError("import d2v_fast.kernels, not kernels")
