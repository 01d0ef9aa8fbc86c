"""Speed, as ratios against a stated reference."""
