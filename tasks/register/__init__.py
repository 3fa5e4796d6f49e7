"""The register stage: a trained model and its evaluation become a gated, tried-out version in MLflow."""
