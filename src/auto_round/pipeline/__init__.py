"""The main job: from a model and options to finished folders."""
