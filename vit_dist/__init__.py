"""Fine-tune Hugging Face Vision Transformers for image classification, on one device or many."""

from vit_dist import bundle

__version__ = "0.1.0"

bundle.seal()  # before anything imports the libraries that it is meant for
