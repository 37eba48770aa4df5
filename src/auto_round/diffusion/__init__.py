"""Pipelines of diffusers: their transformers tuned on what captions make them do."""
