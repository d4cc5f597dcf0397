"""What a measurement leaves: JSON, journals of interrupted runs, plots, one page of all."""
