"""Description -> ONNX graph, operation by operation, without tracing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoseg.errors import RunError
from autoseg.networks.describe import Description, Node, segments
from autoseg.types.plan import Ints

INPUT, OUTPUT = "image", "logits"
OPSETS = (16, 21)  # the first in which LeakyRelu has its present form, and the last that all operations here were checked in
EPSILON, SLOPE = 1e-5, 0.01  # of instance norm and leaky ReLU, as the networks are built with

Weights = Mapping[str, NDArray[np.float32]]


def onnx_package() -> Any:
    """The package onnx. Raises RunError when it is not installed."""
    try:
        import onnx  # type: ignore[import-not-found, import-untyped, unused-ignore]  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise RunError("ONNX needs the packages onnx and onnxruntime: pip install 'autoseg-framework[onnx]'") from None
    return onnx


def onnx_model(description: Description, networks: Sequence[Weights], patch: Ints, opset: int, facts: Mapping[str, str]) -> Any:
    """An onnx.ModelProto of one network, or of the mean of several of one description.

    Input `image` (batch, channels, *patch) and output `logits` (batch, classes, *patch) are float32; only the batch is free.
    `facts` go into the metadata. Raises RunError when onnx is not installed or the opset is not supported.
    """
    onnx = onnx_package()
    if not OPSETS[0] <= opset <= OPSETS[1]:
        raise RunError(f"opset {opset} is not supported; choose {OPSETS[0]} to {OPSETS[1]}")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    steps: list[Any] = []
    tensors: list[Any] = []
    ends: list[str] = []
    for index, weights in enumerate(networks):
        prefix = f"network_{index}/" if len(networks) > 1 else ""
        for segment in segments(description, 1):
            for node in segment.nodes:
                steps += _operations(helper, node, prefix, description.dims)
        ends.append(f"{prefix}{description.heads[0]}")
        used = {name for step in steps for name in step.input}  # heads of deep supervision are left out
        tensors += [onnx.numpy_helper.from_array(np.ascontiguousarray(value), prefix + name)
                    for name, value in weights.items() if prefix + name in used]
    steps.append(helper.make_node("Mean" if len(ends) > 1 else "Identity", ends, [OUTPUT], OUTPUT))
    values = [helper.make_tensor_value_info(name, kind, ["batch", channels, *patch])
              for name, channels in ((INPUT, description.input_channels), (OUTPUT, description.output_channels))]
    graph = helper.make_graph(steps, "autoseg", values[:1], values[1:], tensors)
    imports = [helper.make_opsetid("", opset)]
    made = helper.make_model(graph, opset_imports=imports, producer_name="autoseg")
    made.ir_version = helper.find_min_ir_version_for(imports)  # so that older runtimes read it
    helper.set_model_props(made, dict(facts))
    return made


def _operations(helper: Any, node: Node, prefix: str, dims: int) -> list[Any]:
    """The ONNX operations of one node; its value bears the node's name."""
    inputs = [INPUT if name == "input" else prefix + name for name in node.inputs]
    name, unit = prefix + node.name, f"{prefix}units.{node.name}"
    if node.op == "conv":
        return _convolution(helper, node, inputs[0], name, unit)
    if node.op == "head":
        return [helper.make_node("Conv", [inputs[0], f"{unit}.weight", f"{unit}.bias"], [name], name, kernel_shape=(1,) * dims)]
    if node.op == "up":
        shape = {"kernel_shape": node.kernel, "strides": node.stride}
        return [helper.make_node("ConvTranspose", [inputs[0], f"{unit}.weight", f"{unit}.bias"], [name], name, **shape)]
    if node.op == "pool":
        return [helper.make_node("AveragePool", inputs, [name], name, kernel_shape=node.stride, strides=node.stride)]
    if node.op == "concat":
        return [helper.make_node("Concat", inputs, [name], name, axis=1)]
    if node.op == "add":
        total = f"{name}/sum"
        activation = helper.make_node("LeakyRelu", [total], [name], name, alpha=SLOPE)
        return [helper.make_node("Add", inputs, [total], total), activation]
    raise ValueError(f"no ONNX operation for {node.op!r}")


def _convolution(helper: Any, node: Node, source: str, name: str, unit: str) -> list[Any]:
    """Convolution, then instance norm and leaky ReLU where the node asks for them."""
    kinds = ["Conv", *(["InstanceNormalization"] if node.norm else []), *(["LeakyRelu"] if node.activation else [])]
    pads = tuple((edge - 1) // 2 for edge in node.kernel)
    made: list[Any] = []
    for index, kind in enumerate(kinds):
        target = name if index == len(kinds) - 1 else f"{name}/{kind}"
        if kind == "Conv":
            inputs = [source, f"{unit}.conv.weight", *([f"{unit}.conv.bias"] if node.bias else [])]
            options: dict[str, Any] = {"kernel_shape": node.kernel, "strides": node.stride, "pads": pads * 2}
        elif kind == "InstanceNormalization":
            inputs, options = [source, f"{unit}.norm.weight", f"{unit}.norm.bias"], {"epsilon": EPSILON}
        else:
            inputs, options = [source], {"alpha": SLOPE}
        made.append(helper.make_node(kind, inputs, [target], target, **options))
        source = target
    return made
