"""Compares arms (a trained sibling and a way to run it): results, statistics, alarms and the report."""
