"""Wire format between device and cloud; does not need torch."""
