"""Profile, prune, LoRA-train and evaluate the super experts of Mixture-of-Experts language models."""

__version__ = "0.1.0"
