"""Labelled videos: annotations, labels, splits, data sets of the Hub, and scans for damage."""
