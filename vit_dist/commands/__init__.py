"""What `vit-dist` does beside training."""
