"""Merging of memory models that learned different documents, so that one can be updated without training anew.

``arithmetic`` merges tensors, ``checkpoints`` folders of whole models, ``adapters`` LoRA adapters by what they add.
"""
