"""What a model's attention works with, summed up over calibration proteins."""
