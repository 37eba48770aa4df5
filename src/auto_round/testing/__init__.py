"""Conformance kits: what any layout, exporter, format or kernel has to pass. Not imported by the product."""
