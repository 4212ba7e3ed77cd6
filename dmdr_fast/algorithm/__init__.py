"""The paper, as plain functions on tensors: no engine, no model zoo, no configuration file."""
