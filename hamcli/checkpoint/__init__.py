"""Models on disk: opening them safely, writing them, and counting what was written.

source      a name, folder or file -> a checked `Source`; no torch
hub         hub ids -> a folder of the local cache
folder      which files of a model folder may be read
config      the model's own config.json: cleaned, held against the headers
headers     safetensors headers, checked
loading     `Source` -> a transformers model, tokenizer and image processor
dense       a model -> safetensors that stock tools load
recount     a written file -> counts, by a reader that is not the writer
stream      tensors of files, read and written piece by piece
inspection  any safetensors file -> shapes, ties; sparsity, near-zero mass, N:M fit
"""
