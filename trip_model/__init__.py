"""TRIP: temporal residual learning with image noise prior, for image-to-video diffusion (Zhang et al., CVPR 2024)."""

__version__ = "0.1.0"
