"""Files of other people: networks (ONNX), properties and lists of instances (VNN-LIB, CSV)."""
