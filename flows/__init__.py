"""When things run: one flow per stage and the parent that runs them all; the only floor that imports Prefect."""

from infra.settings import apply_environment_defaults

# Prefect, Ray and MLflow read their settings when they are imported, and Prefect's workers import flow files from here.
apply_environment_defaults()
