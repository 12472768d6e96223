"""ONNX files for tests: what onnxruntime makes of one, and graphs written by hand."""

import numpy as np
import pytest


def onnx():
    return pytest.importorskip("onnx", reason="onnx is not installed (pip install 'nanomr[onnx]')")


def session(data):
    """onnxruntime's, of a file or of its bytes."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (pip install 'nanomr[onnx]')")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    data = data if isinstance(data, bytes) else str(data)
    return runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def logits_elsewhere(path, images):
    """onnxruntime's, for images NHWC."""
    run = session(path)
    return run.run(None, {run.get_inputs()[0].name: np.ascontiguousarray(images.transpose(0, 3, 1, 2))})[0]


def write_graph(path, nodes, constants, shape=("N", 2, 5, 4), out=("N", "K"), kind="FLOAT", opset=13):
    """nodes: (operator, inputs, output, attributes) from "X" to "Y"; constants by name."""
    helper, kind = onnx().helper, getattr(onnx().TensorProto, kind)
    value = helper.make_tensor_value_info
    tensors = [onnx().numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    made = [helper.make_node(op, inputs, [output], **attributes) for op, inputs, output, attributes in nodes]
    graph = helper.make_graph(made, "theirs", [value("X", kind, shape)], [value("Y", kind, out)], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)
