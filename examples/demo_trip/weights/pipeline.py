"""The pipeline class of this folder, which diffusers loads by `custom_pipeline`."""

from trip_model.pipeline import TripPipeline

__all__ = ["TripPipeline"]
