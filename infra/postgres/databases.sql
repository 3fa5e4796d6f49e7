-- One database for each service that keeps state.
CREATE DATABASE prefect;
CREATE DATABASE mlflow;
