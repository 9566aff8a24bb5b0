"""What ``mmseg-imbalance benchmark`` measures, each beside the formula that it is held to."""
