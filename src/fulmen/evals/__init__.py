"""What trained models can do, measured on what their training held out (docs/vision.md)."""
