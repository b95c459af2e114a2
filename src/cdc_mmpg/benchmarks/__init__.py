"""Speed: of training, of service and device, over a network."""
