"""What clients notice of a worker's death while another of its kind lives: nothing."""
