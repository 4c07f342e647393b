"""Callbacks for `transformers.Trainer`."""
