"""Prefect flows: one per stage, and the flows that run all stages. Only this package imports Prefect."""

from infra.settings import apply_environment_defaults

# Prefect, Ray and MLflow read their settings when they are imported, and Prefect's workers import flow files from here.
apply_environment_defaults()
