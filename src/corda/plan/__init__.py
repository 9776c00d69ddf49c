"""From covariances to a plan (ranks, spectra) and its factors."""
