"""Forecasts of what an experiment will take, before it runs."""
