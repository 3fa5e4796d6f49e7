"""Where things run and lie: settings, addresses and storage, the Ray cluster, MLflow tracking."""
