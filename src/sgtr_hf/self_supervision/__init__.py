"""What a vision transformer learned without labels: the evaluations of DINO (Caron et al. 2021)."""
