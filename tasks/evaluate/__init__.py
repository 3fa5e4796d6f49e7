"""The evaluate stage: held-out clips animated by a model export, compared with still and real rows (section 4)."""
