"""Fine-tuning of Hugging Face models on very long samples, one sample split over many GPUs."""

__version__ = "0.1.0"
