"""What is known of a model without running it: the parts of its tower, what they cost, and what one image is."""
