"""`vtp-tiny-video`: clips, questions about them, and the embedded model that is shown them."""
