"""The evaluate stage: held-out clips animated by a model export, judged beside still and real rows (section 4)."""
