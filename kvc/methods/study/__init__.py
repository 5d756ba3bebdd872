"""Documents are studied once; the compressed memory of them is kept, and questions are answered from it.

The classes for configurations are in `kvc.methods.study.module`: commands that need no Trainer do not load one.
"""
