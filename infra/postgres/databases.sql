-- One database for each service that keeps state; MLflow's accounts have one of their own.
CREATE DATABASE prefect;
CREATE DATABASE mlflow;
CREATE DATABASE mlflow_auth;
