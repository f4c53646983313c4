"""Small ONNX models, written as files with their descriptions."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

BANDS = ["red", "green", "blue", "nir"]
"""What `convolutions` sees unless told otherwise."""


def convolutions(
    num_bands: int = len(BANDS),
    num_classes: int = 3,
    *,
    size: tuple[int | str, int | str] = ("height", "width"),
    batch: int | str = "batch",
    after: Sequence[str] = (),
    dtype: int = TensorProto.FLOAT,
    seed: int = 0,
) -> onnx.ModelProto:
    """A model that looks four pixels around, and whose tiles therefore end in errors.

    Weights are whole numbers, so that for such values nothing is rounded, whatever the kernels.

    Args:
        num_bands: that it sees.
        num_classes: channels of its output.
        size: height and width that it takes; a text: any.
        batch: images together that it takes, likewise.
        after: operations without attributes after the logits, such as `Sigmoid`.
        dtype: ONNX's number of the type of input, weights and output.
        seed: of the weights.
    """
    rng = np.random.default_rng(seed)
    numpy_type = helper.tensor_dtype_to_np_dtype(dtype)
    shapes = [(5, num_bands, 5, 5), (num_classes, 5, 5, 5)]
    weights = [
        helper.make_tensor(f"w{index}", dtype, shape, rng.integers(-2, 3, shape).astype(numpy_type).tobytes(), raw=True)
        for index, shape in enumerate(shapes)
    ]
    nodes = [
        helper.make_node("Conv", ["image", "w0"], ["hidden"], pads=[2, 2, 2, 2]),
        helper.make_node("Relu", ["hidden"], ["rectified"]),
        helper.make_node("Conv", ["rectified", "w1"], ["step0"], pads=[2, 2, 2, 2]),
    ]
    for index, name in enumerate(after):
        attributes: dict[str, Any] = {"axis": 1} if name in ("Softmax", "ArgMax") else {}
        nodes.append(helper.make_node(name, [f"step{index}"], [f"step{index + 1}"], **attributes))
    nodes.append(helper.make_node("Identity", [f"step{len(after)}"], ["logits"]))
    given = helper.make_tensor_value_info("image", dtype, [batch, num_bands, *size])
    gives = helper.make_tensor_value_info("logits", TensorProto.INT64 if "ArgMax" in after else dtype, None)
    return helper.make_model(
        helper.make_graph(nodes, "convolutions", [given], [gives], weights),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )


def halving(num_halvings: int = 1, num_bands: int = 3, num_classes: int = 3) -> onnx.ModelProto:
    """A model like a U-Net, which halves its input some times, doubles that again, and adds what it had before."""
    rng = np.random.default_rng(0)
    factor = 2**num_halvings
    weights = [
        helper.make_tensor(
            "w", TensorProto.FLOAT, (num_classes, num_bands, 1, 1), rng.normal(size=num_classes * num_bands)
        ),
        helper.make_tensor("scales", TensorProto.FLOAT, (4,), (1, 1, factor, factor)),
    ]
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["skipped"]),
        helper.make_node("MaxPool", ["skipped"], ["small"], kernel_shape=[factor] * 2, strides=[factor] * 2),
        helper.make_node("Resize", ["small", "", "scales"], ["large"], mode="nearest"),
        helper.make_node("Add", ["large", "skipped"], ["logits"]),
    ]
    given = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", num_bands, "height", "width"])
    gives = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    return helper.make_model(
        helper.make_graph(nodes, "halving", [given], [gives], weights),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )


def described(**others: Any) -> dict[str, Any]:
    """The description of `convolutions`, fed as they are with bands from 0 to 3."""
    num_bands = len(others.get("bands", BANDS))
    return {
        "classes": ["soil", "crop", "weed"],
        "bands": BANDS,
        "mean": [0.0] * num_bands,
        "std": [1.0] * num_bands,
        **others,
    }


def write(path: Path, model: onnx.ModelProto | bytes, description: Any) -> str:
    """Writes both files, and returns the model's path."""
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    text = description if isinstance(description, str) else json.dumps(description)
    path.with_suffix(".json").write_text(text)
    return str(path)
