"""Tables, plots, pictures and the page."""
