"""What is made for one model from text: calibrations and tuned specs."""
