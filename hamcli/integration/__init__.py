"""HAM and exact sparsity in other people's training: transformers' Trainer, PEFT.

`trainer` and `lora` import those libraries, and are imported by whoever has them; this package
imports neither.
"""
