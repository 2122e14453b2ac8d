"""What each Triton kernel will cost on each chip, predicted from its machine code; no GPU is asked."""
