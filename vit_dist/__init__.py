"""Fine-tune Hugging Face Vision Transformers for image classification, on one device or many."""

__version__ = "0.1.0"
