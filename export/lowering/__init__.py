"""Rewrites of an ONNX graph for one runtime, one idea a file."""
