"""Reads runs from verl's file logger, from TensorBoard, or from a file of collected runs, one per line.

Files are read as a stream; of their metrics only those that the report shows are kept.
"""
