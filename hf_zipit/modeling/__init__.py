"""The merged multi-head model as a Hugging Face model. Its modules register themselves with the Auto classes.

A name is imported when it is first used: the configuration costs little, the models half of transformers.
"""

from hf_zipit.lazy import lazily

HOMES, __getattr__, __dir__ = lazily(__name__, __file__)
__all__ = sorted(HOMES)
