"""Models as ONNX graphs, an optional extra: written, then held against torch in onnxruntime.

graph      a torch model -> a file, its weights under their own names
checking   the file against the model: outputs, weights, zeros
exporting  `ham export --format onnx`
"""
